"""Tier distributions whose natural gradient comes from a surrogate of the loss: the default of `importance`.

Ours. Costs are known for free, losses are dear. So each tier draws many samples of its distribution that
keep its budget, a Gaussian process fitted to all evaluations of all tiers predicts their losses, and the
distribution takes ASNG's step on those predictions. Of the samples, `scouts` promising ones (predicted loss
less `optimism` standard deviations) and for the rest plain ones are evaluated. Axes: K tiers, S slots, C
choices, N samples, E evaluations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from pydantic import Field, model_validator

from pipeline.algorithms import categorical, surrogate
from pipeline.algorithms.categorical import Adaptive
from pipeline.algorithms.surrogate import Surrogate
from pipeline.search.base import BandSampler, Sampler, SearchProblem
from pipeline.settings import Settings
from pipeline.types import FloatArray, IntArray, Json


class GuideSettings(Settings):
    """How the surrogate guides."""

    samples_per_tier: int = Field(default=2, ge=1)
    scouts: int = Field(default=1, ge=0)
    """How many of a tier's samples are the most promising ones; the others are plain samples."""
    optimism: float = Field(default=0.5, ge=0)
    virtual_samples: int = Field(default=64, ge=4)
    """Samples per tier whose losses are predicted in an iteration."""
    first_evaluations: int = Field(default=20, ge=2)
    """Evaluations before the surrogate is believed."""
    memory: int = Field(default=512, ge=16)
    """The latest so many evaluations are remembered."""
    low: float = Field(default=0.5, ge=0, lt=1)
    """Samples take this share of the budget at least, while such are found."""
    start: float = Field(default=0.3, ge=0, le=1)
    """Weight of the band's own frequencies of choices in the first distributions; the rest is uniform."""
    delta0: float = Field(default=1.0, gt=0)
    """First length of a step (Fisher norm)."""
    alpha: float = Field(default=1.5, gt=0)
    quantile: float = Field(default=0.25, gt=0, le=0.5)

    @model_validator(mode="after")
    def _scouts_are_samples(self) -> GuideSettings:
        if self.scouts > self.samples_per_tier:
            raise ValueError(f"'scouts' is at most 'samples_per_tier' ({self.samples_per_tier})")
        return self


class Guided(NamedTuple):
    """`Adaptive`, and the evaluations remembered: choices, losses, and which of them were made together."""

    theta_KSC: FloatArray
    slowdown_K: FloatArray
    gamma_K: FloatArray
    path_KSC: FloatArray
    choices_ES: IntArray
    losses_E: FloatArray
    groups_E: IntArray


def sampler(problem: SearchProblem, config: GuideSettings) -> tuple[Sampler[Guided], BandSampler]:
    """The guided sampler, and the bands that its distributions started from."""
    bands = BandSampler(problem)
    guide = _Guide(problem, config, bands)
    return Sampler(guide.init, guide.ask, guide.tell, guide.watch, lambda state: state.theta_KSC), bands


class _Guide:
    def __init__(self, problem: SearchProblem, config: GuideSettings, bands: BandSampler) -> None:
        self.problem, self.config, self.bands = problem, config, bands
        self.sizes = problem.sizes
        self.changes = not problem.answers_are_fixed
        self._model: tuple[FloatArray, Surrogate] | None = None

    def init(self) -> Guided:
        num_choices, weight = max(self.sizes), self.config.start
        band_KSC = np.stack(
            [categorical.one_hot(rows_NS, num_choices).mean(axis=0) for rows_NS in self.bands.members_KNS]
        )
        uniform_KSC = categorical.uniform(self.sizes, len(band_KSC))
        theta_KSC = categorical.with_margin((1 - weight) * uniform_KSC + weight * band_KSC, self.sizes)
        none = np.zeros(0)
        nothing_ES = np.zeros((0, len(self.sizes)), dtype=np.int64)
        return Guided(*categorical.adaptive_start(theta_KSC), nothing_ES, none, none.astype(np.int64))

    def ask(self, state: Guided, rng: Generator) -> IntArray:
        num = self.config.samples_per_tier
        if self._too_few(state):
            chosen_KNS = [self._within_budget(state, k, num, rng) for k in range(len(self.problem.tiers))]
        else:
            chosen_KNS = self._scouted(state, rng)
        return np.stack(chosen_KNS, axis=1).reshape(-1, len(self.sizes))

    def tell(
        self, state: Guided, choices_NS: IntArray, losses_N: FloatArray, usage_NK: FloatArray, rng: Generator
    ) -> Guided:
        state = self._remembering(state, self._canonical(choices_NS), losses_N)
        if self._too_few(state):
            return state
        gradient_KSC = np.stack([self._gradient(state, k, rng) for k in range(len(self.problem.tiers))])
        moved = categorical.adaptive_step(
            Adaptive(*state[:4]), gradient_KSC, self.sizes, self.config.delta0, self.config.alpha
        )
        return Guided(*moved, *state[4:])

    def watch(
        self, state: Guided, choices_NS: IntArray, losses_N: FloatArray, usage_NK: FloatArray
    ) -> list[Json]:
        """Means over each tier's own samples; the effective sample size says how far tiers still overlap."""
        theta_KSC = state.theta_KSC
        weights_KN = categorical.mixture_weights(categorical.log_prob(theta_KSC, choices_NS))
        columns: dict[str, Sequence[float] | FloatArray] = {
            "usage": [usage_NK[k :: len(theta_KSC), k].mean() for k in range(len(theta_KSC))],
            "loss": [losses_N[k :: len(theta_KSC)].mean() for k in range(len(theta_KSC))],
            "entropy": categorical.entropy(theta_KSC),
            "effective_sample_size": categorical.effective_sample_size(weights_KN),
        }
        return [{name: float(column[k]) for name, column in columns.items()} for k in range(len(theta_KSC))]

    # ------------------------------------------------------------------------------------------------ parts

    def _too_few(self, state: Guided) -> bool:
        return len(state.losses_E) < self.config.first_evaluations

    def _remembering(self, state: Guided, choices_NS: IntArray, losses_N: FloatArray) -> Guided:
        last = slice(-self.config.memory, None)
        group = state.groups_E[-1] + 1 if len(state.groups_E) else 0
        return state._replace(
            choices_ES=np.concatenate([state.choices_ES, choices_NS])[last],
            losses_E=np.concatenate([state.losses_E, losses_N])[last],
            groups_E=np.concatenate([state.groups_E, np.full(len(losses_N), group)])[last],
        )

    def _surrogate(self, state: Guided) -> Surrogate:
        """Fitted once for all that see the same evaluations."""
        if self._model is None or self._model[0] is not state.losses_E:
            evaluations = state.choices_ES, state.losses_E, state.groups_E
            fitted = surrogate.fit(*evaluations, self.sizes, group_variance=1.0 if self.changes else 0.0)
            self._model = (state.losses_E, fitted)
        return self._model[1]

    def _predict(self, state: Guided, canonical_NS: IntArray) -> tuple[FloatArray, FloatArray]:
        return surrogate.predict(self._surrogate(state), canonical_NS, self.sizes)

    def _canonical(self, choices_NS: IntArray) -> IntArray:
        return np.array([arch.choices for arch in self.problem.archs(choices_NS)], dtype=np.int64)

    def _gradient(self, state: Guided, k: int, rng: Generator) -> FloatArray:
        """Natural gradient of tier k by the predicted losses of fresh samples, shape (S, C)."""
        drawn_NS = self._within_budget(state, k, self.config.virtual_samples, rng)
        loss_N, _ = self._predict(state, self._canonical(drawn_NS))
        utility_N = categorical.quantile_utility(loss_N, np.ones(len(loss_N)), self.config.quantile)
        theta_1SC = state.theta_KSC[k : k + 1]
        return np.asarray(categorical.natural_gradient(theta_1SC, drawn_NS, utility_N[None])[0])

    def _within_budget(self, state: Guided, k: int, num: int, rng: Generator, rounds: int = 8) -> IntArray:
        """`num` samples of p_k that take `low` to 1 of the budget, by rejection; the band's own fill up
        where p_k has hardly any, and draw it back."""
        kept = [np.zeros((0, len(self.sizes)), dtype=np.int64)]
        for _ in range(rounds):
            drawn_NS = categorical.sample(state.theta_KSC[k : k + 1], 2 * num, rng)[0]
            usage_N = self.problem.usage(self.problem.archs(drawn_NS))[:, k]
            kept.append(drawn_NS[(usage_N >= self.config.low) & (usage_N <= 1.0)])
            if sum(map(len, kept)) >= num:
                break
        found_NS = np.concatenate(kept)[:num]
        missing = num - len(found_NS)
        return np.concatenate([found_NS, self.bands.draw_of([k] * missing, rng)]) if missing else found_NS

    def _scouted(self, state: Guided, rng: Generator) -> list[IntArray]:
        """Per tier: the most promising samples first, then plain ones; none that is known, while there are
        others."""
        taken = set() if self.changes else set(map(tuple, state.choices_ES.tolist()))
        chosen_KNS = []
        for k in range(len(self.problem.tiers)):
            drawn_NS = self._canonical(self._within_budget(state, k, self.config.virtual_samples, rng))
            mean_N, deviation_N = self._predict(state, drawn_NS)
            order_N = np.argsort(mean_N - self.config.optimism * deviation_N, kind="stable")
            scouts = _first_new(drawn_NS[order_N], self.config.scouts, taken)
            plain = _first_new(drawn_NS, self.config.samples_per_tier - len(scouts), taken)
            missing = self.config.samples_per_tier - len(scouts) - len(plain)
            chosen_KNS.append(np.array([*scouts, *plain, *drawn_NS[:missing].tolist()], dtype=np.int64))
        return chosen_KNS


def _first_new(rows_NS: IntArray, num: int, taken: set[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """The first `num` rows that nobody has taken; they are taken from then on."""
    new: list[tuple[int, ...]] = []
    for row in map(tuple, rows_NS.tolist()):
        if len(new) == num:
            break
        if row not in taken:
            new.append(row)
            taken.add(row)
    return new
