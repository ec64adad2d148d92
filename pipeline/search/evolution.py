"""Regularised evolution, a population per tier.

E. Real, A. Aggarwal, Y. Huang, Q. V. Le, 2018, arXiv 1802.01548. Ours: populations begin in their tier's
cost band, a member over budget is worse than any that keeps it, and of several children the first that
keeps the budget is taken, for costs are known without an evaluation. Axes: K tiers, P members, S slots.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from pydantic import Field

from pipeline.algorithms import evolution
from pipeline.algorithms.evolution import Population
from pipeline.search.bands import BandSampler
from pipeline.search.base import Sampler, SearchMethod, in_bands
from pipeline.search.problem import SearchProblem
from pipeline.search.start import favourites
from pipeline.settings import Settings
from pipeline.types import FloatArray, IntArray, Json

OVER_BUDGET = 1e9
"""Times its usage: the fitness of a member that breaks its budget, worse than any loss."""


class Evolution(Settings):
    """Settings of `evolution`."""

    population: int = Field(default=10, ge=2)
    tournament: int = Field(default=3, ge=1)
    mutation: float = Field(default=0.0, ge=0, le=1)
    """Probability that a slot changes; one changes at least."""
    children: int = Field(default=16, ge=1)
    """How many children are tried for one that keeps the budget."""


class Populations(NamedTuple):
    """A population per tier, all of the same age."""

    choices_KPS: IntArray
    fitness_KP: FloatArray
    born: IntArray


def sampler(problem: SearchProblem, config: Evolution, bands: BandSampler) -> Sampler[Populations]:
    """One child per tier and iteration; until the populations are full, the favourites of an earlier search,
    then members of the band."""
    num_tiers, num_slots = len(problem.tiers), len(problem.sizes)
    founders_KNS = favourites(problem)

    def init() -> Populations:
        return _joined([evolution.empty_population(config.population, num_slots)] * num_tiers)

    def ask(state: Populations, rng: Generator) -> IntArray:
        populations = _split(state)
        if not populations[0].full:
            return founders(int(state.born), rng)
        return np.stack([child(k, population, rng) for k, population in enumerate(populations)])

    def founders(born: int, rng: Generator) -> IntArray:
        members_KS = bands.draw(1, rng)
        for k, rows_NS in enumerate(founders_KNS):
            if born < len(rows_NS):
                members_KS[k] = rows_NS[born]
        return members_KS

    def child(k: int, population: Population, rng: Generator) -> IntArray:
        parent_1S = evolution.tournament(population, config.tournament, 1, rng)
        litter_NS = np.repeat(parent_1S, config.children, axis=0)
        children_NS = evolution.mutate(litter_NS, problem.sizes, config.mutation, rng)
        usage_N = problem.usage_of(children_NS)[:, k]
        return np.asarray(children_NS[np.argmin(np.maximum(usage_N, 1.0))])

    def tell(
        state: Populations, choices_KS: IntArray, losses_K: FloatArray, usage_KK: FloatArray, rng: Generator
    ) -> Populations:
        own_K = np.diag(usage_KK)
        fitness_K = np.where(own_K > 1, OVER_BUDGET * own_K, losses_K)
        return _joined(
            [
                evolution.add(population, choices_KS[k : k + 1], fitness_K[k : k + 1])
                for k, population in enumerate(_split(state))
            ]
        )

    def watch(
        state: Populations, choices_KS: IntArray, losses_K: FloatArray, usage_KK: FloatArray
    ) -> list[Json]:
        own_K = np.diag(usage_KK)
        return [{"usage": float(own_K[k]), "loss": float(losses_K[k])} for k in range(num_tiers)]

    return Sampler(init, ask, tell, watch)


def _split(state: Populations) -> list[Population]:
    return [Population(*rows, state.born) for rows in zip(state.choices_KPS, state.fitness_KP, strict=True)]


def _joined(populations: list[Population]) -> Populations:
    return Populations(
        np.stack([population.choices_PS for population in populations]),
        np.stack([population.fitness_P for population in populations]),
        populations[0].born,
    )


METHOD = SearchMethod(Evolution, in_bands("evolution", sampler), warm_starts=True)
