"""Random search, uniform within each tier's cost band: the baseline that a search has to beat."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from numpy.random import Generator
from pydantic import Field

from pipeline.search.bands import BandSampler
from pipeline.search.base import Sampler, SearchMethod, drive
from pipeline.search.problem import SearchProblem
from pipeline.settings import Settings
from pipeline.types import Checkpoint, FloatArray, IntArray, Json, Progress, SearchResult


class Random(Settings):
    """Settings of `random`."""

    samples_per_tier: int = Field(default=4, ge=1)
    low: float = Field(default=0.85, gt=0, lt=1)
    """A tier's band reaches from this share of its budget to the budget."""


class Nothing(NamedTuple):
    """Random search remembers nothing."""


def run(
    problem: SearchProblem,
    config: Random,
    *,
    checkpoint: Checkpoint,
    trace: Callable[[Json], None],
    progress: Progress,
) -> SearchResult:
    """Draw from the tiers' bands in turn. Raises InfeasibleBudget for a tier without any member."""
    bands = BandSampler(problem, config.low)

    def ask(state: Nothing, rng: Generator) -> IntArray:
        return bands.draw(config.samples_per_tier, rng)

    def tell(
        state: Nothing, choices_NS: IntArray, losses_N: FloatArray, usage_NK: FloatArray, rng: Generator
    ) -> Nothing:
        return state

    return drive(
        "random",
        problem,
        config,
        Sampler(Nothing, ask, tell),
        checkpoint=checkpoint,
        trace=trace,
        progress=progress,
        bands=bands,
    )


METHOD = SearchMethod(Random, run, asks=lambda config, num_tiers: config.samples_per_tier * num_tiers)
