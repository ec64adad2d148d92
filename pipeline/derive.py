"""From what a search has seen to one architecture per tier, whichever method ran.

The evaluator proposes and the device disposes: a tier's finalists are members that should use nearly all of
its budget — the best by the evaluator, some drawn at random from the same band, and the best uniform ones.
They are timed on the device, then trained briefly, and the most accurate one that keeps the budget wins.
The same numbers say how far the evaluator's order can be trusted: its rank correlation with briefly trained
accuracy inside the tiers' bands, where size decides nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.random import Generator
from pydantic import Field

from pipeline.errors import BudgetMissed, InfeasibleBudget
from pipeline.settings import Settings
from pipeline.types import Arch, Evaluator, FloatArray, IntArray, Json, LatencyRecord, Tier
from pipeline.units import format_value


class DeriveSettings(Settings):
    """Finalists are predicted to use `low` to `high` of the budget, all of it where it is counted and not
    timed; of the `rescored` members that the evaluator is asked about thoroughly, the `best`, `uniform` and
    `random` ones become finalists. They are timed, and tried for `trial_epochs`. When timed, `guard` of the
    budget must stay free, and networks that use less than `least` of it come last. `samples` are drawn from
    each of the search's distributions, beside what it has seen."""

    low: float = Field(0.97, gt=0, lt=1)
    high: float = Field(0.985, gt=0, le=1)
    guard: float = Field(0.015, ge=0, lt=0.5)
    least: float = Field(0.95, ge=0, lt=1)
    samples: int = Field(2000, ge=0)
    rescored: int = Field(32, ge=1)
    best: int = Field(3, ge=1)
    random: int = Field(1, ge=0)
    uniform: int = Field(1, ge=0)
    trial_epochs: int = Field(1, ge=0)
    trusted_correlation: float = Field(0.5, ge=-1, le=1)


@dataclass(frozen=True, slots=True)
class Finalist:
    """An architecture that may become a tier's. `loss` is the evaluator's most exact answer, `usage`
    predicted
    (the share of the budget); `origin` says why it is here."""

    arch: Arch
    loss: float
    usage: float
    origin: str

    def to_json(self) -> Json:
        return {"arch": self.arch.to_json(), "loss": self.loss, "usage": self.usage, "origin": self.origin}

    @classmethod
    def from_json(cls, record: Json) -> Finalist:
        return cls(
            Arch.from_json(record["arch"]),
            float(record["loss"]),
            float(record["usage"]),
            str(record["origin"]),
        )


def band(usage_N: FloatArray, low: float, high: float, least: int) -> IntArray:
    """Indices whose use of the budget lies in [low, high], at least `least` of them if the budget admits
    that many: the band widens downwards, nearest first. Fewer, or none, where the budget itself is the
    limit."""
    inside = np.flatnonzero((usage_N <= high) & (usage_N >= low))
    if len(inside) >= least:
        return inside
    feasible = np.flatnonzero(usage_N <= high)
    return np.sort(feasible[np.argsort(-usage_N[feasible], kind="stable")[:least]])


def choose_finalists(
    archs: Sequence[Arch],
    losses_N: FloatArray,
    usage_N: FloatArray,
    uniform: frozenset[Arch],
    settings: DeriveSettings,
    rng: Generator,
) -> tuple[Finalist, ...]:
    """The best by loss, the best uniform ones, and random ones, all distinct; `archs` are one tier's band."""
    order = np.argsort(losses_N, kind="stable")
    chosen: dict[int, str] = {}
    for index in order[: settings.best]:
        chosen[int(index)] = "search"
    alike = [int(i) for i in order if archs[int(i)] in uniform and int(i) not in chosen]
    for index in alike[: settings.uniform]:
        chosen[index] = "uniform"
    rest = [int(i) for i in range(len(archs)) if int(i) not in chosen]
    for index in rng.permutation(rest)[: settings.random]:
        chosen[int(index)] = "random"
    return tuple(
        Finalist(archs[index], float(losses_N[index]), float(usage_N[index]), origin)
        for index, origin in chosen.items()
    )


@dataclass(frozen=True, slots=True)
class Trial:
    """A finalist, timed and briefly trained. `measured_usage` is None where no budget needs a device;
    `accuracy` (a share, on the architecture split) is None where it was not trained."""

    finalist: Finalist
    measured_usage: float | None = None
    accuracy: float | None = None

    def to_json(self) -> Json:
        return {
            **self.finalist.to_json(),
            "measured_usage": self.measured_usage,
            "accuracy": self.accuracy,
        }

    @classmethod
    def from_json(cls, record: Json) -> Trial:
        return cls(Finalist.from_json(record), record["measured_usage"], record["accuracy"])

    def keeps_budget(self, guard: float) -> bool:
        return (
            self.finalist.usage <= 1.0 if self.measured_usage is None else self.measured_usage <= 1.0 - guard
        )

    @property
    def usage(self) -> float:
        return self.finalist.usage if self.measured_usage is None else self.measured_usage


def in_order(trials: Sequence[Trial], settings: DeriveSettings) -> list[Trial]:
    """Those that keep the budget, best first: those that use it, then by accuracy after brief training (by
    loss where none was tried)."""
    kept = [trial for trial in trials if trial.keeps_budget(settings.guard)]
    return sorted(
        kept,
        key=lambda t: (t.usage < settings.least, -(t.accuracy or 0.0), t.finalist.loss, t.finalist.arch),
    )


# ------------------------------------------------------------------------------------------ one tier's answer


class Device(Protocol):
    """Where networks are timed. `pipeline.costs.bench.Bench` is one."""

    def time(self, archs: Sequence[Arch]) -> list[LatencyRecord]: ...
    def time_as_shipped(self, arch: Arch) -> LatencyRecord: ...


Usage = Callable[[Sequence[Arch]], FloatArray]
"""Predicted share of the tier's budget, shape (N,)."""

REFITS = 3


@dataclass(frozen=True)
class Deriver:
    """Derives one tier. `device` is None where no budget needs one; `counted` is the share of the budgets
    that need none, which is exact. `refit` takes what was timed and answers with a better prediction;
    `try_accuracies` trains architectures briefly and is None where nobody wants to wait."""

    tier: Tier
    settings: DeriveSettings
    evaluator: Evaluator
    uniform: frozenset[Arch]
    device: Device | None
    counted: Usage
    refit: Callable[[Sequence[Arch], Sequence[float]], Usage]
    try_accuracies: Callable[[Sequence[Arch]], Sequence[float]] | None
    say: Callable[[str], None]

    def derive(
        self, pool: Sequence[Arch], usage: Usage, rng: Generator
    ) -> tuple[Arch, LatencyRecord | None, list[Trial]]:
        """The architecture, its latency in the form that ships, and all that was tried.

        Raises InfeasibleBudget when nothing is predicted to fit, BudgetMissed when nothing does."""
        trials = self._timed_finalists(pool, usage, rng)
        tried = self._tried(trials)
        arch, record = self._first_that_keeps(in_order(tried, self.settings))
        return arch, record, tried

    def _timed_finalists(self, pool: Sequence[Arch], usage: Usage, rng: Generator) -> list[Trial]:
        """Finalists, timed. While most miss the budget, or leave much of it unused, the prediction is wrong
        here: it is refitted, and they are chosen again; those of earlier rounds stay in the race."""
        measured_ms: dict[Arch, float] = {}
        seen: dict[Arch, Trial] = {}
        for _ in range(REFITS):
            trials = self._timed(self._finalists(pool, usage, rng), measured_ms)
            seen |= {trial.finalist.arch: trial for trial in trials}
            hits = [trial for trial in trials if self._hits(trial)]
            if self.device is None or len(hits) > len(trials) // 2 or not self._missed_by_surprise(trials):
                break
            usage = self.refit(list(measured_ms), list(measured_ms.values()))
        return list(seen.values())

    def _hits(self, trial: Trial) -> bool:
        return trial.keeps_budget(self.settings.guard) and trial.usage >= self.settings.least

    def _missed_by_surprise(self, trials: Sequence[Trial]) -> bool:
        """Whether any missed that was predicted to hit: where the space has nothing better, so be it."""
        return any(not self._hits(t) and t.finalist.usage >= self.settings.least for t in trials)

    def _timed(self, finalists: Sequence[Finalist], measured_ms: dict[Arch, float]) -> list[Trial]:
        if self.device is None:
            return [Trial(finalist) for finalist in finalists]
        unknown = [finalist.arch for finalist in finalists if finalist.arch not in measured_ms]
        for arch, record in zip(unknown, self.device.time(unknown), strict=True):
            measured_ms[arch] = record.latency_ms
        limit_ms = self.tier.budgets["latency_ms"]
        counted_N = self.counted([finalist.arch for finalist in finalists]).tolist()
        return [
            Trial(finalist, measured_usage=max(measured_ms[finalist.arch] / limit_ms, counted))
            for finalist, counted in zip(finalists, counted_N, strict=True)
        ]

    def _tried(self, trials: Sequence[Trial]) -> list[Trial]:
        """With the accuracy of those that keep the budget and use it; where none does, that keep it."""
        kept = [trial.finalist.arch for trial in trials if self._hits(trial)]
        kept = kept or [t.finalist.arch for t in trials if t.keeps_budget(self.settings.guard)]
        if self.try_accuracies is None or not kept:
            return list(trials)
        accuracy = dict(zip(kept, self.try_accuracies(kept), strict=True))
        return [replace(trial, accuracy=accuracy.get(trial.finalist.arch)) for trial in trials]

    def _finalists(self, pool: Sequence[Arch], usage: Usage, rng: Generator) -> tuple[Finalist, ...]:
        usage_N = usage(pool)
        high = self.settings.high if "latency_ms" in self.tier.budgets else 1.0
        members = [pool[i] for i in band(usage_N, self.settings.low, high, self.settings.rescored)]
        if not members:
            raise InfeasibleBudget(
                f"tier {self.tier.key}: no architecture within {high:.1%} of its budget; "
                f"the nearest uses {usage_N.min():.1%}; raise the budget"
            )
        quick_N = self.evaluator.losses(members[: 8 * self.settings.rescored], step=0)[:, 0]
        short = self._shortlist(members, quick_N, rng)
        losses_N = self.evaluator.losses(short, step=0, thorough=True)[:, 0]
        return choose_finalists(short, losses_N, usage(short), self.uniform, self.settings, rng)

    def _shortlist(self, members: Sequence[Arch], quick_N: FloatArray, rng: Generator) -> list[Arch]:
        """The better half by a quick look, some uniform ones, and random ones to fill up."""
        order = [members[i] for i in np.argsort(quick_N, kind="stable")]
        best = order[: self.settings.rescored // 2]
        alike = [arch for arch in order if arch in self.uniform][: self.settings.rescored // 4]
        shuffled = [members[i] for i in rng.permutation(len(members))]
        return list(dict.fromkeys([*best, *alike, *shuffled]))[: self.settings.rescored]

    def _first_that_keeps(self, trials: Sequence[Trial]) -> tuple[Arch, LatencyRecord | None]:
        """The first whose untrained network, exported as it will ship, keeps the latency budget."""
        if self.device is None and trials:
            return trials[0].finalist.arch, None
        for trial in trials:
            assert self.device is not None
            limit_ms = self.tier.budgets["latency_ms"]
            record = self.device.time_as_shipped(trial.finalist.arch)
            if record.latency_ms <= limit_ms * (1 - self.settings.guard):
                return trial.finalist.arch, record
            self.say(
                f"tier {self.tier.key}: a finalist took {format_value('latency_ms', record.latency_ms)} of "
                f"{format_value('latency_ms', limit_ms)} as it would ship; taking the next one"
            )
        raise BudgetMissed(
            f"tier {self.tier.key}: every finalist was timed over its budget less a guard of "
            f"{self.settings.guard:.1%}; set derive.high lower (it is {self.settings.high}), or raise the "
            "budget"
        )


# ------------------------------------------------------------------------------------------- rank correlation


@dataclass(frozen=True, slots=True)
class RankCorrelation:
    """Spearman's ρ between what an evaluator says and briefly trained accuracy inside tiers' bands.

    Ranks are taken within each tier and centred, so that differences between tiers do not count. `low` and
    `high` are the 95 % interval by Fisher's transform; NaN-free: `rho` is None where nothing varies or n <
    4."""

    rho: float | None
    low: float | None
    high: float | None
    networks: int

    def to_json(self) -> Json:
        return {"rho": self.rho, "low": self.low, "high": self.high, "networks": self.networks}


def rank_correlation(groups: Sequence[tuple[Sequence[float], Sequence[float]]]) -> RankCorrelation:
    """`groups` holds, tier by tier, (losses, accuracies). Positive when lower losses go with higher
    accuracies."""
    from scipy.stats import rankdata

    ours, truth = [], []
    for losses, accuracies in groups:
        if len(losses) >= 2:
            ours.append(_centred(rankdata(-np.asarray(losses, dtype=float))))
            truth.append(_centred(rankdata(np.asarray(accuracies, dtype=float))))
    x = np.concatenate(ours) if ours else np.zeros(0)
    y = np.concatenate(truth) if truth else np.zeros(0)
    freedom = len(x) - len(ours)  # one mean per tier was taken out
    if freedom < 3 or not x.any() or not y.any():
        return RankCorrelation(None, None, None, len(x))
    rho = float(np.clip(x @ y / math.sqrt((x @ x) * (y @ y)), -1.0, 1.0))
    spread = 1.96 / math.sqrt(max(freedom - 2, 1))
    z = math.atanh(float(np.clip(rho, -0.999999, 0.999999)))
    return RankCorrelation(rho, math.tanh(z - spread), math.tanh(z + spread), len(x))


def _centred(ranks: FloatArray) -> FloatArray:
    """Ranks scaled to [-1, 1] within their tier, mean 0."""
    return np.asarray((ranks - ranks.mean()) / max((len(ranks) - 1) / 2, 1e-12))
