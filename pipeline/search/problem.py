"""What a search is given: tiers, what architectures cost, and an evaluator that says how good they are.

A search sees hardware only as cost tables and learning only as an evaluator. Axes: K tiers, N architectures,
S slots, M metrics.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from pipeline.algorithms import evolution
from pipeline.errors import ConfigError
from pipeline.ranks import ALONE, Ranks
from pipeline.types import (
    Arch,
    Candidate,
    ChoiceSpace,
    CostTable,
    Evaluator,
    FloatArray,
    IntArray,
    RowCosts,
    RowSpace,
    Tier,
)

# First word of the seed of every random stream: [seed, stage, iteration]. Nothing random is kept between
# iterations, so a resumed search draws what the uninterrupted one would have drawn.
STAGE_POOL, STAGE_WARM_UP, STAGE_ASK, STAGE_TELL = range(4)

MOST_KNOWN = 200_000
"""Rows of choices."""


@dataclass(frozen=True)
class SearchProblem:
    """One search: K tiers, possibly of several devices, over one space and one evaluator.

    `costs` maps a device's name to its table; every tier's limits are absolute. `evaluations` limits how many
    architectures' losses are asked for. `warm_up` optimiser steps come before the first loss, and every
    step trains `fit_samples` architectures; both count only for an evaluator that trains. With
    `train_in_search` every iteration trains once more, on its own samples; without it the evaluator is
    frozen after the warm-up and asked on the same images every time. A checkpoint is written at the end of
    an iteration when the last one is `save_every_s` old. `made_from` are hashes of what costs and evaluator
    came from: a checkpoint of a search over others is refused. `earlier` is what another search of the same
    space looked at, for methods that can begin with it. `ranks` search together: each comes to the
    same decisions, which is checked."""

    space: ChoiceSpace
    costs: Mapping[str, CostTable]
    tiers: tuple[Tier, ...]
    evaluator: Evaluator
    evaluations: int
    warm_up: int = 0
    fit_samples: int = 2
    train_in_search: bool = True
    seed: int = 0
    save_every_s: float = 20.0
    made_from: Mapping[str, str] = field(default_factory=dict)
    earlier: tuple[Candidate, ...] = ()
    ranks: Ranks = ALONE
    _largest: dict[tuple[str, str], float] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if not self.tiers:
            raise ConfigError("a search needs at least one tier; none came")
        for name, least in (("evaluations", 1), ("warm_up", 0), ("fit_samples", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"search: {name} must be at least {least}, got {getattr(self, name)}")
        for tier in self.tiers:
            self._check(tier)

    def _check(self, tier: Tier) -> None:
        if tier.device not in self.costs:
            raise ConfigError(
                f"tier {tier.key}: no cost table for device '{tier.device}'; "
                f"there are: {', '.join(sorted(self.costs))}"
            )
        if not tier.limits:
            raise ConfigError(f"tier {tier.key}: has no limit; give it at least one budget")
        known = self.costs[tier.device].metrics
        for metric in tier.budgets:
            if metric not in known:
                raise ConfigError(
                    f"tier {tier.key}: unknown metric '{metric}'; there are: {', '.join(known)}"
                )

    @property
    def is_frozen(self) -> bool:
        """Whether the evaluator trains in the warm-up and not after it."""
        return self.evaluator.trains and not self.train_in_search

    @property
    def answers_are_fixed(self) -> bool:
        """Whether asking again gives the same answer."""
        return self.is_frozen or not (self.evaluator.trains or self.evaluator.noisy)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Number of choices per slot."""
        return tuple(len(slot.choices) for slot in self.space.slots)

    def archs(self, choices_NS: IntArray) -> list[Arch]:
        """Canonical architectures of rows of choices."""
        return [self.space.canonical(Arch(self.space.name, tuple(row))) for row in choices_NS.tolist()]

    def canonical(self, choices_NS: IntArray) -> IntArray:
        """Canonical rows of choices, shape (N, S)."""
        if isinstance(self.space, RowSpace):
            return self.space.canonical_rows(choices_NS)
        return self._known.of(choices_NS)[0]

    def usage_of(self, choices_NS: IntArray) -> FloatArray:
        """Share of each tier's budget that an architecture takes, the largest over the tier's limits, shape
        (N, K). At most 1 where the budget is kept."""
        costs = self._quick_costs(choices_NS)
        return self._known.of(choices_NS)[1] if costs is None else self._usage(costs)

    def usage_in(self, choices_NS: IntArray, tier_N: IntArray) -> FloatArray:
        """`usage_of` every architecture in its own tier alone, shape (N,)."""
        costs = self._quick_costs(choices_NS)
        if costs is None:
            return self._known.of(choices_NS)[1][np.arange(len(tier_N)), tier_N]
        usage_N = np.empty(len(tier_N))
        for k, (device, columns, limits) in enumerate(self._limits):
            own_N = np.flatnonzero(tier_N == k)
            usage_N[own_N] = _share(costs[device][own_N], columns, limits)
        return usage_N

    def usage(self, archs: Sequence[Arch]) -> FloatArray:
        """`usage_of` for architectures. Raises ConfigError for one of another space."""
        rows = [self.space.canonical(arch).choices for arch in archs]
        return self.usage_of(np.array(rows, dtype=np.int64).reshape(len(rows), len(self.sizes)))

    @cached_property
    def _known(self) -> _Known:
        return _Known(len(self.sizes), len(self.tiers), self._work_out)

    @cached_property
    def _tables(self) -> dict[str, CostTable]:
        """Of the devices that tiers are for."""
        return {tier.device: self.costs[tier.device] for tier in self.tiers}

    @cached_property
    def _row_tables(self) -> dict[str, RowCosts] | None:
        """The same, where all of them are quick by rows."""
        rows: dict[str, RowCosts] = {
            device: table
            for device, table in self._tables.items()
            if isinstance(table, RowCosts) and table.quick_by_rows
        }
        return rows if len(rows) == len(self._tables) else None

    def _quick_costs(self, choices_NS: IntArray) -> dict[str, FloatArray] | None:
        """By every device's table, shape (N, M), where space and tables are quick by rows."""
        if not isinstance(self.space, RowSpace) or self._row_tables is None:
            return None
        rows_NS = self.space.canonical_rows(choices_NS)
        return {device: table.of_rows(rows_NS) for device, table in self._row_tables.items()}

    @cached_property
    def _limits(self) -> list[tuple[str, list[int], list[float]]]:
        """Per tier its device, and the columns of the device's table that are limited, and to what."""
        columns_of = {device: table.metrics.index for device, table in self.costs.items()}
        return [
            (tier.device, list(map(columns_of[tier.device], tier.budgets)), list(tier.budgets.values()))
            for tier in self.tiers
        ]

    def _work_out(self, choices_NS: IntArray) -> tuple[IntArray, FloatArray]:
        """Canonical rows and their usage; every device's table is asked once, for all of its tiers."""
        archs = self.archs(choices_NS)
        rows_NS = np.array([arch.choices for arch in archs], dtype=np.int64)
        return rows_NS, self._usage({device: table.of(archs) for device, table in self._tables.items()})

    def _usage(self, costs: Mapping[str, FloatArray]) -> FloatArray:
        """Shape (N, K), by every device's costs, shape (N, M)."""
        usage_KN = [_share(costs[device], columns, limits) for device, columns, limits in self._limits]
        return np.stack(usage_KN, axis=1)

    def _cost(self, device: str, metric: str, archs: Sequence[Arch]) -> FloatArray:
        table = self.costs[device]
        return np.asarray(table.of(archs)[:, table.metrics.index(metric)], dtype=float)

    def reference_costs(self, archs: Sequence[Arch]) -> FloatArray:
        """R(a)/R_max per tier, shape (N, K): R is the tier's first limited metric, R_max its largest in the
        space.

        Where costs are not additive, R_max is the largest of 2,000 random architectures and the
        space's largest one."""
        columns = []
        for tier in self.tiers:
            metric = tier.limits[0].metric
            cost_N = self._cost(tier.device, metric, archs)
            columns.append(cost_N / self._largest_cost(tier.device, metric))
        return np.stack(columns, axis=1)

    def _largest_cost(self, device: str, metric: str) -> float:
        if (device, metric) not in self._largest:
            self._largest[device, metric] = self._find_largest_cost(device, metric)
        return self._largest[device, metric]

    def _find_largest_cost(self, device: str, metric: str) -> float:
        table = self.costs[device]
        if table.additive is not None:
            return float(np.nanmax(table.additive[table.metrics.index(metric)], axis=1).sum())
        rng = np.random.default_rng([self.seed, STAGE_POOL, 1])
        archs = self.archs(evolution.random_choices(self.sizes, 2_000, rng))
        largest = getattr(self.space, "largest", None)  # of a table nobody says which that is
        archs += [largest] if largest is not None else []
        return float(self._cost(device, metric, archs).max())


def _share(costs_NM: FloatArray, columns: Sequence[int], limits: Sequence[float]) -> FloatArray:
    """Of the limits, the largest over them, shape (N,)."""
    first, *others = zip(columns, limits, strict=True)
    share_N = costs_NM[:, first[0]] / first[1]
    for column, limit in others:
        np.maximum(share_N, costs_NM[:, column] / limit, out=share_N)
    return share_N


class _Known:
    """Canonical form and usage of rows of choices, worked out once a row; when there are more than
    `MOST_KNOWN`, all are forgotten."""

    def __init__(
        self,
        num_slots: int,
        num_tiers: int,
        work_out: Callable[[IntArray], tuple[IntArray, FloatArray]],
    ) -> None:
        self._work_out = work_out
        self._place: dict[bytes, int] = {}
        self._canonical_US = np.empty((0, num_slots), dtype=np.int64)
        self._usage_UK = np.empty((0, num_tiers))

    def of(self, choices_NS: IntArray) -> tuple[IntArray, FloatArray]:
        rows_NS = np.ascontiguousarray(choices_NS, dtype=np.int64)
        written, width = rows_NS.tobytes(), rows_NS.itemsize * rows_NS.shape[1]
        keys = [written[start : start + width] for start in range(0, len(written), width)]
        unknown = {key: n for n, key in enumerate(keys) if key not in self._place}
        if unknown:
            if len(self._place) > MOST_KNOWN:
                self._place.clear()
                unknown = {key: n for n, key in enumerate(keys)}
            self._learn(unknown, rows_NS)
        places_N = np.array([self._place[key] for key in keys], dtype=np.int64)
        return self._canonical_US[places_N], self._usage_UK[places_N]

    def _learn(self, unknown: Mapping[bytes, int], rows_NS: IntArray) -> None:
        canonical_NS, usage_NK = self._work_out(rows_NS[list(unknown.values())])
        first = len(self._place)
        end = first + len(unknown)
        if end > len(self._canonical_US):
            self._canonical_US = np.resize(self._canonical_US, (2 * end, self._canonical_US.shape[1]))
            self._usage_UK = np.resize(self._usage_UK, (2 * end, self._usage_UK.shape[1]))
        self._canonical_US[first:end], self._usage_UK[first:end] = canonical_NS, usage_NK
        self._place.update(zip(unknown, range(first, end), strict=True))
