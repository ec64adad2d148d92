"""Multiple-gradient descent: one direction for several objectives.

J.-A. Désidéri, "Multiple-gradient descent algorithm (MGDA) for multiobjective optimization", Comptes
Rendus Mathematique 350, 2012. The shortest vector d in the convex hull of the gradients has d·g_j ≥ ‖d‖²
for every j, so that a step along −d makes no objective worse; d = 0 is Pareto-stationary: no direction
does better by one objective without doing worse by another. Two gradients have a closed form; for more
it is found by the active-set method of P. Wolfe, "Finding the nearest point in a polytope", Mathematical
Programming 11, 1976, which ends after finitely many steps.

The gradients' lengths count: d is pulled towards the short ones, since equal *differences* of the
objectives are what it equalises. Axes: J objectives, D dimensions.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.types import FloatArray

TOLERANCE = 1e-12
"""Of squared lengths, as a share of the longest gradient's."""


def weights(gradients_JD: FloatArray, least: float = 0.0) -> FloatArray:
    """Convex weights (J,) of the direction, each `least` or more.

    A gradient that is exactly zero asks for nothing: its objective is left out, with the weight 0 (as
    part of the hull it would stop all the others). Where all are zero, weights are equal."""
    assert 0 <= least * len(gradients_JD) <= 1, f"{len(gradients_JD)} weights of {least} are more than 1"
    asks_J = gradients_JD.any(axis=1)
    if not asks_J.any():
        return np.full(len(gradients_JD), 1 / len(gradients_JD))
    weights_J = np.zeros(len(gradients_JD))
    weights_J[asks_J] = raised(nearest(gradients_JD[asks_J]), least)
    return weights_J


def nearest(gradients_JD: FloatArray) -> FloatArray:
    """Convex weights (J,) of the shortest vector in the hull."""
    if len(gradients_JD) == 2:
        share = nearest_of_two(gradients_JD[0], gradients_JD[1])
        return np.array([share, 1 - share])
    return _wolfe(gradients_JD @ gradients_JD.T)


def nearest_of_two(first_D: FloatArray, second_D: FloatArray) -> float:
    """The first one's weight: (g₂·g₂ − g₁·g₂) / ‖g₁ − g₂‖², within [0, 1]; ½ where they are equal."""
    apart_D = first_D - second_D
    squared = float(apart_D @ apart_D)
    return 0.5 if squared == 0 else float(np.clip(-(apart_D @ second_D) / squared, 0.0, 1.0))


def raised(weights_J: FloatArray, least: float) -> FloatArray:
    """Weights below `least` are raised to it, and the others make way in proportion. Of two weights this
    is the limit [least, 1 − least]."""
    low_J = weights_J < least
    while low_J.any() and not low_J.all():
        left = 1 - least * low_J.sum()
        raised_J = np.where(low_J, least, weights_J * left / weights_J[~low_J].sum())
        if not (raised_J[~low_J] < least).any():
            return np.asarray(raised_J)
        low_J = low_J | (raised_J < least)
    return np.full(len(weights_J), 1 / len(weights_J)) if low_J.all() else weights_J


def _wolfe(gram_JJ: FloatArray) -> FloatArray:
    """Convex weights w that minimise wᵀ·gram·w. A corral of gradients is kept whose nearest point has
    weights above zero on all of them; whoever lies on the near side of that point joins."""
    tolerance = TOLERANCE * float(gram_JJ.diagonal().max())
    weights_J = np.zeros(len(gram_JJ))
    weights_J[gram_JJ.diagonal().argmin()] = 1.0
    for _ in range(100 * len(gram_JJ)):
        along_J = gram_JJ @ weights_J
        joins = int(along_J.argmin())
        if weights_J @ along_J - along_J[joins] <= tolerance or weights_J[joins] > 0:
            break
        corral_J = weights_J > 0
        corral_J[joins] = True
        weights_J = _settle(gram_JJ, weights_J, corral_J)
    return weights_J


def _settle(gram_JJ: FloatArray, weights_J: FloatArray, corral_J: NDArray[np.bool_]) -> FloatArray:
    """From these weights towards the nearest point of the corral's plane; whoever would get a weight
    below zero on the way leaves."""
    while True:
        goal_J = _nearest_of_plane(gram_JJ, corral_J)
        if (goal_J[corral_J] > 0).all():
            return goal_J
        falls_J = corral_J & (goal_J <= 0)
        way_J = np.divide(
            weights_J, weights_J - goal_J, out=np.ones_like(weights_J), where=falls_J & (weights_J > goal_J)
        )
        share = float(way_J[falls_J].min())
        weights_J = np.maximum(weights_J + share * (goal_J - weights_J), 0.0)
        corral_J = corral_J & ~(falls_J & (way_J <= share))
        weights_J = np.where(corral_J, weights_J, 0.0)
        weights_J = weights_J / weights_J.sum()


def _nearest_of_plane(gram_JJ: FloatArray, corral_J: NDArray[np.bool_]) -> FloatArray:
    """Weights, of any sign, that sum to 1 and are 0 outside the corral, of the plane's point nearest to
    0: there the derivatives by all of the corral's weights are equal."""
    num = int(corral_J.sum())
    scale = float(gram_JJ.diagonal().max())
    bordered = np.zeros((num + 1, num + 1))
    bordered[0, 1:] = bordered[1:, 0] = 1.0
    bordered[1:, 1:] = gram_JJ[np.ix_(corral_J, corral_J)] / scale
    right = np.zeros(num + 1)
    right[0] = 1.0
    weights_J = np.zeros(len(gram_JJ))
    weights_J[corral_J] = np.linalg.lstsq(bordered, right, rcond=None)[0][1:]
    return weights_J
