"""A warm start: what an earlier search, perhaps on a cheaper evaluator, liked within each tier's budget.

Ours. The earlier search's losses are not comparable with this one's, so only their order within a tier's
budget is used, to say where distributions, populations and first evaluations begin. On NAS-Bench-201, with
300 cells scored by nwot to begin with, evolution gains most and the surrogate of `importance` nothing.
Axes: K tiers, N architectures, S slots, C choices.
"""

from __future__ import annotations

import numpy as np

from pipeline.algorithms import categorical
from pipeline.search.problem import SearchProblem
from pipeline.types import FloatArray, IntArray

LOW = 0.5
"""An earlier architecture speaks for a tier if it takes this share of its budget at least."""
BEST_SHARE, FEWEST = 0.25, 8
"""The best quarter of those are the tier's favourites, and so many at least."""
WEIGHT = 0.5
"""Of the favourites' frequencies of choices in the first distributions; the rest is uniform."""


def favourites(problem: SearchProblem) -> list[IntArray]:
    """Per tier the best of `problem.earlier` that fit it, the best first, shape (N, S); N may be 0."""
    rows_NS = np.array([c.arch.choices for c in problem.earlier], dtype=np.int64)
    rows_NS = rows_NS.reshape(-1, len(problem.sizes))
    loss_N = np.array([c.loss for c in problem.earlier], dtype=float)
    usage_NK = problem.usage_of(rows_NS)
    return [_best(rows_NS, loss_N, usage_N) for usage_N in usage_NK.T]


def _best(rows_NS: IntArray, loss_N: FloatArray, usage_N: FloatArray) -> IntArray:
    fits_N = np.flatnonzero((usage_N >= LOW) & (usage_N <= 1))
    count = max(FEWEST, round(BEST_SHARE * len(fits_N)))
    return rows_NS[fits_N[np.argsort(loss_N[fits_N], kind="stable")[:count]]]


def first_distributions(problem: SearchProblem) -> FloatArray:
    """θ to begin with, shape (K, S, C): uniform, mixed with the frequencies of choices among the tier's
    favourites, if it has any."""
    theta_KSC = categorical.uniform(problem.sizes, len(problem.tiers))
    for k, rows_NS in enumerate(favourites(problem)):
        if len(rows_NS):
            frequency_SC = categorical.one_hot(rows_NS, max(problem.sizes)).mean(axis=0)
            theta_KSC[k] = (1 - WEIGHT) * theta_KSC[k] + WEIGHT * frequency_SC
            theta_KSC[k : k + 1] = categorical.with_margin(theta_KSC[k : k + 1], problem.sizes)
    return theta_KSC
