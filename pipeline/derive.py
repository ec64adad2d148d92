"""From what a search has seen to one architecture per tier, whichever method ran.

A ranker proposes and the device disposes: members that should use nearly all of a tier's budget are
shortlisted by a quick look and timed on the device. Of those that do, the finalists are the best by the
ranker's most exact answer, some drawn at random, and the best uniform ones. Those that keep the budget in
the form that ships are trained briefly, and the most accurate one wins; or the best few are trained in full
first. The ranker is the search's evaluator, or, where operations were mixed, the distance to the tier's last
mixture.
How far its order can be trusted is told by the same numbers (`report/agreement.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
from numpy.random import Generator
from pydantic import Field, model_validator

from pipeline.algorithms.walk import in_band, walk_into_band
from pipeline.errors import BudgetMissed, InfeasibleBudget
from pipeline.settings import Epochs, Settings
from pipeline.types import (
    Arch,
    BoolArray,
    ChoiceSpace,
    FloatArray,
    IntArray,
    Json,
    LatencyRecord,
    Progress,
    Tier,
)
from pipeline.units import format_value


class DeriveSettings(Settings):
    """Members of a tier's band are predicted to use `low` of the tightest budget at least, and of a timed one
    `high` at most; what is counted is exact and may be used up. Up to `rescored` of them are shortlisted by a
    quick look and timed. When timed, `guard` of the budget must stay free, and networks that use less than
    `least` come last. The others are rescored thoroughly; the `best`, `uniform` and `random` ones become
    finalists, tried for `trial_epochs` (0: not at all). Trials start from the supernet's weights where the
    evaluator has them, or as `trial_start` says; from there half an epoch tells the best apart as well as a
    whole one from fresh weights, and is what they get by default. The `contenders` best of them are
    trained in full, as the tiers' networks will be but without a teacher, and the most accurate one is taken
    (1: the trials decide); where no tier has a teacher its weights are the tier's. `samples` are drawn from
    each of the search's distributions, beside what it has seen. A tier whose finished network is measured
    over its latency budget after all is derived and trained again, `attempts` times in all."""

    later = frozenset({"contenders"})

    low: float = Field(0.975, gt=0, lt=1)
    high: float = Field(0.985, gt=0, le=1)
    guard: float = Field(0.015, ge=0, lt=0.5)
    least: float = Field(0.97, ge=0, lt=1)
    samples: int = Field(2000, ge=0)
    rescored: int = Field(32, ge=1)
    best: int = Field(6, ge=1)
    random: int = Field(1, ge=0)
    uniform: int = Field(1, ge=0)
    trial_epochs: Epochs | None = Field(None, ge=0)
    trial_start: Literal["supernet", "scratch"] | None = None
    contenders: int = Field(1, ge=1)
    attempts: int = Field(3, ge=1)
    trusted_correlation: float = Field(0.5, ge=-1, le=1)

    @model_validator(mode="after")
    def _a_band(self) -> DeriveSettings:
        if self.low >= self.high:
            raise ValueError(f"low ({self.low:g}) must be below high ({self.high:g}); set both")
        return self

    def below_guard(self) -> DeriveSettings:
        """For a tier that is timed: the whole band moved down where its top leaves less than `guard` free."""
        excess = self.high - (1 - self.guard)
        if excess <= 1e-9:
            return self
        moved = {"high": self.high - excess, "low": self.low - excess, "least": self.least - excess}
        return self.model_copy(update={name: max(value, 0.0) for name, value in moved.items()})


@dataclass(frozen=True, slots=True)
class Finalist:
    """An architecture that may become a tier's. `loss` is the ranker's most exact answer, `usage` the
    predicted share of the tightest budget, `counted` of those that are counted; `origin` says why it is
    here."""

    arch: Arch
    loss: float
    usage: float
    origin: str
    counted: float = 0.0

    def to_json(self) -> Json:
        return {
            "arch": self.arch.to_json(),
            "loss": self.loss,
            "usage": self.usage,
            "origin": self.origin,
            "counted": self.counted,
        }

    @classmethod
    def from_json(cls, record: Json) -> Finalist:
        return cls(
            Arch.from_json(record["arch"]),
            float(record["loss"]),
            float(record["usage"]),
            str(record["origin"]),
            float(record.get("counted", 0.0)),
        )


def band(usage_N: FloatArray, fits_N: BoolArray, low: float, least: int) -> IntArray:
    """Indices of what fits and uses `low` of the budget, at least `least` of them if so many fit: the band
    widens downwards, nearest first. Fewer, or none, where the budget itself is the limit."""
    inside = np.flatnonzero(fits_N & (usage_N >= low))
    if len(inside) >= least:
        return inside
    feasible = np.flatnonzero(fits_N)
    return np.sort(feasible[np.argsort(-usage_N[feasible], kind="stable")[:least]])


def choose_finalists(
    archs: Sequence[Arch],
    losses_N: FloatArray,
    usage_N: FloatArray,
    counted_N: FloatArray,
    luck_N: FloatArray,
    uniform: frozenset[Arch],
    settings: DeriveSettings,
) -> tuple[Finalist, ...]:
    """The best by loss, the best uniform ones, and random ones, all distinct; `archs` are one tier's band.
    Random ones are those with the least `luck_N`, so that who is left when others are gone stays chosen."""
    order = np.argsort(losses_N, kind="stable")
    chosen: dict[int, str] = {}
    for index in order[: settings.best]:
        chosen[int(index)] = "search"
    alike = [int(i) for i in order if archs[int(i)] in uniform and int(i) not in chosen]
    for index in alike[: settings.uniform]:
        chosen[index] = "uniform"
    rest = [int(i) for i in np.argsort(luck_N, kind="stable") if int(i) not in chosen]
    for index in rest[: settings.random]:
        chosen[index] = "random"
    return tuple(
        Finalist(archs[i], float(losses_N[i]), float(usage_N[i]), origin, float(counted_N[i]))
        for i, origin in chosen.items()
    )


@dataclass(frozen=True, slots=True)
class Trial:
    """A finalist, timed and briefly trained. `measured_usage` of the timed budget is None where none is,
    `shipped_usage`, of the untrained network in the form that ships, where it was not timed in it; `accuracy`
    (a share, on the architecture split) is None where it was not trained briefly, `full_accuracy` where it
    was not trained in full."""

    finalist: Finalist
    measured_usage: float | None = None
    accuracy: float | None = None
    shipped_usage: float | None = None
    full_accuracy: float | None = None

    def to_json(self) -> Json:
        return {
            **self.finalist.to_json(),
            "measured_usage": self.measured_usage,
            "accuracy": self.accuracy,
            "shipped_usage": self.shipped_usage,
            "full_accuracy": self.full_accuracy,
        }

    @classmethod
    def from_json(cls, record: Json) -> Trial:
        return cls(
            Finalist.from_json(record),
            record["measured_usage"],
            record["accuracy"],
            record.get("shipped_usage"),
            record.get("full_accuracy"),
        )

    def keeps_budget(self, guard: float) -> bool:
        """By the last that was timed of it."""
        timed = self.measured_usage if self.shipped_usage is None else self.shipped_usage
        if timed is None:
            return self.finalist.usage <= 1.0
        return timed <= 1.0 - guard and self.finalist.counted <= 1.0

    @property
    def usage(self) -> float:
        """As timed among many, or predicted where it was not."""
        if self.measured_usage is None:
            return self.finalist.usage
        return max(self.measured_usage, self.finalist.counted)

    def leaves_much(self, least: float) -> bool:
        """Whether it uses less than `least`, or in the form that ships much less than it was to."""
        if self.shipped_usage is None:
            return self.usage < least
        return max(self.shipped_usage, self.finalist.counted) < min(least, self.usage) - MUCH_UNUSED


MUCH_UNUSED = 0.05
"""Of the budget. Timings of two forms of a network, in other processes, differ by a per cent or two."""


def in_order(trials: Sequence[Trial], settings: DeriveSettings) -> list[Trial]:
    """Those that keep the budget, best first: those that use it, then by accuracy after full training (who
    had none comes later) or else brief training, and by loss where none was tried."""
    kept = [trial for trial in trials if trial.keeps_budget(settings.guard)]
    return sorted(
        kept,
        key=lambda t: (
            t.leaves_much(settings.least),
            -(t.full_accuracy or 0.0),
            -(t.accuracy or 0.0),
            t.finalist.loss,
            t.finalist.arch,
        ),
    )


# ------------------------------------------------------------------------------------------ one tier's answer


class Device(Protocol):
    """Where networks are timed. `pipeline.costs.bench.Bench` is one."""

    def time(self, archs: Sequence[Arch]) -> list[LatencyRecord]: ...
    def time_as_shipped(self, archs: Sequence[Arch]) -> list[LatencyRecord]: ...


class Ranker(Protocol):
    """Orders architectures, the best first. Every `pipeline.types.Evaluator` is one."""

    def losses(self, archs: Sequence[Arch], *, step: int, thorough: bool = False) -> FloatArray:
        """Shape (N, J), column 0 is the one that counts; lower is better."""
        ...


LOOKED_AT = 4
"""Members of a band for each that is shortlisted."""

RANKED_AT_ONCE = 16
"""Enough for an evaluator that works on several at a time."""


class Remembered:
    """What a ranker that learns no more says of architectures, each asked about once: tiers and rounds
    look at many of the same. `quick` answers are on one step's images, `thorough` ones the most exact."""

    def __init__(self, ranker: Ranker, progress: Progress) -> None:
        self._ranker, self._progress = ranker, progress
        self._known: dict[tuple[Arch, bool], float] = {}

    def quick(self, archs: Sequence[Arch]) -> FloatArray:
        return self._losses(archs, False)

    def thorough(self, archs: Sequence[Arch]) -> FloatArray:
        return self._losses(archs, True)

    def _losses(self, archs: Sequence[Arch], thorough: bool) -> FloatArray:
        """Shape (N,)."""
        unknown = [arch for arch in dict.fromkeys(archs) if (arch, thorough) not in self._known]
        if unknown:
            with self._progress.track("rank", len(unknown)) as advance:
                for start in range(0, len(unknown), RANKED_AT_ONCE):
                    lot = unknown[start : start + RANKED_AT_ONCE]
                    losses_N = self._ranker.losses(lot, step=0, thorough=thorough)[:, 0]
                    self._known |= {(a, thorough): float(x) for a, x in zip(lot, losses_N, strict=True)}
                    advance(len(lot), "")
        return np.array([self._known[arch, thorough] for arch in archs])


Usage = Callable[[Sequence[Arch]], FloatArray]
"""Share of a budget, shape (N,)."""

ROUNDS, REFITS = 8, 3
"""Rounds of probes and shortlists, at the most; after the first three the prediction is only scaled."""

PROBES, TIMED_AT_ONCE = 4, 8
SURPRISE = 0.02
"""What a prediction may err by in the mean of its probes."""


@dataclass(frozen=True)
class Deriver:
    """Derives one tier. `device` is None where no budget needs one; `counted` is the share of the budgets
    that need none, which is exact. `refit` takes what was timed and answers with a better prediction of the
    timed share; `try_accuracies` trains architectures briefly and is None where nobody wants to wait,
    `train_accuracies` trains them in full."""

    tier: Tier
    space: ChoiceSpace
    settings: DeriveSettings
    ranker: Remembered
    uniform: frozenset[Arch]
    device: Device | None
    counted: Usage
    refit: Callable[[Sequence[Arch], Sequence[float]], Usage]
    try_accuracies: Callable[[Sequence[Arch]], Sequence[float]] | None
    train_accuracies: Callable[[Sequence[Arch]], Sequence[float]]
    say: Callable[[str], None]

    def derive(
        self, pool: Sequence[Arch], timed: Usage, rng: Generator
    ) -> tuple[Arch, LatencyRecord | None, list[Trial]]:
        """The architecture, its latency in the form that ships, and all finalists. `timed` predicts the share
        of the timed budget; 0 where there is none.

        Where too few of a shortlist keep the budget and use it, others are looked for by a better prediction:
        fitted to what was timed, and later scaled to it. The same where none keeps the budget as it would
        ship. Raises InfeasibleBudget when nothing is predicted to fit, BudgetMissed when nothing does."""
        measured_ms: dict[Arch, float] = {}
        shipped: dict[Arch, LatencyRecord] = {}
        seen: dict[Arch, Trial] = {}
        over: dict[Arch, Trial] = {}
        scale = 1.0
        timed, fits = self._fitted(pool, timed, rng, measured_ms)
        for number in range(fits, ROUNDS):
            short = self._not_yet_seen(pool, _scaled(timed, scale), rng, seen)
            fresh = self._timed(short, measured_ms)
            seen |= {trial.finalist.arch: trial for trial in fresh}
            missed = fresh
            if self._is_enough(fresh, seen.values(), number):
                settle = not fresh or number == ROUNDS - 1
                finalists, missed = self._that_ship(list(seen.values()), rng, shipped, settle)
                over |= {trial.finalist.arch: trial for trial in missed}
                if finalists:
                    tried = self._trained(self._tried(finalists))
                    winner = in_order(tried, self.settings)[0].finalist.arch
                    return winner, shipped.get(winner), [*over.values(), *tried]
                if self.device is None or not fresh:
                    break
                measured_ms |= {arch: record.latency_ms for arch, record in shipped.items()}
                missed = missed or fresh
            if number < REFITS:
                timed = self.refit(list(measured_ms), list(measured_ms.values()))
            else:
                scale *= self._surprise(missed, measured_ms)
            seen = {arch: self._updated(trial, measured_ms) for arch, trial in seen.items()}
        raise BudgetMissed(
            f"tier {self.tier.key}: every finalist was timed over its budget less a guard of "
            f"{self.settings.guard:.1%}; set derive.low and derive.high lower (they are "
            f"{self.settings.low:g} and {self.settings.high:g}), or raise the budget"
        )

    def _fitted(
        self, pool: Sequence[Arch], timed: Usage, rng: Generator, measured_ms: dict[Arch, float]
    ) -> tuple[Usage, int]:
        """The prediction, fitted until random members of the band take what they are predicted to, and how
        often it was. The device answers in seconds: so the evaluator, which does not, is asked about the
        right networks. Raises InfeasibleBudget."""
        if self.device is None:
            return timed, 0
        for fits in range(REFITS):
            members = self._members(self._filled(pool, timed, rng), timed)
            probes = [members[i] for i in rng.permutation(len(members))[:PROBES]]
            trials = self._timed(self._candidates(probes, timed, np.zeros(len(probes))), measured_ms)
            if abs(self._surprise(trials, measured_ms) - 1) <= SURPRISE:
                return timed, fits
            timed = self.refit(list(measured_ms), list(measured_ms.values()))
        return timed, REFITS

    def _not_yet_seen(
        self, pool: Sequence[Arch], timed: Usage, rng: Generator, seen: Mapping[Arch, Trial]
    ) -> tuple[Finalist, ...]:
        """The shortlist of a band; none where all that fits was seen before. Raises InfeasibleBudget."""
        new = [arch for arch in pool if arch not in seen]
        if seen and not new:
            return ()
        try:
            unseen = [arch for arch in self._filled(new, timed, rng) if arch not in seen]
            members = sorted(self._members(unseen, timed), key=lambda arch: arch not in self.uniform)
        except InfeasibleBudget:
            if not seen:
                raise
            return ()
        looked_at = members[: LOOKED_AT * self.settings.rescored]
        quick = dict(zip(looked_at, self.ranker.quick(looked_at).tolist(), strict=True))
        short = self._shortlist(members, np.array(list(quick.values())), rng)
        return self._candidates(short, timed, np.array([quick.get(arch, math.inf) for arch in short]))

    def _candidates(self, archs: Sequence[Arch], timed: Usage, losses_N: FloatArray) -> tuple[Finalist, ...]:
        counted_N = self.counted(archs)
        usage_N = np.maximum(timed(archs), counted_N)
        found = zip(archs, losses_N.tolist(), usage_N.tolist(), counted_N.tolist(), strict=True)
        return tuple(Finalist(arch, loss, usage, "band", counted) for arch, loss, usage, counted in found)

    def _is_enough(self, fresh: Sequence[Trial], seen: Iterable[Trial], number: int) -> bool:
        """Whether to choose among what was seen: there are as many as will be asked for, or in later rounds
        any. Where the space has nothing better, so be it."""
        hits = sum(map(self._hits, seen))
        if self.device is None or hits >= self.settings.best or not self._missed_by_surprise(fresh):
            return True
        return number == ROUNDS - 1 or (number >= REFITS and hits > 0)

    def _that_ship(
        self, seen: Sequence[Trial], rng: Generator, shipped: dict[Arch, LatencyRecord], settle: bool
    ) -> tuple[list[Trial], list[Trial]]:
        """Finalists, of those that keep the budget and use it, in the form that ships as well; and those that
        would have been, but do not. Where none is left: of those that keep it, if there was none that uses it
        or nothing else will be looked for (`settle`); at last the one that uses most of it. All that will be
        tried are timed in that form, or the best where nobody tries them; `shipped` gets the records."""
        keep = [trial for trial in seen if trial.keeps_budget(self.settings.guard)]
        hits = [trial for trial in keep if self._hits(trial)]
        luck = dict(zip((trial.finalist.arch for trial in seen), rng.random(len(seen)).tolist(), strict=True))
        dropped: dict[Arch, Trial] = {}
        for group in (hits, keep) if settle or not hits else (hits,):
            while left := [trial for trial in group if trial.finalist.arch not in dropped]:
                finalists = self._finalists(left, luck, shipped)
                some = self.settings.contenders
                asked = finalists if self.try_accuracies else in_order(finalists, self.settings)[:some]
                waiting = [trial for trial in asked if trial.shipped_usage is None]
                if self.device is None or not waiting:
                    return finalists, list(dropped.values())
                shipped |= _in_lots([t.finalist.arch for t in waiting], self.device.time_as_shipped)
                timed = [self._as_shipped(trial, shipped) for trial in waiting]
                dropped |= {trial.finalist.arch: trial for trial in timed if self._surprises(trial)}
        spare = [trial for trial in dropped.values() if trial.keeps_budget(self.settings.guard)]
        best = sorted(spare, key=lambda trial: -(trial.shipped_usage or 0.0))[:1]
        return best, [trial for trial in dropped.values() if trial not in best]

    def _surprises(self, trial: Trial) -> bool:
        """Whether the form that ships does not keep the budget, or leaves much unused; says so."""
        keeps, limit_ms = trial.keeps_budget(self.settings.guard), self.tier.budgets["latency_ms"]
        if keeps and not trial.leaves_much(self.settings.least):
            return False
        self.say(
            f"tier {self.tier.key}: a finalist took {'only ' if keeps else ''}"
            f"{format_value('latency_ms', limit_ms * (trial.shipped_usage or 0.0))} of "
            f"{format_value('latency_ms', limit_ms)} as it would ship; taking the next one"
        )
        return True

    def _as_shipped(self, trial: Trial, shipped: Mapping[Arch, LatencyRecord]) -> Trial:
        record = shipped.get(trial.finalist.arch)
        if record is None:
            return trial
        return replace(trial, shipped_usage=record.latency_ms / self.tier.budgets["latency_ms"])

    def _finalists(
        self, kept: Sequence[Trial], luck: Mapping[Arch, float], shipped: Mapping[Arch, LatencyRecord]
    ) -> list[Trial]:
        archs = [trial.finalist.arch for trial in kept]
        usage_N = np.array([trial.finalist.usage for trial in kept])
        counted_N = np.array([trial.finalist.counted for trial in kept])
        losses_N, luck_N = self.ranker.thorough(archs), np.array([luck[arch] for arch in archs])
        chosen = choose_finalists(archs, losses_N, usage_N, counted_N, luck_N, self.uniform, self.settings)
        of_arch = dict(zip(archs, kept, strict=True))
        return [self._as_shipped(replace(of_arch[f.arch], finalist=f), shipped) for f in chosen]

    def _surprise(self, trials: Sequence[Trial], measured_ms: dict[Arch, float]) -> float:
        """How much more of the timed budget was taken than was predicted, where that one binds."""
        found = [t.finalist for t in trials if t.finalist.usage > t.finalist.counted]
        taken_ms = sum(measured_ms[finalist.arch] for finalist in found)
        predicted_ms = sum(f.usage for f in found) * self.tier.budgets["latency_ms"]
        return taken_ms / predicted_ms if found else 1.0

    def _updated(self, trial: Trial, measured_ms: dict[Arch, float]) -> Trial:
        return replace(
            trial, measured_usage=measured_ms[trial.finalist.arch] / self.tier.budgets["latency_ms"]
        )

    def _hits(self, trial: Trial) -> bool:
        return trial.keeps_budget(self.settings.guard) and trial.usage >= self.settings.least

    def _missed_by_surprise(self, trials: Sequence[Trial]) -> bool:
        """Whether any missed that was predicted to hit: where the space has nothing better, so be it."""
        return any(not self._hits(t) and t.finalist.usage >= self.settings.least for t in trials)

    def _timed(self, finalists: Sequence[Finalist], measured_ms: dict[Arch, float]) -> list[Trial]:
        if self.device is None:
            return [Trial(finalist) for finalist in finalists]
        unknown = [finalist.arch for finalist in finalists if finalist.arch not in measured_ms]
        records = _in_lots(unknown, self.device.time)
        measured_ms |= {arch: record.latency_ms for arch, record in records.items()}
        limit_ms = self.tier.budgets["latency_ms"]
        return [
            Trial(finalist, measured_usage=measured_ms[finalist.arch] / limit_ms) for finalist in finalists
        ]

    def _tried(self, trials: Sequence[Trial]) -> list[Trial]:
        """With their accuracy after a brief training."""
        if self.try_accuracies is None or not trials:
            return list(trials)
        accuracies = self.try_accuracies([trial.finalist.arch for trial in trials])
        return [replace(trial, accuracy=a) for trial, a in zip(trials, accuracies, strict=True)]

    def _trained(self, trials: Sequence[Trial]) -> list[Trial]:
        """The contenders with their accuracy after full training, unless there is but one."""
        contenders = [trial.finalist.arch for trial in in_order(trials, self.settings)]
        contenders = contenders[: self.settings.contenders]
        if len(contenders) < 2:
            return list(trials)
        known = dict(zip(contenders, self.train_accuracies(contenders), strict=True))
        return [replace(trial, full_accuracy=known.get(trial.finalist.arch)) for trial in trials]

    def _members(self, pool: Sequence[Arch], timed: Usage) -> list[Arch]:
        """What is predicted to use nearly all of the budget. Raises InfeasibleBudget."""
        timed_N, counted_N = timed(pool), self.counted(pool)
        fits_N = (timed_N <= self.settings.high) & (counted_N <= 1.0)
        usage_N = np.maximum(timed_N, counted_N)
        members = [pool[i] for i in band(usage_N, fits_N, self.settings.low, self.settings.rescored)]
        if not members:
            raise InfeasibleBudget(
                f"tier {self.tier.key}: none of {len(pool)} architectures keeps its budget (of a timed one "
                f"{1 - self.settings.high:.1%} must stay free); the nearest takes {usage_N.min():.4g} times "
                "the budget; raise it"
            )
        return members

    def _filled(self, pool: Sequence[Arch], timed: Usage, rng: Generator) -> Sequence[Arch]:
        """The pool, and where too few of it are in the band, what walks from the nearest ones find there and
        on their way."""
        low, name = self.settings.low / self.settings.high, self.space.name
        enough = LOOKED_AT * self.settings.rescored

        def share(archs: Sequence[Arch]) -> FloatArray:
            return np.maximum(timed(archs) / self.settings.high, self.counted(archs))

        def look(rows_NS: IntArray) -> tuple[IntArray, FloatArray]:
            archs = [self.space.canonical(Arch(name, tuple(row))) for row in rows_NS.tolist()]
            return np.array([arch.choices for arch in archs], dtype=np.int64), share(archs)

        share_N = share(pool)
        if in_band(share_N, low).sum() >= enough:
            return pool
        rows_NS = np.array([arch.choices for arch in pool], dtype=np.int64)
        sizes = [len(slot.choices) for slot in self.space.slots]
        found_NS, found_N = walk_into_band(
            rows_NS, share_N, look, low=low, enough=enough, sizes=sizes, rng=rng
        )
        found = [Arch(name, tuple(row)) for row in found_NS[found_N <= 1.0].tolist()]
        return list(dict.fromkeys([*pool, *found]))

    def _shortlist(self, members: Sequence[Arch], quick_N: FloatArray, rng: Generator) -> list[Arch]:
        """Five in eight are the best by a quick look; then some uniform ones, and random ones to fill up."""
        rescored = self.settings.rescored
        order = [members[i] for i in np.argsort(quick_N, kind="stable")]
        best = order[: 5 * rescored // 8]
        alike = [arch for arch in order if arch in self.uniform][: max(self.settings.uniform, rescored // 8)]
        shuffled = [members[i] for i in rng.permutation(len(members))]
        return list(dict.fromkeys([*best, *alike, *shuffled]))[: self.settings.rescored]


def _in_lots(
    archs: Sequence[Arch], time: Callable[[Sequence[Arch]], Sequence[LatencyRecord]]
) -> dict[Arch, LatencyRecord]:
    """A few at a time: what disturbs the machine spoils no more than those."""
    records: dict[Arch, LatencyRecord] = {}
    for start in range(0, len(archs), TIMED_AT_ONCE):
        some = archs[start : start + TIMED_AT_ONCE]
        records |= zip(some, time(some), strict=True)
    return records


def _scaled(usage: Usage, factor: float) -> Usage:
    return lambda archs: factor * usage(archs)
