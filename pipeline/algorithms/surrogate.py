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
Axes: N evaluations, S slots, C choices, Q queries, B of them in a block, F features, T traded ones, D
counts, A products of features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, wraps
from typing import TYPE_CHECKING, NamedTuple, ParamSpec, TypeVar

import numpy as np

from pipeline.types import Float32Array, FloatArray, IntArray, Slot

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
BLOCK = 50_000
"""Covariances at a time: few enough for a processor's cache, and for an allocator to use the same memory
again."""


class Kernel(NamedTuple):
    """Length scale (slots), noise variance, and share of trading."""

    length: float
    noise: float
    trade: float


class Coded(NamedTuple):
    """Architectures as rows whose products count agreements: `left_NF @ right_NF.T` is (S + 1) · (slots that
    agree) + (slots that would after the best trade)."""

    left_NF: Float32Array
    right_NF: Float32Array


class Surrogate(NamedTuple):
    """A fitted process: what was seen, the kernel by agreements, the Cholesky factor of the covariance, and
    the weights of the mean."""

    slots: tuple[Slot, ...]
    kernel: Kernel
    seen: Coded
    similarity_A: FloatArray
    factor_NN: FloatArray
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

    scaled_N, mean, scale = _scaled(losses_N, groups_N)
    kernel = kernel or select(choices_NS, losses_N, slots, groups_N)
    seen, similarity_A = _coded(choices_NS, slots), _similarity(len(slots), kernel)
    covariance_NN = np.concatenate([*_blocks(seen, seen, similarity_A)])
    _add_offsets(covariance_NN, groups_N)
    covariance_NN[np.diag_indices(len(losses_N))] += kernel.noise
    factor_NN = _factor(covariance_NN)
    weights_N, failed = lapack.dpotrs(factor_NN, scaled_N, lower=1)
    assert not failed
    return Surrogate(tuple(slots), kernel, seen, similarity_A, factor_NN, weights_N, mean, scale)


@on_one_thread
def predict(surrogate: Surrogate, choices_QS: IntArray) -> FloatArray:
    """Posterior mean at Q queries, on the logarithmic scale of `fit`: it orders, it is no loss."""
    mean = [cross_BN @ surrogate.weights_N for cross_BN in _cross(surrogate, choices_QS)]
    return surrogate.mean + surrogate.scale * np.concatenate([np.zeros(0), *mean])


@on_one_thread
def predict_with_deviation(surrogate: Surrogate, choices_QS: IntArray) -> tuple[FloatArray, FloatArray]:
    """Posterior mean and standard deviation, noise left out."""
    from scipy.linalg import lapack

    mean, explained = [np.zeros(0)], [np.zeros(0)]
    for cross_BN in _cross(surrogate, choices_QS):
        mean.append(cross_BN @ surrogate.weights_N)
        white_NB, failed = lapack.dtrtrs(surrogate.factor_NN, cross_BN.T, lower=1, overwrite_b=1)
        assert not failed
        explained.append(np.einsum("bn,bn->b", white_NB.T, white_NB.T))
    deviation_Q = surrogate.scale * np.sqrt(np.maximum(1.0 - np.concatenate(explained), 0.0))
    return surrogate.mean + surrogate.scale * np.concatenate(mean), deviation_Q


@on_one_thread
def select(
    choices_NS: IntArray, losses_N: FloatArray, slots: Sequence[Slot], groups_N: IntArray | None = None
) -> Kernel:
    """The kernel of the largest marginal likelihood by the latest evaluations, the overall variance profiled
    out."""
    last = slice(-SELECTION_LIMIT, None)
    groups_N = None if groups_N is None else groups_N[last]
    seen = _coded(choices_NS[last], slots)
    agreements_NN = (seen.left_NF @ seen.right_NF.T).astype(np.intp)
    scaled_N, _, _ = _scaled(losses_N[last], groups_N)
    can_trade = len({slot.choices for slot in slots}) < len(slots)
    likelihood: dict[Kernel, float] = {}
    for length in LENGTHS:
        for trade in TRADES if can_trade else TRADES[:1]:
            smooth = Kernel(length * len(slots), 0.0, trade)
            smooth_NN = np.take(_similarity(len(slots), smooth), agreements_NN)
            _add_offsets(smooth_NN, groups_N)
            for noise in NOISES:
                covariance_NN = smooth_NN.copy()
                covariance_NN[np.diag_indices(len(scaled_N))] += noise
                likelihood[smooth._replace(noise=noise)] = _log_likelihood(covariance_NN, scaled_N)
    return max(likelihood, key=lambda kernel: likelihood[kernel])


def _log_likelihood(covariance_NN: FloatArray, values_N: FloatArray) -> float:
    """Up to a constant; the covariance is overwritten."""
    from scipy.linalg import lapack

    factor_NN = _factor(covariance_NN)
    white_N, _ = lapack.dtrtrs(factor_NN, values_N, lower=1)
    fit_term = 0.5 * len(values_N) * np.log(max(float(white_N @ white_N), 1e-300) / len(values_N))
    return float(-fit_term - np.log(np.diag(factor_NN)).sum())


def _factor(covariance_NN: FloatArray) -> FloatArray:
    """Its Cholesky factor, in its place; what is above the diagonal means nothing."""
    from scipy.linalg import lapack

    by_columns_NN = covariance_NN.T  # symmetric; LAPACK wants columns
    factor_NN, failed = lapack.dpotrf(by_columns_NN, lower=1, clean=0, overwrite_a=1)
    assert not failed
    return np.asarray(factor_NN)


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


def _add_offsets(covariance_NN: FloatArray, groups_N: IntArray | None) -> None:
    """What the evaluations of a group have in common."""
    if groups_N is not None:
        covariance_NN += GROUP_VARIANCE * (groups_N[:, None] == groups_N)


# ----------------------------------------------------------------------------------------------------- kernel


def features(choices_NS: IntArray, slots: Sequence[Slot]) -> tuple[Float32Array, Float32Array]:
    """Indicators, shape (N, F) each, whose products count agreements: of choices slot by slot, and of
    choices sorted within slots that offer the same ones.

    Sorted choices are counted in unary: the first of a choice agrees with the first, and so on. So S less
    the product is how many slots differ, or how many still would after the best trade."""
    num_choices = max(len(slot.choices) for slot in slots)
    own_NSC = np.take(np.eye(num_choices, dtype=np.float32), choices_NS, axis=0)
    own_NF = own_NSC.reshape(len(choices_NS), len(slots) * num_choices)
    counts_FD, count_T, above_T = _trades(tuple(slots))
    count_NT = np.take(own_NF @ counts_FD, count_T, axis=1)
    return own_NF, (count_NT > above_T).astype(np.float32)


@cache
def _trades(slots: tuple[Slot, ...]) -> tuple[Float32Array, IntArray, Float32Array]:
    """Which of the indicators are counted for each of D choices of slots that are alike; and for T traded
    features, as many of a choice as there are such slots, which count it is of and what that must exceed."""
    num_choices = max(len(slot.choices) for slot in slots)
    alike: dict[tuple[str, ...], list[int]] = {}
    for s, slot in enumerate(slots):
        alike.setdefault(slot.choices, []).append(s)
    counts: list[Float32Array] = []
    which: list[int] = []
    above: list[int] = []
    for choices, places in alike.items():
        for choice in range(len(choices)):
            counted_SC = np.zeros((len(slots), num_choices), dtype=np.float32)
            counted_SC[places, choice] = 1
            which += [len(counts)] * len(places)
            above += range(len(places))
            counts.append(counted_SC.ravel())
    return np.stack(counts, axis=1), np.array(which), np.array(above, dtype=np.float32)


def _coded(choices_NS: IntArray, slots: Sequence[Slot]) -> Coded:
    """Both counts go into one product of single precision, which is exact up to four thousand slots."""
    own_NF, traded_NF = features(choices_NS, slots)
    right_NF = np.concatenate([own_NF, traded_NF], axis=1)
    left_NF = right_NF.copy()
    left_NF[:, : own_NF.shape[1]] *= len(slots) + 1
    return Coded(left_NF, right_NF)


def _similarity(num_slots: int, kernel: Kernel) -> FloatArray:
    """The kernel, noise left out, for every product of a `Coded.left_NF` and a `right_NF`."""
    by_agreements = np.exp((np.arange(num_slots + 1) - num_slots) / kernel.length)
    return ((1 - kernel.trade) * by_agreements[:, None] + kernel.trade * by_agreements).ravel()


def _cross(surrogate: Surrogate, choices_QS: IntArray) -> Iterator[FloatArray]:
    return _blocks(_coded(choices_QS, surrogate.slots), surrogate.seen, surrogate.similarity_A)


def _blocks(queries: Coded, seen: Coded, similarity_A: FloatArray) -> Iterator[FloatArray]:
    """Covariance without noise or offsets, B queries at a time, shape (B, N).

    B is a multiple of 8, since a BLAS may round the rows that are left over otherwise: equal queries are to
    have equal predictions."""
    num = max(BLOCK // len(seen.right_NF) // 8, 1) * 8
    for first in range(0, len(queries.left_NF), num):
        agreements_BN = queries.left_NF[first : first + num] @ seen.right_NF.T
        yield np.take(similarity_A, agreements_BN.astype(np.intp))
