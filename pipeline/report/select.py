"""Choosing a network from a finished run by what it was measured to cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.artifacts import inside, sha256_file
from pipeline.errors import ConfigError, CorruptArtifact
from pipeline.report.manifest import answer_file, tier_key
from pipeline.types import Json

ANYWHERE = ("params", "flops", "weight_bytes")
"""Metrics that mean the same on every device; memory is for its batch."""


def select(manifest: Json, limits: Mapping[str, float], device: str | None = None) -> Json | None:
    """The most accurate tier (architecture split; on a tie the one with fewer parameters) whose *measured*
    values keep all `limits`, metric → upper limit in the metric's unit; None where no tier does.

    Raises ConfigError for a limit that nothing was measured for, a device that is not in the run, and a limit
    of a device's own metric where the run has several devices and none is named."""
    tiers = _on_device(manifest["tiers"], device)
    for metric, limit in limits.items():
        _check_limit(metric, limit, tiers)
    devices = sorted({str(tier["device"]) for tier in tiers})
    own = sorted(set(limits) - set(ANYWHERE))
    if own and len(devices) > 1:
        raise ConfigError(
            f"{' and '.join(own)} means another thing on each device: say which with --device, one of "
            f"{', '.join(devices)}"
        )
    fitting = [tier for tier in tiers if keeps(tier["measured"], limits)]
    return max(fitting, key=lambda tier: (tier["accuracy"]["architecture"], -tier["params"]), default=None)


def whole_answer(root: Path, tier: Json) -> Path:
    """A tier's file in the run's folder. Raises CorruptArtifact where it is not the one that was measured."""
    file = answer_file(tier)
    path = inside(root, file["path"])
    if not path.is_file() or sha256_file(path) != file["sha256"]:
        raise CorruptArtifact(
            f"{path}: is not the file that the manifest tells of, as while the run is made again; see "
            f"`budgetline verify {root}`"
        )
    return root / str(file["path"])


def keeps(measured: Mapping[str, float], limits: Mapping[str, float]) -> bool:
    """Whether every limited metric was measured and is within its limit."""
    return all(measured.get(metric, math.inf) <= limit for metric, limit in limits.items())


def nearest(manifest: Json, metric: str, device: str | None = None) -> Json:
    """The tier that is cheapest in `metric`: what to tell a person whose limit nothing keeps."""
    tiers = [tier for tier in _on_device(manifest["tiers"], device) if metric in tier["measured"]]
    return min(tiers, key=lambda tier: (tier["measured"][metric], tier_key(tier)))


def _on_device(tiers: Sequence[Json], device: str | None) -> list[Json]:
    found = [tier for tier in tiers if device in (None, tier["device"])]
    if not found:
        there = ", ".join(sorted({tier["device"] for tier in tiers}))
        raise ConfigError(f"no tier for device {device!r} in this run; it has tiers for: {there}")
    return found


def _check_limit(metric: str, limit: float, tiers: Sequence[Json]) -> None:
    measured = sorted({name for tier in tiers for name in tier["measured"]})
    if metric not in measured:
        raise ConfigError(
            f"nothing was measured for limit '{metric}'; this run measured: {', '.join(measured)}"
        )
    if not limit > 0 or math.isinf(limit):
        raise ConfigError(f"limit '{metric}' is {limit:g}: must be a finite number above zero")
