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
from pipeline.errors import ConfigError
from pipeline.search.bands import BandSampler
from pipeline.search.base import Sampler
from pipeline.search.problem import SearchProblem
from pipeline.search.start import favourites
from pipeline.settings import Settings
from pipeline.types import BoolArray, FloatArray, IntArray, Json, Slot


class GuideSettings(Settings):
    """How the surrogate guides."""

    samples_per_tier: int | None = Field(default=None, ge=1)
    """None: one where answers are fixed, so that every choice knows all answers; else two."""
    optimism: float = Field(default=0.5, ge=0)
    virtual_samples: int = Field(default=64, ge=4)
    """Samples per tier whose losses are predicted in an iteration."""
    generations: int = Field(default=2, ge=0)
    """How often a tier's best are bred on predictions."""
    first_evaluations: int = Field(default=20, ge=2)
    """Evaluations before the surrogate is believed."""
    confirm_every: int = Field(default=100, ge=1)
    """Where answers are noisy, every so many evaluations each tier's best by mean answer (as many as it has
    samples) need one answer more, and are asked again in place of new ones until they have it: the best of
    many noisy answers is mostly a lucky one."""
    memory: int = Field(default=800, ge=16)
    """The latest so many evaluations are remembered."""
    low: float = Field(default=0.8, ge=0, lt=1)
    """Samples take this share of the budget at least, while such are found."""
    start: float = Field(default=0.3, ge=0, le=1)
    """Weight of the band's own frequencies of choices in the first distributions; the rest is uniform."""
    delta0: float = Field(default=1.0, gt=0)
    """First length of a step (Fisher norm)."""
    alpha: float = Field(default=1.5, gt=0)
    quantile: float = Field(default=0.25, gt=0, le=0.5)


SEVERAL = 2
"""Samples per tier where answers drift or are noisy."""
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


class Pool(NamedTuple):
    """Architectures that tiers may ask for, ordered by tier, none twice in one: the tier, choices, predicted
    loss, and whether it need not be asked for, since it was evaluated before."""

    tier_N: IntArray
    choices_NS: IntArray
    loss_N: FloatArray
    known_N: BoolArray

    def take(self, index_N: IntArray) -> Pool:
        return Pool(
            self.tier_N[index_N], self.choices_NS[index_N], self.loss_N[index_N], self.known_N[index_N]
        )

    def joined(self, tier_N: IntArray, choices_NS: IntArray, loss_N: FloatArray) -> Pool:
        """With others, of which those that are new to a tier stay."""
        both = Pool(
            np.concatenate([self.tier_N, tier_N]),
            np.concatenate([self.choices_NS, choices_NS]),
            np.concatenate([self.loss_N, loss_N]),
            np.concatenate([self.known_N, np.zeros(len(tier_N), dtype=bool)]),
        )
        return both.take(evolution.first_of_each(np.column_stack([both.tier_N, both.choices_NS])))

    def span(self) -> tuple[IntArray, IntArray]:
        """For every member, where its tier begins and how many the tier has."""
        first_N = np.searchsorted(self.tier_N, self.tier_N)
        return first_N, np.searchsorted(self.tier_N, self.tier_N, side="right") - first_N

    def leaders(self, num: int, last_N: BoolArray | None = None) -> IntArray:
        """Where the best `num` of every tier stand, tier by tier; those of `last_N` are behind all others."""
        behind_N = np.zeros(len(self.tier_N)) if last_N is None else last_N
        order_N = np.lexsort((self.loss_N, behind_N, self.tier_N))
        first_N, _ = self.span()
        return np.asarray(order_N[np.arange(len(order_N)) - first_N < num])


def sampler(problem: SearchProblem, config: GuideSettings) -> tuple[Sampler[Guided], BandSampler]:
    """The guided sampler, and the bands that its distributions started from. Raises ConfigError where an
    iteration has a single evaluation and answers drift: they are compared within an iteration."""
    bands = BandSampler(problem)
    guide = _Guide(problem, config, bands)
    if guide.drifts and guide.samples_per_tier * len(problem.tiers) == 1:
        raise ConfigError(
            "importance: with train_in_search and one tier, surrogate.samples_per_tier must be 2 or more: "
            "losses are compared with others of the same step"
        )
    return Sampler(guide.init, guide.ask, guide.tell, guide.watch, lambda state: state.theta_KSC), bands


class _Guide:
    def __init__(self, problem: SearchProblem, config: GuideSettings, bands: BandSampler) -> None:
        self.problem, self.config, self.bands = problem, config, bands
        self.sizes = problem.sizes
        self.favourites_KNS = favourites(problem)
        self.drifts = problem.evaluator.trains and not problem.is_frozen
        self.samples_per_tier = config.samples_per_tier or (1 if problem.answers_are_fixed else SEVERAL)
        self._model: tuple[FloatArray, Surrogate] | None = None
        self._drawn: tuple[FloatArray, IntArray] | None = None

    def init(self) -> Guided:
        uniform_KSC = categorical.uniform(self.sizes, len(self.problem.tiers))
        theta_KSC = self.bands.mixed_into(uniform_KSC, self.config.start)
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
        num = self.samples_per_tier
        if self._too_few(state):
            chosen_KNS = self._first(state, num, rng)
        else:
            chosen_KNS = self._promising(state, rng)
        return chosen_KNS.swapaxes(0, 1).reshape(-1, len(self.sizes))

    def tell(
        self, state: Guided, choices_NS: IntArray, losses_N: FloatArray, usage_NK: FloatArray, rng: Generator
    ) -> Guided:
        state = self._remembering(state, self.problem.canonical(choices_NS), losses_N)
        if self._too_few(state):
            return state
        state = self._with_kernel(state)
        moved = categorical.adaptive_step(
            Adaptive(state.theta_KSC, state.slowdown_K, state.gamma_K, state.path_KSC),
            self._gradient(state, self._virtual(state, rng)),
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
        return int(state.told) < self.config.first_evaluations

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

    def _gradient(self, state: Guided, drawn_KNS: IntArray) -> FloatArray:
        """Every tier's natural gradient by the predicted losses of its samples, shape (K, S, C)."""
        num_tiers, num, _ = drawn_KNS.shape
        rows_NS = self.problem.canonical(drawn_KNS.reshape(num_tiers * num, -1))
        loss_KN = surrogate.predict(self._surrogate(state), rows_NS).reshape(num_tiers, num)
        utility_KN = categorical.quantile_utility(loss_KN, np.ones_like(loss_KN), self.config.quantile)
        return categorical.natural_gradient(state.theta_KSC, drawn_KNS, utility_KN)

    def _first(self, state: Guided, num: int, rng: Generator) -> IntArray:
        """What an earlier search liked best in every tier, before anything is known; else samples of p_k."""
        drawn_KNS = self._within_budget(state, num, rng)
        if not state.told:
            for drawn_NS, liked_NS in zip(drawn_KNS, self.favourites_KNS, strict=True):
                if len(liked_NS):
                    drawn_NS[:] = np.resize(liked_NS[:num], drawn_NS.shape)
        return drawn_KNS

    def _virtual(self, state: Guided, rng: Generator) -> IntArray:
        """Samples that cost no evaluation, shape (K, N, S), the same for all that see the same
        distributions."""
        if self._drawn is None or self._drawn[0] is not state.theta_KSC:
            drawn_KNS = self._within_budget(state, self.config.virtual_samples, rng)
            self._drawn = (state.theta_KSC, drawn_KNS)
        return self._drawn[1]

    def _within_budget(self, state: Guided, num: int, rng: Generator) -> IntArray:
        """Samples of every p_k, shape (K, num, S)."""
        return self.bands.draw_from(state.theta_KSC, num, self.config.low, rng)

    def _promising(self, state: Guided, rng: Generator) -> IntArray:
        """The most promising architectures of every tier, shape (K, N, S). None twice, while there are
        others, unless answers drift or one is to be confirmed: where they are noisy, a neighbour says as much
        of the known one as asking it again, and more of others."""
        model, num, num_tiers = self._surrogate(state), self.samples_per_tier, len(self.problem.tiers)
        pool = self._bred(self._pool(state, model, rng), model, rng)
        enough = max(SHORTLIST, num * num_tiers)  # where the other tiers choose first, some are left
        pool = pool.take(pool.leaders(enough, last_N=pool.known_N))
        mean_N, deviation_N = surrogate.predict_with_deviation(model, pool.choices_NS)
        pool = pool._replace(loss_N=mean_N - self.config.optimism * deviation_N)
        chosen_KNS = np.empty((num_tiers, num, len(self.sizes)), dtype=np.int64)
        taken: set[tuple[int, ...]] = set()
        for k, chosen_NS in enumerate(chosen_KNS):
            rows_NS, loss_N, known_N = (part[pool.tier_N == k] for part in pool[1:])
            taken_N = known_N | np.array([tuple(row) in taken for row in rows_NS.tolist()], dtype=bool)
            chosen_NS[:] = np.resize(rows_NS[np.lexsort((loss_N, taken_N))[:num]], chosen_NS.shape)
            taken |= set(map(tuple, chosen_NS.tolist()))
        return self._with_the_best_so_far(state, chosen_KNS) if self._confirms(state) else chosen_KNS

    def _confirms(self, state: Guided) -> bool:
        evaluator = self.problem.evaluator
        is_noise = evaluator.noisy and not evaluator.trains
        return is_noise and self.samples_per_tier > 1 and int(state.told) >= self.config.confirm_every

    def _with_the_best_so_far(self, state: Guided, chosen_KNS: IntArray) -> IntArray:
        """Of each tier's best so far those that have answered too seldom take its last places, once for all
        tiers."""
        rows_NS, index_E = np.unique(state.choices_ES, axis=0, return_inverse=True)
        index_E = index_E.reshape(-1)
        answers_N = np.bincount(index_E)
        mean_N = np.bincount(index_E, state.losses_E) / answers_N
        seldom_N = answers_N < 1 + state.told / self.config.confirm_every
        loss_NK = np.where(self.problem.usage_of(rows_NS) <= 1, mean_N[:, None], np.inf)
        confirmed: set[int] = set()
        for chosen_NS, loss_N in zip(chosen_KNS, loss_NK.T, strict=True):
            num = len(chosen_NS)
            best = [n for n in loss_N.argsort(kind="stable")[:num].tolist() if np.isfinite(loss_N[n])]
            again = [n for n in best if seldom_N[n] and n not in confirmed]
            chosen_NS[num - len(again) :] = rows_NS[again]
            confirmed.update(again)
        return chosen_KNS

    def _pool(self, state: Guided, model: Surrogate, rng: Generator) -> Pool:
        """Per tier what is known within its budget, and its samples."""
        drawn_KNS = self._virtual(state, rng)
        num_tiers, num, _ = drawn_KNS.shape
        drawn_NS = self.problem.canonical(drawn_KNS.reshape(num_tiers * num, -1))
        seen_NS = state.choices_ES[evolution.first_of_each(state.choices_ES)]
        tier_N, seen_N = np.nonzero(self.problem.usage_of(seen_NS).T <= 1)
        seen = Pool(
            tier_N,
            seen_NS[seen_N],
            surrogate.predict(model, seen_NS)[seen_N],
            np.full(len(seen_N), not self.drifts),
        )
        return seen.joined(np.repeat(np.arange(num_tiers), num), drawn_NS, surrogate.predict(model, drawn_NS))

    def _bred(self, pool: Pool, model: Surrogate, rng: Generator) -> Pool:
        """The pool with generations of its best ones' offspring that keep their tier's budget."""
        for _ in range(self.config.generations):
            parents = pool.take(pool.leaders(PARENTS))
            first_N, num_N = parents.span()
            litter = np.repeat(np.arange(len(num_N)), self.config.virtual_samples // PARENTS)
            mates_N = first_N[litter] + rng.integers(num_N[litter])
            crossed_NS = evolution.cross(parents.choices_NS[litter], parents.choices_NS[mates_N], rng)
            mutant_NS = evolution.mutate(crossed_NS, self.sizes, MUTATION, rng)
            children_NS, tier_N = self.problem.canonical(mutant_NS), parents.tier_N[litter]
            fits_N = self.bands.fits(children_NS, tier_N, self.config.low)
            children_NS, tier_N = children_NS[fits_N], tier_N[fits_N]
            pool = pool.joined(tier_N, children_NS, surrogate.predict(model, children_NS))
        return pool
