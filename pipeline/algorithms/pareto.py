"""Dominance, non-dominated sorting and hypervolume; every objective is to be minimised.

K. Deb, A. Pratap, S. Agarwal, T. Meyarivan, "A Fast and Elitist Multiobjective Genetic Algorithm: NSGA-II",
2002, for the fronts; E. Zitzler, L. Thiele, 1999, for the hypervolume. Axes: N points, J objectives.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.types import FloatArray, IntArray


def dominates(points_NJ: FloatArray) -> NDArray[np.bool_]:
    """Entry (i, j) tells whether point i is nowhere worse than j and somewhere better, shape (N, N)."""
    nowhere_worse = (points_NJ[:, None] <= points_NJ[None]).all(axis=2)
    somewhere_better = (points_NJ[:, None] < points_NJ[None]).any(axis=2)
    return np.asarray(nowhere_worse & somewhere_better)


def front_ranks(points_NJ: FloatArray) -> IntArray:
    """0 for points that none dominates, 1 for those that only front 0 dominates, and so on, shape (N,)."""
    dominates_NN = dominates(points_NJ)
    ranks_N = np.full(len(points_NJ), -1, dtype=np.int64)
    rank = 0
    while (open_N := ranks_N < 0).any():
        ranks_N[open_N & ~dominates_NN[open_N].any(axis=0)] = rank
        rank += 1
    return ranks_N


def crowding(points_NJ: FloatArray) -> FloatArray:
    """How far apart the neighbours of a point are along a front, summed over the objectives in units of their
    range; infinite at either end of one. Shape (N,). An objective in which all are alike adds nothing."""
    distance_N = np.zeros(len(points_NJ))
    for value_N in points_NJ.T:
        order_N = np.argsort(value_N, kind="stable")
        reach = value_N[order_N[-1]] - value_N[order_N[0]]
        if reach > 0:
            distance_N[order_N[[0, -1]]] = np.inf
            distance_N[order_N[1:-1]] += (value_N[order_N[2:]] - value_N[order_N[:-2]]) / reach
    return distance_N


def hypervolume(points_NJ: FloatArray, reference_J: FloatArray) -> float:
    """Volume between the reference point and what the points dominate; points beyond the reference add
    nothing.

    By slicing along the last objective: exact, and quick for two or three objectives and some hundred
    points."""
    points_NJ = points_NJ[(points_NJ < reference_J).all(axis=1)]
    if not len(points_NJ):
        return 0.0
    if points_NJ.shape[1] == 1:
        return float(reference_J[0] - points_NJ.min())
    order_N = np.argsort(points_NJ[:, -1], kind="stable")
    points_NJ = points_NJ[order_N]
    heights_N = np.diff(np.append(points_NJ[:, -1], reference_J[-1]))
    return sum(
        float(height) * hypervolume(points_NJ[: i + 1, :-1], reference_J[:-1])
        for i, height in enumerate(heights_N)
        if height > 0
    )
