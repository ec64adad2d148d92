"""What a search's checkpoint is made of, whichever loop drives the search. Axes: N architectures, S slots."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import StaleArtifact
from pipeline.types import Arch, Arrays, Candidate, Checkpoint, Json


def load_own(checkpoint: Checkpoint, method: str, inputs: str) -> tuple[Arrays, Json] | None:
    """What a checkpoint holds, None where there is none. Raises StaleArtifact where it is of a search that
    `inputs`, a content hash, does not stand for."""
    loaded = checkpoint.load()
    if loaded is None:
        return None
    arrays, record = loaded
    if record.get("inputs") != inputs:
        raise StaleArtifact(
            f"search: the checkpoint is of another search ({record.get('method')}) than {method} with these "
            "settings, tiers and seed; remove it, or choose another --out"
        )
    return dict(arrays), record


def labelled(prefix: str, arrays: Mapping[str, Any]) -> Arrays:
    return {f"{prefix}{name}": np.asarray(value) for name, value in arrays.items()}


def under(prefix: str, arrays: Arrays) -> Arrays:
    """The inverse of `labelled`, from among others."""
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}


def rows_of(archs: Iterable[Arch], num_slots: int) -> NDArray[np.int64]:
    """Choices, shape (N, S), also where N is 0."""
    rows = [arch.choices for arch in archs]
    return np.array(rows, dtype=np.int64).reshape(len(rows), num_slots)


def archs_of(choices_NS: NDArray[Any], space: str) -> list[Arch]:
    return [Arch(space, tuple(row)) for row in choices_NS.tolist()]


def arrays_of_candidates(candidates: Iterable[Candidate], num_slots: int) -> Arrays:
    kept = list(candidates)
    return {
        "candidates.choices": rows_of((candidate.arch for candidate in kept), num_slots),
        "candidates.loss": np.array([candidate.loss for candidate in kept], dtype=float),
        "candidates.evaluations": np.array([candidate.evaluations for candidate in kept], dtype=np.int64),
    }


def candidates_in(arrays: Arrays, space: str) -> dict[Arch, Candidate]:
    """The inverse of `arrays_of_candidates`, in the same order."""
    archs = archs_of(arrays["candidates.choices"], space)
    columns = (arrays[f"candidates.{name}"].tolist() for name in ("loss", "evaluations"))
    return {arch: Candidate(arch, loss, count) for arch, loss, count in zip(archs, *columns, strict=True)}
