"""Tier distributions whose natural gradient comes from a surrogate of the loss: the default of `importance`.

Ours. Costs are known for free, losses are dear. So each tier draws many samples of its distribution that
keep its budget, a Gaussian process fitted to all evaluations of all tiers predicts their losses, and the
distribution takes ASNG's step on those predictions. What is evaluated are the most promising (predicted loss
less `optimism` standard deviations) among the tier's samples and the offspring of its best architectures so
far, bred on predictions alone. Axes: K tiers, S slots, C choices, N samples, E evaluations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from pydantic import Field

from pipeline.algorithms import categorical, evolution, surrogate
from pipeline.algorithms.categorical import Adaptive
from pipeline.algorithms.surrogate import Kernel, Surrogate
from pipeline.search.base import BandSampler, Sampler, SearchProblem
from pipeline.search.start import favourites
from pipeline.settings import Settings
from pipeline.types import FloatArray, IntArray, Json, Slot


class GuideSettings(Settings):
    """How the surrogate guides."""

    samples_per_tier: int = Field(default=2, ge=1)
    optimism: float = Field(default=0.5, ge=0)
    virtual_samples: int = Field(default=64, ge=4)
    """Samples per tier whose losses are predicted in an iteration."""
    generations: int = Field(default=2, ge=0)
    """How often a tier's best are bred on predictions."""
    first_evaluations: int = Field(default=20, ge=2)
    """Evaluations before the surrogate is believed."""
    confirm_after: int = Field(default=100, ge=0)
    """Evaluations after which, where answers are noisy, one of each tier's several samples asks again for
    what has answered best within its budget: the best of many noisy answers is mostly a lucky one."""
    memory: int = Field(default=800, ge=16)
    """The latest so many evaluations are remembered."""
    low: float = Field(default=0.5, ge=0, lt=1)
    """Samples take this share of the budget at least, while such are found."""
    start: float = Field(default=0.3, ge=0, le=1)
    """Weight of the band's own frequencies of choices in the first distributions; the rest is uniform."""
    delta0: float = Field(default=1.0, gt=0)
    """First length of a step (Fisher norm)."""
    alpha: float = Field(default=1.5, gt=0)
    quantile: float = Field(default=0.25, gt=0, le=0.5)


PARENTS = 8
"""Of a tier, in every generation."""
MUTATION = 0.15
"""Probability that a slot of a child changes; one changes at least."""
SHORTLIST = 24
"""So many of the best predictions are looked at for how sure they are."""
GROWTH = 1.1
"""The kernel is selected anew whenever there are so many times the evaluations."""


class Guided(NamedTuple):
    """`Adaptive`; the evaluations remembered: choices, losses, and which of them were made together; how many
    there were in all, the kernel, and how many there were when it was selected (0: never)."""

    theta_KSC: FloatArray
    slowdown_K: FloatArray
    gamma_K: FloatArray
    path_KSC: FloatArray
    choices_ES: IntArray
    losses_E: FloatArray
    groups_E: IntArray
    told: IntArray
    kernel: FloatArray
    selected_at: IntArray


def sampler(problem: SearchProblem, config: GuideSettings) -> tuple[Sampler[Guided], BandSampler]:
    """The guided sampler, and the bands that its distributions started from."""
    bands = BandSampler(problem)
    guide = _Guide(problem, config, bands)
    return Sampler(guide.init, guide.ask, guide.tell, guide.watch, lambda state: state.theta_KSC), bands


class _Guide:
    def __init__(self, problem: SearchProblem, config: GuideSettings, bands: BandSampler) -> None:
        self.problem, self.config, self.bands = problem, config, bands
        self.sizes = problem.sizes
        self.favourites_KNS = favourites(problem)
        self.drifts = problem.evaluator.trains and not problem.is_frozen
        self._model: tuple[FloatArray, Surrogate] | None = None
        self._drawn: tuple[FloatArray, dict[int, IntArray]] | None = None

    def init(self) -> Guided:
        num_choices, weight = max(self.sizes), self.config.start
        band_KSC = np.stack(
            [categorical.one_hot(rows_NS, num_choices).mean(axis=0) for rows_NS in self.bands.members_KNS]
        )
        uniform_KSC = categorical.uniform(self.sizes, len(band_KSC))
        theta_KSC = categorical.with_margin((1 - weight) * uniform_KSC + weight * band_KSC, self.sizes)
        none, zero = np.zeros(0), np.asarray(0, dtype=np.int64)
        return Guided(
            *categorical.adaptive_start(theta_KSC),
            choices_ES=np.zeros((0, len(self.sizes)), dtype=np.int64),
            losses_E=none,
            groups_E=none.astype(np.int64),
            told=zero,
            kernel=np.zeros(len(Kernel._fields)),
            selected_at=zero,
        )

    def ask(self, state: Guided, rng: Generator) -> IntArray:
        num = self.config.samples_per_tier
        if self._too_few(state):
            chosen_KNS = [self._first(state, k, num, rng) for k in range(len(self.problem.tiers))]
        else:
            chosen_KNS = self._promising(state, rng)
        return np.stack(chosen_KNS, axis=1).reshape(-1, len(self.sizes))

    def tell(
        self, state: Guided, choices_NS: IntArray, losses_N: FloatArray, usage_NK: FloatArray, rng: Generator
    ) -> Guided:
        state = self._remembering(state, self.problem.canonical(choices_NS), losses_N)
        if self._too_few(state):
            return state
        state = self._with_kernel(state)
        gradient_KSC = np.stack(
            [self._gradient(state, k, self._virtual(state, k, rng)) for k in range(len(self.problem.tiers))]
        )
        moved = categorical.adaptive_step(
            Adaptive(state.theta_KSC, state.slowdown_K, state.gamma_K, state.path_KSC),
            gradient_KSC,
            self.sizes,
            self.config.delta0,
            self.config.alpha,
        )
        return state._replace(**moved._asdict())

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
            told=state.told + len(losses_N),
        )

    def _seen(self, state: Guided) -> tuple[IntArray, FloatArray, Sequence[Slot], IntArray | None]:
        """What the surrogate is fitted to; answers that do not drift need no groups."""
        groups_E = state.groups_E if self.drifts else None
        return state.choices_ES, state.losses_E, self.problem.space.slots, groups_E

    def _with_kernel(self, state: Guided) -> Guided:
        if state.selected_at and state.told < GROWTH * state.selected_at:
            return state
        kernel = surrogate.select(*self._seen(state))
        return state._replace(kernel=np.array(kernel), selected_at=state.told)

    def _surrogate(self, state: Guided) -> Surrogate:
        """Fitted once for all that see the same evaluations."""
        if self._model is None or self._model[0] is not state.losses_E:
            kernel = Kernel(*state.kernel.tolist())
            self._model = (state.losses_E, surrogate.fit(*self._seen(state), kernel=kernel))
        return self._model[1]

    def _gradient(self, state: Guided, k: int, drawn_NS: IntArray) -> FloatArray:
        """Natural gradient of tier k by the predicted losses of its samples, shape (S, C)."""
        loss_N = surrogate.predict(self._surrogate(state), self.problem.canonical(drawn_NS))
        utility_N = categorical.quantile_utility(loss_N, np.ones(len(loss_N)), self.config.quantile)
        theta_1SC = state.theta_KSC[k : k + 1]
        return np.asarray(categorical.natural_gradient(theta_1SC, drawn_NS, utility_N[None])[0])

    def _first(self, state: Guided, k: int, num: int, rng: Generator) -> IntArray:
        """What an earlier search liked best in tier k, before anything is known; else samples of p_k."""
        liked_NS = self.favourites_KNS[k][: 0 if state.told else num]
        if not len(liked_NS):
            return self._within_budget(state, k, num, rng)
        return np.resize(liked_NS, (num, len(self.sizes)))

    def _virtual(self, state: Guided, k: int, rng: Generator) -> IntArray:
        """Tier k's samples that cost no evaluation, the same for all that see the same distributions."""
        if self._drawn is None or self._drawn[0] is not state.theta_KSC:
            self._drawn = (state.theta_KSC, {})
        if k not in self._drawn[1]:
            self._drawn[1][k] = self._within_budget(state, k, self.config.virtual_samples, rng)
        return self._drawn[1][k]

    def _within_budget(self, state: Guided, k: int, num: int, rng: Generator, rounds: int = 4) -> IntArray:
        """`num` samples of p_k that take `low` to 1 of the budget, by rejection; the band's own fill up
        where p_k has hardly any, and draw it back."""
        kept = [np.zeros((0, len(self.sizes)), dtype=np.int64)]
        for _ in range(rounds):
            drawn_NS = categorical.sample(state.theta_KSC[k : k + 1], 2 * num, rng)[0]
            usage_N = self.problem.usage_of(drawn_NS)[:, k]
            kept.append(drawn_NS[(usage_N >= self.config.low) & (usage_N <= 1.0)])
            if sum(map(len, kept)) >= num:
                break
        found_NS = np.concatenate(kept)[:num]
        missing = num - len(found_NS)
        return np.concatenate([found_NS, self.bands.draw_of([k] * missing, rng)]) if missing else found_NS

    def _promising(self, state: Guided, rng: Generator) -> list[IntArray]:
        """Per tier: the most promising architectures. None twice, while there are others, unless answers
        drift or one is to be confirmed: where they are noisy, a neighbour says as much of the known one as
        asking it again, and more of others."""
        taken = set() if self.drifts else set(map(tuple, state.choices_ES.tolist()))
        num, model = self.config.samples_per_tier, self._surrogate(state)
        known = self._known(state, model)
        chosen_KNS = []
        for k in range(len(self.problem.tiers)):
            pool_NS = self.problem.canonical(self._virtual(state, k, rng))
            pool_NS, mean_N = self._bred(k, pool_NS, known, model, rng)
            new_N = np.array([row not in taken for row in map(tuple, pool_NS.tolist())])
            order_N = np.lexsort((mean_N, ~new_N))[: max(SHORTLIST, num)]
            mean_N, deviation_N = surrogate.predict_with_deviation(model, pool_NS[order_N])
            order_N = order_N[np.lexsort((mean_N - self.config.optimism * deviation_N, ~new_N[order_N]))]
            chosen_KNS.append(np.resize(pool_NS[order_N[:num]], (num, len(self.sizes))))
            taken |= set(map(tuple, chosen_KNS[-1].tolist()))
        return self._with_the_best_so_far(state, chosen_KNS) if self._confirms(state) else chosen_KNS

    def _confirms(self, state: Guided) -> bool:
        evaluator, config = self.problem.evaluator, self.config
        is_noise = evaluator.noisy and not evaluator.trains
        return is_noise and config.samples_per_tier > 1 and int(state.told) >= config.confirm_after

    def _with_the_best_so_far(self, state: Guided, chosen_KNS: list[IntArray]) -> list[IntArray]:
        """What has the least mean answer within a tier's budget takes its last place, once for all tiers."""
        rows_NS, index_E = np.unique(state.choices_ES, axis=0, return_inverse=True)
        index_E = index_E.reshape(-1)
        mean_N = np.bincount(index_E, state.losses_E) / np.bincount(index_E)
        answer_NK = np.where(self.problem.usage_of(rows_NS) <= 1, mean_N[:, None], np.inf)
        confirmed: set[int] = set()
        for chosen_NS, answer_N in zip(chosen_KNS, answer_NK.T, strict=True):
            best = int(answer_N.argmin())
            if best not in confirmed and np.isfinite(answer_N[best]):
                chosen_NS[-1] = rows_NS[best]
                confirmed.add(best)
        return chosen_KNS

    def _known(self, state: Guided, model: Surrogate) -> tuple[IntArray, FloatArray, FloatArray]:
        """Architectures evaluated, their predicted losses (N,), and usage (N, K)."""
        rows_NS = state.choices_ES[evolution.first_of_each(state.choices_ES)]
        return rows_NS, surrogate.predict(model, rows_NS), self.problem.usage_of(rows_NS)

    def _bred(
        self,
        k: int,
        pool_NS: IntArray,
        known: tuple[IntArray, FloatArray, FloatArray],
        model: Surrogate,
        rng: Generator,
    ) -> tuple[IntArray, FloatArray]:
        """The pool, the known that keep tier k's budget, and generations of offspring that do, without
        doubles, and their predicted losses."""
        rows_NS, mean_N, usage_NK = known
        fits_N = usage_NK[:, k] <= 1
        pool_NS, pool_mean_N = _distinct(
            np.concatenate([rows_NS[fits_N], pool_NS]),
            np.concatenate([mean_N[fits_N], surrogate.predict(model, pool_NS)]),
        )
        for _ in range(self.config.generations):
            parents_PS = pool_NS[np.argsort(pool_mean_N, kind="stable")[:PARENTS]]
            litter_NS = np.repeat(parents_PS, self.config.virtual_samples // PARENTS, axis=0)
            mates_NS = parents_PS[rng.integers(len(parents_PS), size=len(litter_NS))]
            children_NS = self.problem.canonical(
                evolution.mutate(evolution.cross(litter_NS, mates_NS, rng), self.sizes, MUTATION, rng)
            )
            usage_N = self.problem.usage_of(children_NS)[:, k]
            children_NS = children_NS[(usage_N >= self.config.low) & (usage_N <= 1)]
            pool_NS, pool_mean_N = _distinct(
                np.concatenate([pool_NS, children_NS]),
                np.concatenate([pool_mean_N, surrogate.predict(model, children_NS)]),
            )
        return pool_NS, pool_mean_N


def _distinct(rows_NS: IntArray, values_N: FloatArray) -> tuple[IntArray, FloatArray]:
    first_N = evolution.first_of_each(rows_NS)
    return rows_NS[first_N], values_N[first_N]
