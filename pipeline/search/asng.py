"""One independent ASNG run per tier, side by side: what `importance` is compared with.

Y. Akimoto et al., 2019, arXiv 1905.08537. Every tier learns from its own samples only; budgets are
handled as in `importance` with `guide: weights`, and the evaluations are shared out equally.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pipeline.search.base import SearchMethod, drive
from pipeline.search.importance import StepSettings, weighted_sampler
from pipeline.search.problem import SearchProblem
from pipeline.types import Checkpoint, FloatArray, IntArray, Json, Progress, SearchResult


class Asng(StepSettings):
    """Settings of `asng`."""


def run(
    problem: SearchProblem,
    config: Asng,
    *,
    checkpoint: Checkpoint,
    trace: Callable[[Json], None],
    progress: Progress,
) -> SearchResult:
    """K searches that share nothing but the evaluator's weights."""
    sampler = weighted_sampler(problem, config, own_only)
    return drive("asng", problem, config, sampler, checkpoint=checkpoint, trace=trace, progress=progress)


def own_only(theta_KSC: FloatArray, choices_NS: IntArray) -> FloatArray:
    """K for a tier's own samples and 0 for all others, shape (K, N); the tiers take turns in N."""
    num_tiers = len(theta_KSC)
    return np.tile(num_tiers * np.eye(num_tiers), (1, len(choices_NS) // num_tiers))


METHOD = SearchMethod(
    Asng, run, warm_starts=True, asks=lambda config, num_tiers: config.samples_per_tier * num_tiers
)
