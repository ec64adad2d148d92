"""Losses and costs from a table of measured architectures: a search that takes milliseconds, with a known
answer.

Axes: R rows of the table, S slots, N architectures, J objectives, M metrics.
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.artifacts import read_arrays
from pipeline.errors import ConfigError
from pipeline.types import Arch, Arrays, FitInfo, FloatArray, IntArray, Slot


class TableSpace:
    """A space whose slots are the columns of a table; every architecture stands for itself."""

    def __init__(self, name: str, slots: Sequence[Slot]) -> None:
        self.name = name
        self.slots = tuple(slots)
        self._sizes = tuple(len(slot.choices) for slot in self.slots)

    def canonical(self, arch: Arch) -> Arch:
        choices, sizes = arch.choices, self._sizes
        within = len(choices) == len(sizes) and min(choices) >= 0 and all(map(operator.lt, choices, sizes))
        if arch.space != self.name or not within:
            raise ConfigError(
                f"{arch.space}{list(arch.choices)} is no architecture of space '{self.name}' "
                f"with {list(self._sizes)} choices per slot"
            )
        return arch


class _Rows:
    """Finds an architecture's row."""

    def __init__(self, choices_RS: IntArray) -> None:
        self._row = {tuple(choices): row for row, choices in enumerate(choices_RS.tolist())}

    def of(self, archs: Sequence[Arch]) -> IntArray:
        try:
            return np.array([self._row[arch.choices] for arch in archs], dtype=np.int64)
        except KeyError as missing:
            raise ConfigError(f"the table has no row for the choices {list(missing.args[0])}") from None


class TabularEvaluator:
    """An Evaluator that looks losses up; `loss_RJ` has a row per row of `choices_RS`.

    With `noise_std`, column 0 gets fresh Gaussian noise at every step, as a minibatch would bring; a thorough
    answer is exact."""

    def __init__(
        self, choices_RS: IntArray, loss_RJ: FloatArray, noise_std: float = 0.0, seed: int = 0
    ) -> None:
        self._rows = _Rows(choices_RS)
        self._loss_RJ = loss_RJ.reshape(len(choices_RS), -1).astype(float)
        self._noise_std, self._seed = noise_std, seed

    def reseeded(self, seed: int) -> TabularEvaluator:
        """The same table with noise of its own."""
        other = copy.copy(self)
        other._seed = seed
        return other

    @property
    def noisy(self) -> bool:
        return self._noise_std > 0

    @property
    def trains(self) -> bool:
        return False

    def losses(self, archs: Sequence[Arch], *, step: int, thorough: bool = False) -> FloatArray:
        rows_N = self._rows.of(archs)
        loss_NJ = self._loss_RJ[rows_N].copy()
        if self.noisy and not thorough:
            noise_R = np.random.default_rng([self._seed, step]).normal(
                0.0, self._noise_std, len(self._loss_RJ)
            )
            loss_NJ[:, 0] += noise_R[rows_N]
        return loss_NJ

    def fit(self, archs: Sequence[Arch], *, step: int) -> FitInfo:
        """A table learns nothing; the loss it reports is the mean of what it knows."""
        return FitInfo(float(self._loss_RJ[self._rows.of(archs), 0].mean()))

    def state(self) -> Arrays:
        return {}

    def load_state(self, state: Arrays) -> None:
        pass


class TabularCosts:
    """A CostTable that looks costs up: metric name → one cost per row of `choices_RS`."""

    def __init__(self, choices_RS: IntArray, costs: Mapping[str, FloatArray]) -> None:
        self._rows = _Rows(choices_RS)
        self.metrics = tuple(costs)
        self._cost_RM = np.stack([np.asarray(column, dtype=float) for column in costs.values()], axis=1)

    def of(self, archs: Sequence[Arch]) -> FloatArray:
        return np.asarray(self._cost_RM[self._rows.of(archs)])

    @property
    def additive(self) -> None:
        """A table need not be additive, so it does not claim to be."""
        return None


class Benchmark(NamedTuple):
    """A table as a search problem: what to search, what to learn from, what it costs, and what it is really
    worth.

    `signal_R` and `truth_R` are higher-is-better, NaN where the row is not usable; the evaluator's loss is
    −signal."""

    space: TableSpace
    evaluator: TabularEvaluator
    costs: TabularCosts
    choices_RS: IntArray
    signal_R: FloatArray
    cost_R: FloatArray
    truth_R: FloatArray


def load_benchmark(
    path: Path,
    *,
    signal: str = "val_acc_12ep",
    truth: str = "test_acc_200ep",
    cost: str = "macs_M",
    noise_std: float = 0.0,
    seed: int = 0,
) -> Benchmark:
    """A table in a numpy archive: `ops` (R, S) with the choices, `op_names`, `edges`, and one column per
    number.

    Rows without a signal or truth, or that cost next to nothing (below 1 % of the median: networks whose
    output is disconnected), are unusable: they get the worst loss and the largest cost. Raises ConfigError
    for a column that is not there."""
    arrays = read_arrays(path)
    choices_RS = _column(arrays, "ops", path).astype(np.int64)
    names = tuple(str(name) for name in _column(arrays, "op_names", path))
    signal_R, truth_R, cost_R = (_column(arrays, name, path).astype(float) for name in (signal, truth, cost))
    usable_R = np.isfinite(signal_R) & np.isfinite(truth_R) & (cost_R > 0.01 * np.nanmedian(cost_R))
    signal_R, truth_R = np.where(usable_R, signal_R, np.nan), np.where(usable_R, truth_R, np.nan)
    cost_R = np.where(usable_R, cost_R, np.max(cost_R[usable_R]))
    loss_R = np.where(usable_R, -signal_R, -np.nanmin(signal_R))
    edges = arrays.get("edges", np.array([str(slot) for slot in range(choices_RS.shape[1])]))
    space = TableSpace(path.stem, [Slot(str(edge), names) for edge in edges])
    if math.prod(len(slot.choices) for slot in space.slots) != len(choices_RS):
        raise ConfigError(
            f"{path}: 'ops' must list every combination of 'op_names' once; it has {len(choices_RS)}"
        )
    return Benchmark(
        space,
        TabularEvaluator(choices_RS, loss_R, noise_std, seed),
        TabularCosts(choices_RS, {cost: cost_R}),
        choices_RS,
        signal_R,
        cost_R,
        truth_R,
    )


def _column(arrays: Arrays, name: str, path: Path) -> NDArray[Any]:
    if name not in arrays:
        raise ConfigError(f"{path}: no column '{name}'; there are: {', '.join(sorted(arrays))}")
    return arrays[name]
