"""Cells of the NAS-Bench-201 table that judge proxies: which ones, what they are worth, their scores."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.nb201_whole import WholeCellSpace
from pipeline.artifacts import FileCheckpoint, read_arrays
from pipeline.errors import ConfigError
from pipeline.evaluators.correlation import spearman
from pipeline.evaluators.scores import ScoreEvaluator
from pipeline.spaces.nb201 import NAME, NB201Settings, NB201Space, live_edges
from pipeline.types import Arch, FloatArray, IntArray, Progress

PILOT_SEED, PILOT_CELLS = 20221017, 60
"""These cells chose the default settings of `eproxy`, so they cannot judge them."""
SAMPLE_SEED = 1
LOT = 32
TRUTH, CLASS = "test_acc_200ep", "unique_id"
BEST_SHARE = 0.1


@dataclass(frozen=True)
class CellTable:
    """R rows: `ops_RS` the operations on the six edges, `columns` the numbers, `usable` the rows of
    connected cells with a known accuracy that are neither the pilot's nor isomorphic to one of those."""

    ops_RS: IntArray
    columns: dict[str, NDArray[Any]]
    usable: IntArray

    @property
    def truth_R(self) -> FloatArray:
        return np.asarray(self.columns[TRUTH], dtype=float)

    def archs(self, rows: IntArray) -> list[Arch]:
        return [Arch(NAME, tuple(ops)) for ops in self.ops_RS[rows].tolist()]

    def draw(self, count: int, *seed: int, without: IntArray | None = None) -> IntArray:
        """So many different usable rows at random, none of `without` and none isomorphic to one of them.
        Raises ConfigError for too many."""
        rows = self.usable
        if without is not None:
            rows = np.setdiff1d(rows, alike(self.columns, without))
        if count > len(rows):
            raise ConfigError(f"{count} cells were asked for; the table has {len(rows)} to draw from")
        return np.random.default_rng(seed).choice(rows, count, replace=False)


def alike(columns: dict[str, NDArray[Any]], rows: IntArray) -> IntArray:
    """All rows of the same isomorphism classes."""
    classes_R = columns[CLASS]
    return np.flatnonzero(np.isin(classes_R, classes_R[rows]))


def load_cells(path: Path) -> CellTable:
    """Raises RunFolderError or CorruptArtifact where the table cannot be read, ConfigError for a missing
    column."""
    columns = read_arrays(path)
    missing = [name for name in ("ops", CLASS, TRUTH) if name not in columns]
    if missing:
        raise ConfigError(f"{path}: no column '{missing[0]}'; there are: {', '.join(sorted(columns))}")
    return cells_of(columns)


def cells_of(columns: dict[str, NDArray[Any]]) -> CellTable:
    ops_RS = columns["ops"].astype(np.int64)
    connected_R = np.array([any(live_edges(tuple(ops))) for ops in ops_RS.tolist()])
    connected = np.flatnonzero(connected_R)
    pilot = np.random.default_rng(PILOT_SEED).choice(
        connected, min(PILOT_CELLS, len(connected)), replace=False
    )
    known = np.flatnonzero(connected_R & np.isfinite(columns[TRUTH]))
    return CellTable(ops_RS, columns, np.setdiff1d(known, alike(columns, pilot)))


def space_of(
    image_shape: tuple[int, int, int], num_classes: int, cells: int, whole: bool = False
) -> NB201Space:
    """16 channels as in the table; `cells` per stage, 5 in the table; `whole` with dead edges, as
    there."""
    make = WholeCellSpace if whole else NB201Space
    return make(image_shape, num_classes, NB201Settings(cells=cells, channels=16))


@dataclass(frozen=True)
class Scored:
    """Losses of the asked-for architectures, and how long a candidate took."""

    loss_N: FloatArray
    seconds_per_candidate: float
    failed: int


def score_kept(
    evaluator: ScoreEvaluator, archs: Sequence[Arch], path: Path, progress: Progress, label: str
) -> Scored:
    """Score in lots; what is scored is kept in `path` and not scored again. Raises StaleArtifact where
    the file holds scores of other settings."""
    checkpoint = FileCheckpoint(path)
    loaded = checkpoint.load()
    seconds = 0.0
    if loaded is not None:
        evaluator.load_state(loaded[0])
        seconds = float(loaded[1]["seconds"])
    waiting = evaluator.unknown(archs)
    with progress.track(label, len(waiting)) as advance:
        for start in range(0, len(waiting), LOT):
            lot = waiting[start : start + LOT]
            started = time.perf_counter()
            evaluator.losses(lot)
            seconds += time.perf_counter() - started
            checkpoint.save(evaluator.state(), {"seconds": seconds})
            advance(len(lot), "")
    count = len(evaluator.state()["losses"])
    return Scored(evaluator.losses(archs)[:, 0], seconds / max(1, count), evaluator.failed)


def rank_quality(loss_N: FloatArray, truth_N: FloatArray) -> dict[str, float]:
    """Spearman's ρ with the truth over all cells, and over the tenth that is truly best."""
    best = truth_N >= np.quantile(truth_N, 1 - BEST_SHARE)
    return {"rho": spearman(loss_N, truth_N), "rho_best_tenth": spearman(loss_N[best], truth_N[best])}


def best_found(loss_N: FloatArray, truth_N: FloatArray, count: int, rng: np.random.Generator) -> float:
    """Mean truth of the best-scored among `count` random cells, over 200 draws."""
    count = min(count, len(loss_N))
    found = []
    for _ in range(200):
        looked_at = rng.permutation(len(loss_N))[:count]
        found.append(truth_N[looked_at[np.argmin(loss_N[looked_at])]])
    return float(np.mean(found))
