"""Our own ground truth: members of a space retrained alone, one CSV row per training, kept in the repository.

A row is found again by data set, space, recipe, architecture and seed; costs of the device that drew it
stand beside it for the reader.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.artifacts import sha256_json, write_bytes
from pipeline.errors import CorruptArtifact
from pipeline.spaces.base import SearchSpace
from pipeline.train.recipe import Recipe
from pipeline.types import Arch


class Key(NamedTuple):
    """What decides an accuracy. `space` and `recipe` are the first 12 digits of their hashes."""

    data: str
    space: str
    recipe: str
    choices: str
    seed: int


@dataclass(frozen=True, slots=True)
class Row:
    """One training. `tier` and `latency_ms` (predicted) are of the run that drew the architecture; accuracies
    are top-1 in per cent."""

    data: str
    space: str
    recipe: str
    choices: str
    seed: int
    epochs: float
    tier: str
    latency_ms: float
    params: int
    flops: int
    architecture: float
    test: float

    @property
    def key(self) -> Key:
        return Key(self.data, self.space, self.recipe, self.choices, self.seed)


def key_of(data: str, space: SearchSpace, recipe: Recipe, arch: Arch, seed: int) -> Key:
    return Key(
        data,
        sha256_of_space(space),
        sha256_json(recipe.model_dump(mode="json"))[:12],
        " ".join(map(str, arch.choices)),
        seed,
    )


def sha256_of_space(space: SearchSpace) -> str:
    """As a row has it."""
    return sha256_json(space.fingerprint())[:12]


def read_rows(path: Path) -> dict[Key, Row]:
    """Empty where there is no file. Raises CorruptArtifact for a row that is not one."""
    if not path.is_file():
        return {}
    rows: dict[Key, Row] = {}
    with path.open(newline="") as file:
        for number, record in enumerate(csv.DictReader(file), start=2):
            try:
                values = {field.name: _TYPES[str(field.type)](record[field.name]) for field in fields(Row)}
                row = Row(**values)
            except (KeyError, TypeError, ValueError) as wrong:
                raise CorruptArtifact(f"{path}: line {number} is not a training: {wrong!r}") from None
            rows[row.key] = row
    return rows


_TYPES: dict[str, type[Any]] = {"str": str, "int": int, "float": float}


def add_rows(path: Path, rows: Iterable[Row]) -> None:
    """Adds to what the file has, sorted, so that a difference in version control shows what is new."""
    known = read_rows(path) | {row.key: row for row in rows}
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    for _, row in sorted(known.items()):
        writer.writerow({**asdict(row), "epochs": f"{row.epochs:g}"})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, text.getvalue().encode())
