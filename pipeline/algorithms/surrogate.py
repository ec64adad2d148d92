"""A Gaussian process over tuples of choices: what the evaluations so far say of architectures not yet
evaluated.

C. E. Rasmussen, C. K. I. Williams, "Gaussian Processes for Machine Learning", 2006, chapter 2 (prediction)
and 5 (marginal likelihood). The kernel is exp(−h/ℓ) of the Hamming distance h; it holds additive effects of
choices as well as interactions. Evaluations of one group (made on the same minibatch, with the same
weights) may share an offset, which prediction leaves out. Axes: N evaluations, S slots, Q queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pipeline.algorithms.categorical import one_hot
from pipeline.types import FloatArray, IntArray

LENGTHS = (0.3, 0.6, 1.2)
"""Length scales tried, in numbers of slots."""
NOISES = (0.01, 0.1, 0.5)
"""Noise variances tried, in units of the kernel's."""
SELECTION_LIMIT = 160
"""The latest so many evaluations select length scale and noise."""


class Surrogate(NamedTuple):
    """A fitted process: what was seen, the Cholesky factor of its covariance, and the weights of the mean."""

    hot_NF: FloatArray
    factor_NN: FloatArray
    weights_N: FloatArray
    mean: float
    scale: float
    length: float


def fit(
    choices_NS: IntArray,
    values_N: FloatArray,
    groups_N: IntArray,
    sizes: Sequence[int],
    group_variance: float = 0.0,
) -> Surrogate:
    """The process given N evaluations; length scale and noise are those of the largest marginal likelihood.

    Values beyond the median by more than three times its distance to the best are drawn in to there: how
    bad a failure is says little about what is good."""
    from scipy.linalg import cho_solve

    middle = np.median(values_N)
    values_N = np.minimum(values_N, middle + 3.0 * (middle - values_N.min()))
    mean, scale = float(values_N.mean()), float(values_N.std()) or 1.0
    scaled_N = (values_N - mean) / scale
    hot_NF = _features(choices_NS, sizes)
    distance_NN = len(sizes) - hot_NF @ hot_NF.T
    shared_NN = group_variance * (groups_N[:, None] == groups_N)
    last = slice(-SELECTION_LIMIT, None)
    length, noise = _select(distance_NN[last, last], shared_NN[last, last], scaled_N[last], len(sizes))
    factor_NN = np.linalg.cholesky(np.exp(-distance_NN / length) + shared_NN + noise * np.eye(len(values_N)))
    return Surrogate(hot_NF, factor_NN, cho_solve((factor_NN, True), scaled_N), mean, scale, length)


def predict(
    surrogate: Surrogate, choices_QS: IntArray, sizes: Sequence[int]
) -> tuple[FloatArray, FloatArray]:
    """Posterior mean and standard deviation (without noise) at Q queries, in the values' unit."""
    from scipy.linalg import solve_triangular

    distance_QN = len(sizes) - _features(choices_QS, sizes) @ surrogate.hot_NF.T
    kernel_QN = np.exp(-distance_QN / surrogate.length)
    explained_Q = (solve_triangular(surrogate.factor_NN, kernel_QN.T, lower=True) ** 2).sum(axis=0)
    deviation_Q = surrogate.scale * np.sqrt(np.maximum(1.0 - explained_Q, 0.0))
    return surrogate.mean + surrogate.scale * (kernel_QN @ surrogate.weights_N), deviation_Q


def _features(choices_NS: IntArray, sizes: Sequence[int]) -> FloatArray:
    return one_hot(choices_NS, max(sizes)).reshape(len(choices_NS), -1)


def _select(
    distance_NN: FloatArray, shared_NN: FloatArray, values_N: FloatArray, num_slots: int
) -> tuple[float, float]:
    """(length, noise) of the largest marginal likelihood, the overall variance profiled out."""
    from scipy.linalg import solve_triangular

    def log_likelihood(length: float, noise: float) -> float:
        covariance_NN = np.exp(-distance_NN / length) + shared_NN + noise * np.eye(len(values_N))
        factor_NN = np.linalg.cholesky(covariance_NN)
        white_N = solve_triangular(factor_NN, values_N, lower=True)
        fit_term = 0.5 * len(values_N) * np.log(max(float(white_N @ white_N), 1e-300) / len(values_N))
        return float(-fit_term - np.log(np.diag(factor_NN)).sum())

    tried = [(length * num_slots, noise) for length in LENGTHS for noise in NOISES]
    return max(tried, key=lambda pair: log_likelihood(*pair))
