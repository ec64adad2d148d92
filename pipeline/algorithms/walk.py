"""Random walks into a band of costs, for budgets that random architectures seldom meet."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.random import Generator

from pipeline.algorithms import evolution
from pipeline.types import BoolArray, FloatArray, IntArray

WALKERS = 64
Look = Callable[[IntArray], tuple[IntArray, FloatArray]]
"""Rows of choices (N, S) → their canonical form (N, S) and the share of the budget that they take (N,)."""


def in_band(usage_N: FloatArray, low: float) -> BoolArray:
    """Whether `low` to 1 of the budget is taken."""
    return np.asarray((usage_N >= low) & (usage_N <= 1.0))


def walk_into_band(
    rows_NS: IntArray,
    usage_N: FloatArray,
    look: Look,
    *,
    low: float,
    enough: int,
    sizes: Sequence[int],
    rng: Generator,
    rounds: int = 200,
) -> tuple[IntArray, FloatArray]:
    """The rows, and what walkers from the nearest of them see until four times `enough` are in the band:
    distinct rows and their usage. A step changes one choice and must not lead away."""
    near = np.argsort(_distance(usage_N, low), kind="stable")[:WALKERS]
    at_NS, at_N = rows_NS[near], usage_N[near]
    seen_NS, seen_N, found = [rows_NS], [usage_N], int(in_band(usage_N, low).sum())
    for _ in range(rounds):
        moved_NS, moved_N = look(evolution.mutate(at_NS, sizes, 0.0, rng))
        better_N = _distance(moved_N, low) <= _distance(at_N, low)
        at_NS, at_N = np.where(better_N[:, None], moved_NS, at_NS), np.where(better_N, moved_N, at_N)
        seen_NS.append(moved_NS[better_N])
        seen_N.append(moved_N[better_N])
        found += int(in_band(moved_N[better_N], low).sum())
        if found >= 4 * enough:
            break
    all_NS = np.concatenate(seen_NS)
    first_N = evolution.first_of_each(all_NS)
    return all_NS[first_N], np.concatenate(seen_N)[first_N]


def _distance(usage_N: FloatArray, low: float) -> FloatArray:
    """How far (in log cost) from the band; 0 inside."""
    log_N = np.log(np.maximum(usage_N, 1e-12))
    return np.asarray(np.maximum(log_N, 0.0) + np.maximum(math.log(low) - log_N, 0.0))
