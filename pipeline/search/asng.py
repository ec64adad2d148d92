"""One independent ASNG run per tier, side by side: what `importance` is compared with.

Y. Akimoto et al., 2019, arXiv 1905.08537. Every tier learns from its own samples only; budgets are
handled as in `importance` with `guide: weights`, and the evaluations are shared out equally. Costs are known
for free: with `within_budget`, ours, nothing that exceeds its tier's budget is evaluated.
"""

from __future__ import annotations

import numpy as np
from numpy.random import Generator
from pydantic import Field

from pipeline.algorithms import categorical
from pipeline.search.bands import BandSampler
from pipeline.search.base import Sampler, SearchMethod, in_bands
from pipeline.search.importance import Distributions, StepSettings, weighted_sampler
from pipeline.search.problem import SearchProblem
from pipeline.types import FloatArray, IntArray


class Asng(StepSettings):
    """Settings of `asng`."""

    samples_per_tier: int = Field(default=2, ge=2)
    delta0: float = Field(default=1.0, gt=0)
    within_budget: bool = True
    """Samples take `low` to all of their tier's budget, by rejection, and distributions begin with `start` of
    the band's own frequencies of choices: both as in `importance`."""
    low: float = Field(default=0.8, ge=0, lt=1)
    start: float = Field(default=0.3, ge=0, le=1)


def sampler(problem: SearchProblem, config: Asng, bands: BandSampler) -> Sampler[Distributions]:
    """K searches that share nothing but the evaluator's weights."""
    published = weighted_sampler(problem, config, own_only)
    if not config.within_budget:
        return published

    def init() -> Distributions:
        state = published.init()
        start = categorical.adaptive_start(bands.mixed_into(state.theta_KSC, config.start))
        return Distributions(*start, pressure_K=state.pressure_K)

    def ask(state: Distributions, rng: Generator) -> IntArray:
        drawn_KNS = bands.draw_from(state.theta_KSC, config.samples_per_tier, config.low, rng)
        return drawn_KNS.swapaxes(0, 1).reshape(-1, len(problem.sizes))

    return published._replace(init=init, ask=ask)


def own_only(theta_KSC: FloatArray, choices_NS: IntArray) -> FloatArray:
    """K for a tier's own samples and 0 for all others, shape (K, N); the tiers take turns in N."""
    num_tiers = len(theta_KSC)
    return np.tile(num_tiers * np.eye(num_tiers), (1, len(choices_NS) // num_tiers))


METHOD = SearchMethod(
    Asng,
    in_bands("asng", sampler),
    warm_starts=True,
    asks=lambda config, num_tiers: config.samples_per_tier * num_tiers,
)
