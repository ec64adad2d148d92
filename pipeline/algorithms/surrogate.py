"""A Gaussian process over tuples of choices: what the evaluations so far say of architectures not yet
evaluated.

C. E. Rasmussen, C. K. I. Williams, "Gaussian Processes for Machine Learning", 2006, chapter 2 (prediction)
and 5 (marginal likelihood). Ours are the kernel and the scale. The kernel is a mixture of exp(−h/ℓ) and
exp(−c/ℓ): h counts the slots where two architectures differ, c those that would still differ if choices
could trade places among slots that offer the same ones. So an operation that is good in one stage is
expected to be good in another, as far as the evaluations bear that out. Losses are seen on a logarithmic
scale from the best one up, which tells the good apart and lets failures be failures.

Evaluations of one group (made on the same minibatch, with the same weights) may share an offset, which
prediction leaves out: losses are taken relative to their group's mean, and how far that mean is from the
mean of all is part of the model.

Everything is worked out on one thread, where the BLAS can be told so: matrices of a few hundred rows take
longer on two (on a machine of two, three times as long), and sums differ with the number of threads.
Axes: N evaluations, S slots, Q queries, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, wraps
from typing import TYPE_CHECKING, NamedTuple, ParamSpec, TypeVar

import numpy as np

from pipeline.types import FloatArray, IntArray, Slot

if TYPE_CHECKING:
    from threadpoolctl import ThreadpoolController

P = ParamSpec("P")
R = TypeVar("R")

LENGTHS = (0.3, 0.6, 1.2, 2.4)
"""Length scales tried, in numbers of slots."""
NOISES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
"""Noise variances tried, in units of the kernel's."""
TRADES = (0.0, 0.5)
"""Shares of the kernel tried in which choices may trade places."""
SELECTION_LIMIT = 160
"""The latest so many evaluations select length scale, noise and share."""
SOFTNESS = 0.2
"""Where the logarithm begins, in units of the median's distance to the best."""


GROUP_VARIANCE = 1.0
"""Of a group's mean, in units of the kernel's."""


class Kernel(NamedTuple):
    """Length scale (slots), noise variance, and share of trading."""

    length: float
    noise: float
    trade: float


class Surrogate(NamedTuple):
    """A fitted process: what was seen, the inverse of its covariance, and the weights of the mean."""

    slots: tuple[Slot, ...]
    kernel: Kernel
    own_NF: FloatArray
    traded_NF: FloatArray
    inverse_NN: FloatArray
    weights_N: FloatArray
    mean: float
    scale: float


def on_one_thread(work: Callable[P, R]) -> Callable[P, R]:
    """`work`, with the BLAS of the whole process on one thread meanwhile; not to be called by several threads
    at a time."""

    @wraps(work)
    def worked(*args: P.args, **kwargs: P.kwargs) -> R:
        with _threads().limit(limits=1, user_api="blas"):
            return work(*args, **kwargs)

    return worked


@cache
def _threads() -> ThreadpoolController:
    """Of the linear algebra of numpy and scipy, which must be loaded to be found."""
    import scipy.linalg  # noqa: F401
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()


@on_one_thread
def fit(
    choices_NS: IntArray,
    losses_N: FloatArray,
    slots: Sequence[Slot],
    groups_N: IntArray | None = None,
    kernel: Kernel | None = None,
) -> Surrogate:
    """The process given N evaluations, with the kernel given or the likeliest one (`select`).

    Without groups, losses are comparable as they are."""
    from scipy.linalg import lapack

    own_NF, traded_NF = features(choices_NS, slots)
    scaled_N, mean, scale = _scaled(losses_N, groups_N)
    kernel = kernel or select(choices_NS, losses_N, slots, groups_N)
    covariance_NN = _kernel(own_NF, traded_NF, own_NF, traded_NF, len(slots), kernel)
    covariance_NN += _offsets(groups_N, len(losses_N))
    covariance_NN[np.diag_indices(len(losses_N))] += kernel.noise
    half_NN, failed = lapack.dpotri(np.linalg.cholesky(covariance_NN), lower=1)
    assert not failed
    inverse_NN = np.tril(half_NN) + np.tril(half_NN, -1).T
    return Surrogate(tuple(slots), kernel, own_NF, traded_NF, inverse_NN, inverse_NN @ scaled_N, mean, scale)


@on_one_thread
def predict(surrogate: Surrogate, choices_QS: IntArray) -> FloatArray:
    """Posterior mean at Q queries, on the logarithmic scale of `fit`: it orders, it is no loss."""
    return surrogate.mean + surrogate.scale * (_cross(surrogate, choices_QS) @ surrogate.weights_N)


@on_one_thread
def predict_with_deviation(surrogate: Surrogate, choices_QS: IntArray) -> tuple[FloatArray, FloatArray]:
    """Posterior mean and standard deviation, noise left out."""
    cross_QN = _cross(surrogate, choices_QS)
    explained_Q = np.einsum("qn,qn->q", cross_QN @ surrogate.inverse_NN, cross_QN)
    deviation_Q = surrogate.scale * np.sqrt(np.maximum(1.0 - explained_Q, 0.0))
    return surrogate.mean + surrogate.scale * (cross_QN @ surrogate.weights_N), deviation_Q


@on_one_thread
def select(
    choices_NS: IntArray, losses_N: FloatArray, slots: Sequence[Slot], groups_N: IntArray | None = None
) -> Kernel:
    """The kernel of the largest marginal likelihood by the latest evaluations, the overall variance profiled
    out."""
    last = slice(-SELECTION_LIMIT, None)
    groups_N = None if groups_N is None else groups_N[last]
    own_NF, traded_NF = features(choices_NS[last], slots)
    scaled_N, _, _ = _scaled(losses_N[last], groups_N)
    offsets_NN = _offsets(groups_N, len(scaled_N))
    can_trade = len({slot.choices for slot in slots}) < len(slots)
    likelihood: dict[Kernel, float] = {}
    for length in LENGTHS:
        for trade in TRADES if can_trade else TRADES[:1]:
            smooth = Kernel(length * len(slots), 0.0, trade)
            smooth_NN = _kernel(own_NF, traded_NF, own_NF, traded_NF, len(slots), smooth) + offsets_NN
            for noise in NOISES:
                covariance_NN = smooth_NN.T.copy(order="F")  # symmetric; LAPACK wants columns
                covariance_NN[np.diag_indices(len(scaled_N))] += noise
                likelihood[smooth._replace(noise=noise)] = _log_likelihood(covariance_NN, scaled_N)
    return max(likelihood, key=lambda kernel: likelihood[kernel])


def _log_likelihood(covariance_NN: FloatArray, values_N: FloatArray) -> float:
    """Up to a constant; the covariance is overwritten."""
    from scipy.linalg import lapack

    factor_NN, failed = lapack.dpotrf(covariance_NN, lower=1, clean=0, overwrite_a=1)
    assert not failed
    white_N, _ = lapack.dtrtrs(factor_NN, values_N, lower=1)
    fit_term = 0.5 * len(values_N) * np.log(max(float(white_N @ white_N), 1e-300) / len(values_N))
    return float(-fit_term - np.log(np.diag(factor_NN)).sum())


def _scaled(losses_N: FloatArray, groups_N: IntArray | None) -> tuple[FloatArray, float, float]:
    """Log losses, from the best up, with mean 0 and standard deviation 1, and both."""
    if groups_N is not None:
        _, group_N = np.unique(groups_N, return_inverse=True)
        losses_N = losses_N - (np.bincount(group_N, losses_N) / np.bincount(group_N))[group_N]
    best = float(losses_N.min())
    spread = float(np.median(losses_N)) - best or 1.0
    log_N = np.log((losses_N - best) / spread + SOFTNESS)
    mean, scale = float(log_N.mean()), float(log_N.std()) or 1.0
    return (log_N - mean) / scale, mean, scale


def _offsets(groups_N: IntArray | None, num: int) -> FloatArray:
    """What the evaluations of a group have in common, shape (num, num)."""
    if groups_N is None:
        return np.zeros((num, num))
    return GROUP_VARIANCE * np.asarray(groups_N[:, None] == groups_N, dtype=float)


# ----------------------------------------------------------------------------------------------------- kernel


def features(choices_NS: IntArray, slots: Sequence[Slot]) -> tuple[FloatArray, FloatArray]:
    """Indicators, shape (N, F) each, whose products count agreements: of choices slot by slot, and of
    choices sorted within slots that offer the same ones.

    Sorted choices are counted in unary: the first of a choice agrees with the first, and so on. So S less
    the product is how many slots differ, or how many still would after the best trade."""
    num_choices = max(len(slot.choices) for slot in slots)
    own_NSC = (choices_NS[:, :, None] == np.arange(num_choices)).astype(float)
    alike: dict[tuple[str, ...], list[int]] = {}
    for s, slot in enumerate(slots):
        alike.setdefault(slot.choices, []).append(s)
    traded = []
    for choices, places in alike.items():
        count_NC = own_NSC[:, places, : len(choices)].sum(axis=1)
        traded.append((count_NC[:, :, None] > np.arange(len(places))).reshape(-1, len(choices) * len(places)))
    traded_NF = np.concatenate(traded, axis=1)
    return own_NSC.reshape(-1, own_NSC.shape[1] * num_choices), traded_NF.astype(float)


def _cross(surrogate: Surrogate, choices_QS: IntArray) -> FloatArray:
    own_QF, traded_QF = features(choices_QS, surrogate.slots)
    return _kernel(
        own_QF, traded_QF, surrogate.own_NF, surrogate.traded_NF, len(surrogate.slots), surrogate.kernel
    )


def _kernel(
    own_QF: FloatArray,
    traded_QF: FloatArray,
    own_NF: FloatArray,
    traded_NF: FloatArray,
    num_slots: int,
    kernel: Kernel,
) -> FloatArray:
    """Covariance without noise or offsets, shape (Q, N)."""
    similar_QN = _similarity(own_QF @ own_NF.T, num_slots, kernel.length)
    if kernel.trade:
        similar_QN *= 1 - kernel.trade
        similar_QN += kernel.trade * _similarity(traded_QF @ traded_NF.T, num_slots, kernel.length)
    return similar_QN


def _similarity(agreements_QN: FloatArray, num_slots: int, length: float) -> FloatArray:
    """exp(−differences/ℓ), in place."""
    agreements_QN -= num_slots
    agreements_QN /= length
    return np.asarray(np.exp(agreements_QN, out=agreements_QN))
