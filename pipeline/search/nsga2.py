"""NSGA-II: one population on the front of loss and cost, which serves all tiers at once.

K. Deb, A. Pratap, S. Agarwal, T. Meyarivan, "A Fast and Elitist Multiobjective Genetic Algorithm: NSGA-II",
2002. Objectives are the loss and a cost per group of tiers whose limits differ by a factor alone, so one for
the tiers of a device that limit the same metric. Ours: the first population is drawn from the tiers' cost
bands, of several children the first new one that keeps the most generous budget is taken, for costs are
known without an evaluation, and an architecture has one place.

Losses are not asked for again: where they are noisy, lucky ones stay. Axes: K tiers, J objectives, P
members, N rows, S slots.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from pydantic import Field

from pipeline.algorithms import evolution
from pipeline.algorithms.pareto import crowding, front_ranks
from pipeline.search.bands import BandSampler
from pipeline.search.base import Sampler, SearchMethod, in_bands
from pipeline.search.problem import SearchProblem
from pipeline.search.start import favourites
from pipeline.settings import Settings
from pipeline.types import FloatArray, IntArray, Json, Tier

OVER_BUDGET = 1e9
"""What a member's loss grows by per unit of usage beyond the most generous budget."""


class Nsga2(Settings):
    """Settings of `nsga2`."""

    population: int = Field(default=20, ge=4)
    crossover: float = Field(default=0.9, ge=0, le=1)
    """Probability that a child has two parents, every slot from either."""
    mutation: float | None = Field(default=None, ge=0, le=1)
    """Probability that a slot changes, by default one in S; one changes at least."""
    children: int = Field(default=8, ge=1)
    """How many are tried for one that is new and keeps the most generous budget."""


class Members(NamedTuple):
    """An empty place has a loss of +inf."""

    choices_PS: IntArray
    loss_P: FloatArray
    usage_PK: FloatArray

    @classmethod
    def empty(cls, num: int, num_slots: int, num_tiers: int) -> Members:
        choices_PS = np.zeros((num, num_slots), dtype=np.int64)
        return cls(choices_PS, np.full(num, np.inf), np.full((num, num_tiers), np.inf))

    def at(self, places: IntArray) -> Members:
        return Members(self.choices_PS[places], self.loss_P[places], self.usage_PK[places])

    def plus(self, others: Members) -> Members:
        return Members(
            np.concatenate([self.choices_PS, others.choices_PS]),
            np.concatenate([self.loss_P, others.loss_P]),
            np.concatenate([self.usage_PK, others.usage_PK]),
        )

    @property
    def present(self) -> Members:
        return self.at(np.flatnonzero(np.isfinite(self.loss_P)))


def sampler(problem: SearchProblem, config: Nsga2, bands: BandSampler) -> Sampler[Members]:
    """A generation per iteration."""
    num_tiers, num_slots = len(problem.tiers), len(problem.sizes)
    num = config.population
    columns = cost_columns(problem.tiers)
    rate = 1 / num_slots if config.mutation is None else config.mutation
    founders_KNS = favourites(problem)

    def init() -> Members:
        return Members.empty(num, num_slots, num_tiers)

    def ask(state: Members, rng: Generator) -> IntArray:
        return children(state, rng) if np.isfinite(state.loss_P).any() else founders(rng)

    def founders(rng: Generator) -> IntArray:
        """Of every tier in turn, what an earlier search liked, then members of the band."""
        rows_NS = bands.draw(-(-num // num_tiers), rng)[:num]
        for n in range(num):
            liked_NS = founders_KNS[n % num_tiers]
            if n // num_tiers < len(liked_NS):
                rows_NS[n] = liked_NS[n // num_tiers]
        return rows_NS

    def children(state: Members, rng: Generator) -> IntArray:
        members = state.present
        place_P = np.argsort(best_first(objectives(members)))

        def parents() -> IntArray:
            entrants_N2 = rng.integers(len(place_P), size=(num * config.children, 2))
            winners_N = place_P[entrants_N2].argmin(axis=1)
            return np.asarray(entrants_N2[np.arange(len(entrants_N2)), winners_N])

        mother_NS, father_NS = members.choices_PS[parents()], members.choices_PS[parents()]
        two_N = rng.random(len(mother_NS)) < config.crossover
        bred_NS = np.where(two_N[:, None], evolution.cross(mother_NS, father_NS, rng), mother_NS)
        litter_NS = problem.canonical(evolution.mutate(bred_NS, problem.sizes, rate, rng))
        excess_N = np.maximum(problem.usage_of(litter_NS).min(axis=1), 1.0)
        known = {row.tobytes() for row in members.choices_PS}
        chosen: list[int] = []
        for start in range(0, len(litter_NS), config.children):
            litter = range(start, start + config.children)
            fresh = [n for n in litter if litter_NS[n].tobytes() not in known] or [start]
            chosen.append(min(fresh, key=excess_N.__getitem__))
            known.add(litter_NS[chosen[-1]].tobytes())
        return np.asarray(litter_NS[chosen])

    def objectives(members: Members) -> FloatArray:
        """Shape (P, J)."""
        excess_P = np.maximum(members.usage_PK.min(axis=1) - 1.0, 0.0)
        loss_P = members.loss_P + OVER_BUDGET * excess_P
        return np.column_stack([loss_P, members.usage_PK[:, columns]])

    def tell(
        state: Members, choices_NS: IntArray, losses_N: FloatArray, usage_NK: FloatArray, rng: Generator
    ) -> Members:
        told = Members(problem.canonical(choices_NS), losses_N, usage_NK).plus(state.present)
        first_N = evolution.first_of_each(told.choices_PS)
        everyone = told.at(np.sort(first_N))
        best = everyone.at(best_first(objectives(everyone))[:num])
        return best.plus(Members.empty(num - len(best.loss_P), num_slots, num_tiers))

    def watch(state: Members, choices_NS: IntArray, losses_N: FloatArray, usage_NK: FloatArray) -> list[Json]:
        """Of every tier the best of this generation that keeps its budget; where none does, the nearest."""
        records: list[Json] = []
        for usage_N in usage_NK.T:
            fits_N = usage_N <= 1
            best = int(np.where(fits_N, losses_N, np.inf).argmin() if fits_N.any() else usage_N.argmin())
            records.append({"usage": float(usage_N[best]), "loss": float(losses_N[best])})
        return records

    return Sampler(init, ask, tell, watch)


def cost_columns(tiers: tuple[Tier, ...]) -> list[int]:
    """One tier of each group whose limits are on the same metrics of a device, in the same proportions."""
    groups: dict[tuple[str, tuple[tuple[str, float], ...]], int] = {}
    for k, tier in enumerate(tiers):
        first = tier.limits[0].value
        shape = tuple(sorted((metric, round(limit / first, 9)) for metric, limit in tier.budgets.items()))
        groups.setdefault((tier.device, shape), k)
    return list(groups.values())


def best_first(points_NJ: FloatArray) -> IntArray:
    """Order by front, and within one by crowding distance, the loneliest first."""
    ranks_N = front_ranks(points_NJ)
    distance_N = np.empty(len(points_NJ))
    for rank in np.unique(ranks_N):
        distance_N[ranks_N == rank] = crowding(points_NJ[ranks_N == rank])
    return np.lexsort([-distance_N, ranks_N])


METHOD = SearchMethod(
    Nsga2, in_bands("nsga2", sampler), warm_starts=True, asks=lambda config, num_tiers: config.population
)
