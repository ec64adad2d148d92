"""Random walks into a band of costs, for budgets that random architectures seldom meet."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.random import Generator

from pipeline.algorithms import evolution
from pipeline.types import BoolArray, FloatArray, IntArray

WALKERS, CHANGES, PATIENCE = 64, 2.0, 100
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
    rounds: int = 1000,
) -> tuple[IntArray, FloatArray]:
    """The rows, and what walkers from the nearest of them see until `enough` distinct ones are in the band:
    distinct rows and their usage. A step changes about two choices, so that one can make up for the other
    inside a narrow band, and must not lead away. Walkers give up after `rounds` steps, and after a hundred
    that neither found anything new nor led nearer."""
    near = np.argsort(_distance(usage_N, low), kind="stable")[:WALKERS]
    at_NS, at_N = rows_NS[near], usage_N[near]
    seen_NS, seen_N = [rows_NS], [usage_N]
    found = _written(rows_NS[in_band(usage_N, low)])
    nearest, since = _distance(at_N, low).sum(), 0
    rate = CHANGES / max(CHANGES, sum(size > 1 for size in sizes))
    for _ in range(rounds):
        if len(found) >= enough or since == PATIENCE:
            break
        moved_NS, moved_N = look(evolution.mutate(at_NS, sizes, rate, rng))
        better_N = _distance(moved_N, low) <= _distance(at_N, low)
        at_NS, at_N = np.where(better_N[:, None], moved_NS, at_NS), np.where(better_N, moved_N, at_N)
        seen_NS.append(moved_NS[better_N])
        seen_N.append(moved_N[better_N])
        before = len(found), nearest
        found |= _written(moved_NS[better_N & in_band(moved_N, low)])
        nearest = _distance(at_N, low).sum()
        since = since + 1 if before == (len(found), nearest) else 0
    all_NS = np.concatenate(seen_NS)
    first_N = evolution.first_of_each(all_NS)
    return all_NS[first_N], np.concatenate(seen_N)[first_N]


def _written(rows_NS: IntArray) -> set[bytes]:
    return {row_S.tobytes() for row_S in rows_NS}


def _distance(usage_N: FloatArray, low: float) -> FloatArray:
    """How far (in log cost) from the band; 0 inside."""
    log_N = np.log(np.maximum(usage_N, 1e-12))
    return np.asarray(np.maximum(log_N, 0.0) + np.maximum(math.log(low) - log_N, 0.0))
