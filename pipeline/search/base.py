"""What a search is given, what a method is, and the one loop that drives every method that samples.

A method sees hardware only as cost tables and learning only as an evaluator. Samplers are `init / ask /
tell` on an explicit state, a NamedTuple of arrays; `drive` adds the rest: warm-up, training, counting,
candidates, trace, checkpoints. Axes: K tiers, N architectures, S slots, C choices, M metrics.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.random import Generator

from pipeline.algorithms import evolution
from pipeline.algorithms.walk import in_band, walk_into_band
from pipeline.artifacts import sha256_arrays, sha256_json
from pipeline.errors import ConfigError, DivergedTraining, InfeasibleBudget, StaleArtifact
from pipeline.ranks import ALONE, Ranks
from pipeline.settings import Settings
from pipeline.types import (
    Arch,
    Arrays,
    Candidate,
    Checkpoint,
    ChoiceSpace,
    CostTable,
    Evaluator,
    FloatArray,
    IntArray,
    Json,
    Progress,
    RowCosts,
    RowSpace,
    SearchResult,
    Tier,
)

# First word of the seed of every random stream: [seed, stage, iteration]. Nothing random is kept between
# iterations, so a resumed search draws what the uninterrupted one would have drawn.
STAGE_POOL, STAGE_WARM_UP, STAGE_ASK, STAGE_TELL = range(4)

MOST_KNOWN = 200_000
"""Rows of choices."""

IDLE_LIMIT = 50
"""Iterations in a row without an unknown architecture after which a search on fixed answers has converged."""


# -------------------------------------------------------------------------------------------------- problem


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
        if isinstance(self.space, RowSpace) and self._row_tables is not None:
            rows_NS = self.space.canonical_rows(choices_NS)
            return self._usage({device: table.of_rows(rows_NS) for device, table in self._row_tables.items()})
        return self._known.of(choices_NS)[1]

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
        usage_KN = [
            (costs[device][:, columns] / limits).max(axis=1) for device, columns, limits in self._limits
        ]
        return np.stack(usage_KN, axis=1)

    def _cost(self, device: str, metric: str, archs: Sequence[Arch]) -> FloatArray:
        table = self.costs[device]
        return np.asarray(table.of(archs)[:, table.metrics.index(metric)], dtype=float)

    def reference_costs(self, archs: Sequence[Arch]) -> FloatArray:
        """R(a)/R_max per tier, shape (N, K): R is the tier's first limited metric, R_max its largest in the
        space.

        Where costs are not additive, R_max is the largest of 2,000 random architectures."""
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
        return float(self._cost(device, metric, archs).max())


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


# ---------------------------------------------------------------------------------------------------- bands


class BandSampler:
    """Draws architectures of each tier's cost band: those that take `low` to 1 of its budget.

    Members come from a pool of at most `pool_size` random architectures, the whole space if it is not
    larger. A tier with fewer than `least` members there gets more by a random walk from the nearest of the
    pool, and if that is not enough, a wider band (`low` falls). Deterministic in the problem's seed. Raises
    InfeasibleBudget when no member is found that keeps a tier's budget."""

    def __init__(
        self, problem: SearchProblem, low: float = 0.85, pool_size: int = 20_000, least: int = 32
    ) -> None:
        self._problem = problem
        self._rng = np.random.default_rng([problem.seed, STAGE_POOL, 0])
        pool_NS = self._pool(pool_size)
        usage_NK = problem.usage_of(pool_NS)
        self.members_KNS = [
            self._members(k, pool_NS, usage_NK[:, k], low, least) for k in range(len(problem.tiers))
        ]

    def draw(self, num_per_tier: int, rng: Generator) -> IntArray:
        """`num_per_tier` members of every band, shape (num_per_tier · K, S), the tiers taking turns."""
        drawn = [
            members_NS[rng.integers(len(members_NS), size=num_per_tier)] for members_NS in self.members_KNS
        ]
        return np.stack(drawn, axis=1).reshape(-1, len(self._problem.sizes))

    def draw_of(self, tiers_N: Sequence[int], rng: Generator) -> IntArray:
        """One member of the band of every tier listed, shape (N, S)."""
        return np.stack([self.members_KNS[k][rng.integers(len(self.members_KNS[k]))] for k in tiers_N])

    def _pool(self, pool_size: int) -> IntArray:
        sizes = self._problem.sizes
        if math.prod(sizes) <= pool_size:
            rows_NS = np.asarray(np.indices(sizes).reshape(len(sizes), -1).T, dtype=np.int64)
        else:
            rows_NS = evolution.random_choices(sizes, pool_size, self._rng)
        return self._distinct(rows_NS)

    def _distinct(self, rows_NS: IntArray) -> IntArray:
        rows_NS = self._problem.canonical(rows_NS)
        return rows_NS[np.sort(evolution.first_of_each(rows_NS))]

    def _members(self, k: int, pool_NS: IntArray, usage_N: FloatArray, low: float, least: int) -> IntArray:
        enough = min(least, max(1, len(pool_NS) // 10))
        if in_band(usage_N, low).sum() < enough:

            def look(rows_NS: IntArray) -> tuple[IntArray, FloatArray]:
                return self._problem.canonical(rows_NS), self._problem.usage_of(rows_NS)[:, k]

            pool_NS, usage_N = walk_into_band(
                pool_NS, usage_N, look, low=low, enough=enough, sizes=self._problem.sizes, rng=self._rng
            )
        while in_band(usage_N, low).sum() < enough and low > 0.01:
            low *= 0.8
        members_NS = pool_NS[in_band(usage_N, low if low > 0.01 else 0.0)]
        if not len(members_NS):
            raise InfeasibleBudget(
                f"tier {self._problem.tiers[k].key}: no architecture found that keeps its budget; "
                f"the nearest takes {usage_N.min():.3g} times as much: raise the budget by that factor"
            )
        return np.asarray(members_NS)


# -------------------------------------------------------------------------------------------------- methods


RELAXED = "relaxed"
"""What a method needs, and an evaluator offers, that is a `RelaxedEvaluator` as well."""


class SearchMethod(NamedTuple):
    """An entry of the catalogue.

    `run(problem, config, *, checkpoint, trace, progress)` returns a SearchResult; `trace` takes one JSON
    record per iteration. `needs` names what the evaluator must offer beyond the Evaluator protocol.
    `suggests(config)` gives what a run gets where it states nothing else: the name of an `evaluator`,
    settings of the `space`, as far as it has them, and `evaluations` of each tier. One that `warm_starts`
    begins with what an earlier search liked."""

    config: type[Settings]
    run: Run
    needs: frozenset[str] = frozenset()
    suggests: Callable[[Any], Json] = lambda config: {}
    warm_starts: bool = False


class Run(Protocol):
    """Search. Raises DivergedTraining, InfeasibleBudget, ConfigError, StaleArtifact."""

    def __call__(
        self,
        problem: SearchProblem,
        config: Any,
        *,
        checkpoint: Checkpoint,
        trace: Callable[[Json], None],
        progress: Progress,
    ) -> SearchResult: ...


State = TypeVar("State", bound=tuple[Any, ...])


class Sampler(NamedTuple, Generic[State]):
    """A method that asks for architectures and is told their losses. The state is a NamedTuple of arrays.

    `ask` returns rows of choices such that every beginning of them serves the tiers about equally (the last
    iteration may evaluate no more than that). `tell` and `watch` get those rows, their losses (N,), and
    their usage (N, K); `watch` says what of the state and this iteration is worth tracing, in a record per
    tier. `theta_KSC` shows the state's distributions."""

    init: Callable[[], State]
    ask: Callable[[State, Generator], IntArray]
    tell: Callable[[State, IntArray, FloatArray, FloatArray, Generator], State]
    watch: Callable[[State, IntArray, FloatArray, FloatArray], list[Json]] | None = None
    theta_KSC: Callable[[State], FloatArray] | None = None


def drive(
    method: str,
    problem: SearchProblem,
    config: Settings,
    sampler: Sampler[State],
    *,
    checkpoint: Checkpoint,
    trace: Callable[[Json], None],
    progress: Progress,
    bands: BandSampler | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> SearchResult:
    """Run a sampler to the problem's evaluation limit, from the checkpoint if there is one.

    An iteration asks for architectures, takes one optimiser step on `fit_samples` of them if the evaluator
    trains in the search, evaluates, and tells. Architectures are made canonical; one that is asked for
    twice in an iteration is computed, and counted, once. Where answers are fixed, one that is already known
    is used again and not counted, and the search ends early once nothing unknown is asked for. When fewer
    evaluations are left than an iteration asks for, the first of them are made and the sampler is told no
    more.

    The trace gets one record per iteration; `iteration` counts all optimiser steps from 0, the warm-up's
    included. A checkpoint's record holds `iteration`, the number finished: before resuming, the caller
    drops trace records from there on, and nothing before it is emitted again. The result is the same, bit
    for bit, as an uninterrupted one's (but for `seconds`). Several ranks must be given the same checkpoint,
    of which only one may write. Raises DivergedTraining at a loss that is not finite, and RanksDisagree
    after an iteration that was not the same on all ranks; the last checkpoint stays."""
    run = _Search(method, problem, config, sampler, checkpoint, clock)
    run.resume()
    run.agree([])
    if problem.evaluator.trains:
        bands = bands or BandSampler(problem)
        with progress.track("warm-up", problem.warm_up, min(run.iteration, problem.warm_up)) as advance:
            while run.iteration < problem.warm_up:
                trace(run.warm_up(bands))
                advance(1, "")
                run.save_if_due()
    with progress.track("search", problem.evaluations, run.evaluations) as advance:
        while run.evaluations < problem.evaluations and run.idle < IDLE_LIMIT:
            before = run.evaluations
            trace(run.iterate())
            advance(run.evaluations - before, "")
            run.save_if_due()
    run.save()
    return run.result()


def in_bands(method: str, sampler: Callable[[SearchProblem, Any, BandSampler], Sampler[Any]]) -> Run:
    """The `run` of a method whose sampler, made from (problem, config, bands), begins in the tiers' bands. It
    raises InfeasibleBudget, and what `drive` does."""

    def run(
        problem: SearchProblem,
        config: Any,
        *,
        checkpoint: Checkpoint,
        trace: Callable[[Json], None],
        progress: Progress,
    ) -> SearchResult:
        bands = BandSampler(problem)
        return drive(
            method,
            problem,
            config,
            sampler(problem, config, bands),
            checkpoint=checkpoint,
            trace=trace,
            progress=progress,
            bands=bands,
        )

    return run


class _Search(Generic[State]):
    """The moving parts of one driven search; all of it that must survive is in `save`."""

    def __init__(
        self,
        method: str,
        problem: SearchProblem,
        config: Settings,
        sampler: Sampler[State],
        checkpoint: Checkpoint,
        clock: Callable[[], float],
    ) -> None:
        self.method, self.problem, self.sampler = method, problem, sampler
        self.checkpoint, self.clock = checkpoint, clock
        self.inputs = sha256_json(
            [method, config.model_dump(mode="json"), problem.seed, problem.sizes]
            + [problem.evaluations, problem.warm_up, problem.fit_samples, problem.train_in_search]
            + [tier.to_json() for tier in problem.tiers]
            + [dict(problem.made_from), [[c.arch.choices, c.loss] for c in problem.earlier]]
        )
        self.state: State = sampler.init()
        self.candidates: dict[Arch, Candidate] = {}
        self.iteration = self.evaluations = self.idle = 0
        self.seconds_before, self.started = 0.0, clock()
        self.saved = self.started

    def rng(self, stage: int) -> Generator:
        return np.random.default_rng([self.problem.seed, stage, self.iteration])

    @property
    def seconds(self) -> float:
        return self.seconds_before + self.clock() - self.started

    # ---------------------------------------------------------------------------------------- one iteration

    def warm_up(self, bands: BandSampler) -> Json:
        num = self.problem.fit_samples
        tiers_N = (self.iteration * num + np.arange(num)) % len(self.problem.tiers)
        archs = self.problem.archs(bands.draw_of(tiers_N.tolist(), self.rng(STAGE_WARM_UP)))
        record: Json = {"iteration": self.iteration, "stage": "warm_up", "fit_loss": self._fit(archs)}
        self.iteration += 1
        self.agree(archs)
        return record

    def iterate(self) -> Json:
        choices_NS = self.sampler.ask(self.state, self.rng(STAGE_ASK))
        archs = self.problem.archs(choices_NS)
        record: Json = {"iteration": self.iteration, "stage": "search"}
        if self.problem.evaluator.trains and self.problem.train_in_search:
            record["fit_loss"] = self._fit(archs[: self.problem.fit_samples])
        known = self._evaluate(archs)
        record["evaluations"] = self.evaluations
        if len(known) == len(archs):
            losses_N, usage_NK = np.array(known), self.problem.usage_of(choices_NS)
            if self.sampler.watch is not None:
                record["tiers"] = self._watched(choices_NS, losses_N, usage_NK)
            self.state = self.sampler.tell(self.state, choices_NS, losses_N, usage_NK, self.rng(STAGE_TELL))
        self.iteration += 1
        self.agree(archs)
        return record

    def agree(self, samples: Sequence[Arch]) -> None:
        """All that was decided so far is the same on all ranks. Raises RanksDisagree."""
        if self.problem.ranks.size == 1:
            return
        losses = [candidate.loss for candidate in self.candidates.values()]
        digests = {
            "search": self.inputs,
            "samples": sha256_json([arch.choices for arch in samples]),
            "losses": sha256_arrays({"losses": np.array(losses, dtype=float)}),
            "distributions": sha256_arrays(self.state._asdict()),  # type: ignore[attr-defined]
            "progress": sha256_json([self.iteration, self.evaluations, self.idle]),
        }
        self.problem.ranks.agree(f"search step {self.iteration}", digests)

    def _watched(self, choices_NS: IntArray, losses_N: FloatArray, usage_NK: FloatArray) -> list[Json]:
        assert self.sampler.watch is not None
        own = zip(
            self.sampler.watch(self.state, choices_NS, losses_N, usage_NK), self.problem.tiers, strict=True
        )
        return [{"tier": tier.key, **record} for record, tier in own]

    def _fit(self, archs: Sequence[Arch]) -> float:
        info = self.problem.evaluator.fit(archs, step=self.iteration)
        if not math.isfinite(info.loss):
            raise self._diverged("training loss", info.loss, archs)
        return info.loss

    def _evaluate(self, archs: Sequence[Arch]) -> list[float]:
        """Losses of the architectures, or of the first of them when evaluations run out; candidates are
        kept."""
        evaluator = self.problem.evaluator
        fixed = self.problem.answers_are_fixed
        new = [arch for arch in dict.fromkeys(archs) if not (fixed and arch in self.candidates)]
        new = new[: self.problem.evaluations - self.evaluations]
        losses = {arch: self.candidates[arch].loss for arch in archs if fixed and arch in self.candidates}
        if new:
            losses |= dict(
                zip(
                    new,
                    evaluator.losses(new, step=self._evaluation_step)[:, 0].astype(float).tolist(),
                    strict=True,
                )
            )
        for arch in new:
            if not math.isfinite(losses[arch]):
                raise self._diverged("loss", losses[arch], [arch])
            seen = self.candidates[arch].evaluations if arch in self.candidates else 0
            self.candidates[arch] = Candidate(arch, losses[arch], seen + 1)
        self.evaluations += len(new)
        self.idle = 0 if new else self.idle + 1
        return [losses[arch] for arch in archs] if all(arch in losses for arch in archs) else []

    @property
    def _evaluation_step(self) -> int:
        """A frozen supernet is asked on the same images every time."""
        return self.problem.warm_up if self.problem.is_frozen else self.iteration

    def _diverged(self, what: str, value: float, archs: Sequence[Arch]) -> DivergedTraining:
        names = ", ".join(f"{arch.space}{list(arch.choices)}" for arch in archs)
        return DivergedTraining(
            f"search step {self.iteration}: {what} of {names} is {value}; the last checkpoint is kept: "
            "lower the learning rate, or look for broken images"
        )

    # ------------------------------------------------------------------------------------------ checkpoints

    def save_if_due(self) -> None:
        if self.clock() - self.saved >= self.problem.save_every_s:
            self.save()

    def save(self) -> None:
        kept = list(self.candidates.values())
        rows = [candidate.arch.choices for candidate in kept]
        arrays: Arrays = {
            "candidates.choices": np.array(rows, dtype=np.int64).reshape(len(rows), len(self.problem.sizes)),
            "candidates.loss": np.array([candidate.loss for candidate in kept], dtype=float),
            "candidates.evaluations": np.array([candidate.evaluations for candidate in kept], dtype=np.int64),
        }
        arrays |= {f"sampler.{name}": value for name, value in self.state._asdict().items()}  # type: ignore[attr-defined]
        arrays |= {f"evaluator.{name}": value for name, value in self.problem.evaluator.state().items()}
        record: Json = {
            name: getattr(self, name) for name in ("method", "inputs", "iteration", "evaluations", "idle")
        }
        self.checkpoint.save(arrays, {**record, "seconds": self.seconds})
        self.saved = self.clock()

    def resume(self) -> None:
        loaded = self.checkpoint.load()
        if loaded is None:
            return
        arrays, record = loaded
        if record.get("inputs") != self.inputs:
            raise StaleArtifact(
                f"search: the checkpoint is of another search ({record.get('method')}) than "
                f"{self.method} with these settings, tiers and seed; remove it, or choose another --out"
            )
        self.state = type(self.state)(**_under("sampler.", arrays))
        self.problem.evaluator.load_state(_under("evaluator.", arrays))
        columns = (arrays[f"candidates.{name}"].tolist() for name in ("choices", "loss", "evaluations"))
        for row, loss, count in zip(*columns, strict=True):
            arch = Arch(self.problem.space.name, tuple(row))
            self.candidates[arch] = Candidate(arch, loss, count)
        self.iteration, self.evaluations = int(record["iteration"]), int(record["evaluations"])
        self.idle, self.seconds_before = int(record["idle"]), float(record["seconds"])

    def result(self) -> SearchResult:
        return SearchResult(
            method=self.method,
            seed=self.problem.seed,
            evaluations=self.evaluations,
            seconds=self.seconds,
            candidates=tuple(self.candidates.values()),
            theta_KSC=None if self.sampler.theta_KSC is None else self.sampler.theta_KSC(self.state),
        )


def _under(prefix: str, arrays: Arrays) -> Arrays:
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}
