"""K distributions over architectures, each a product of S categoricals, and the natural-gradient step on
them.

Y. Akimoto, S. Shirakawa, N. Yoshinari, K. Uchida, S. Saito, K. Nishida, "Adaptive Stochastic Natural Gradient
Method for One-Shot Neural Architecture Search", 2019, arXiv 1905.08537 (ASNG below), for one distribution;
Y. Noda, S. Saito, S. Shirakawa, "Efficient Search of Multiple Neural Architectures with Different
Complexities via Importance Sampling", 2022, arXiv 2207.10334, for the idea that several share their
samples.

Axes: K distributions, S slots, C choices (the largest slot's; smaller slots are padded with 0), N samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.random import Generator

from pipeline.types import FloatArray, IntArray


def uniform(sizes: Sequence[int], num_distributions: int) -> FloatArray:
    """θ with every choice of a slot equally likely, shape (K, S, C)."""
    theta_SC = valid_choices(sizes) / np.asarray(sizes, dtype=float)[:, None]
    return np.asarray(np.repeat(theta_SC[None], num_distributions, axis=0))


def valid_choices(sizes: Sequence[int]) -> FloatArray:
    """1 where a slot has that choice, 0 where it is padding, shape (S, C)."""
    return np.asarray(np.arange(max(sizes)) < np.asarray(sizes)[:, None], dtype=float)


def one_hot(choices_NS: IntArray, num_choices: int) -> FloatArray:
    """Choices as indicator rows, shape (..., S, C)."""
    return np.asarray(choices_NS[..., None] == np.arange(num_choices), dtype=float)


def sample(theta_KSC: FloatArray, num_samples: int, rng: Generator) -> IntArray:
    """`num_samples` draws from each of the K distributions, shape (K, num_samples, S)."""
    num_distributions, num_slots, num_choices = theta_KSC.shape
    cumulative_KSC = np.cumsum(theta_KSC, axis=2)
    total_K1S = cumulative_KSC[:, None, :, -1]
    draws_KNS = rng.random((num_distributions, num_samples, num_slots)) * total_K1S
    draws_KNS = np.minimum(draws_KNS, np.nextafter(total_K1S, 0.0))
    choices_KNS = np.zeros(draws_KNS.shape, dtype=np.int64)
    for choice in range(num_choices):
        choices_KNS += draws_KNS >= cumulative_KSC[:, None, :, choice]
    return choices_KNS


def log_prob(theta_KSC: FloatArray, choices_NS: IntArray) -> FloatArray:
    """log p_k(a_n), shape (K, N); −inf for a choice of probability 0."""
    slots_S = np.arange(theta_KSC.shape[1])
    with np.errstate(divide="ignore"):
        return np.asarray(np.log(theta_KSC[:, slots_S[None, :], choices_NS]).sum(axis=2))


def mixture_weights(log_prob_KN: FloatArray) -> FloatArray:
    """w_k(a) = p_k(a) / ((1/K) Σ_j p_j(a)), shape (K, N), for samples drawn in equal number from every p_j.

    The mixture as proposal (stratified; "balance heuristic" of Veach and Guibas, 1995) bounds the weights:
    0 ≤ w_k ≤ K, and E[w_k] = 1. Weights against one proposal, p_k/p_j, have no bound."""
    log_mixture_N = np.logaddexp.reduce(log_prob_KN, axis=0) - np.log(len(log_prob_KN))
    return np.asarray(np.exp(log_prob_KN - log_mixture_N))


def effective_sample_size(weights_KN: FloatArray) -> FloatArray:
    """(Σ w)² / Σ w² per distribution, shape (K,): how many samples it really learns from."""
    return np.asarray(weights_KN.sum(axis=1) ** 2 / (weights_KN**2).sum(axis=1))


def entropy(theta_KSC: FloatArray) -> FloatArray:
    """Mean over slots of the entropy as a share of the slot's largest (0: decided, 1: uniform), shape
    (K,)."""
    most_S = np.log(np.maximum((theta_KSC[0] > 0).sum(axis=1), 2))
    terms_KSC = theta_KSC * np.log(np.where(theta_KSC > 0, theta_KSC, 1.0))
    return np.asarray((-terms_KSC.sum(axis=2) / most_S).mean(axis=1))


def quantile_utility(values_KN: FloatArray, weights_KN: FloatArray, share: float = 0.25) -> FloatArray:
    """Weight × utility of each sample, shape (K, N), lower values being better; every row sums to 0.

    A row's samples line up by value along [0, 1], each as wide as its share of the weight; the best `share`
    of that line is worth +1/share, the worst −1/share. `share` is rounded up to whole samples of those that
    weigh anything, so equal weights give ASNG's utility. Equal values split what their stretch is worth by
    weight; all equal give 0."""
    weights_KN = np.ascontiguousarray(weights_KN)  # the order of summation is that of the memory
    num_K1 = np.count_nonzero(weights_KN, axis=1, keepdims=True)
    share_K1 = np.ceil(share * num_K1) / num_K1
    order_KN = np.argsort(values_KN, axis=1, kind="stable")
    sorted_KN = np.take_along_axis(values_KN, order_KN, axis=1)
    begins_KN = np.ones(values_KN.shape, dtype=bool)  # a block of equal values, B in all rows together
    begins_KN[:, 1:] = sorted_KN[:, 1:] != sorted_KN[:, :-1]
    block_KN = np.empty_like(order_KN)
    np.put_along_axis(block_KN, order_KN, np.cumsum(begins_KN).reshape(values_KN.shape) - 1, axis=1)
    total_B = weights_KN.sum(axis=1)[begins_KN.nonzero()[0]]
    mass_B = np.bincount(block_KN.ravel(), weights_KN.ravel()) / total_B
    end_KN = np.zeros(values_KN.shape)
    end_KN[begins_KN] = mass_B
    end_KN = np.cumsum(end_KN, axis=1)
    start_KN = np.concatenate([np.zeros((len(end_KN), 1)), end_KN[:, :-1]], axis=1)
    worth_KN = _cumulative_worth(end_KN, share_K1) - _cumulative_worth(start_KN, share_K1)
    per_mass_B = np.divide(worth_KN[begins_KN], mass_B, out=np.zeros_like(mass_B), where=mass_B > 0)
    return np.asarray(per_mass_B[block_KN] * weights_KN)


def _cumulative_worth(position: FloatArray, share: FloatArray) -> FloatArray:
    """Integral from 0 of +1/share on [0, share] and −1/share on [1 − share, 1]."""
    return np.asarray((np.minimum(position, share) - np.maximum(position - (1.0 - share), 0.0)) / share)


def natural_gradient(theta_KSC: FloatArray, choices_KNS: IntArray, weights_KN: FloatArray) -> FloatArray:
    """Σ_n weight_kn (a_kn − θ_k) / N, shape (K, S, C): the natural gradient of Σ_n weight_kn log p_k(a_kn) /
    N.

    Choices of shape (N, S) are shared by all distributions. a − θ is F⁻¹ ∇ log p(a), F the Fisher
    information of the free parameters (ASNG, section 3)."""
    hot_KNSC = one_hot(choices_KNS, theta_KSC.shape[2])
    mean_KSC = np.einsum("kn,knsc->ksc" if hot_KNSC.ndim == 4 else "kn,nsc->ksc", weights_KN, hot_KNSC)
    drift_KSC = weights_KN.sum(axis=1)[:, None, None] * theta_KSC
    return np.asarray((mean_KSC - drift_KSC) / weights_KN.shape[1])


def additive_natural_gradient(theta_KSC: FloatArray, cost_KSC: FloatArray) -> FloatArray:
    """Exact natural gradient of E_k[Σ_s cost_k,s,a_s], θ ⊙ (c − ⟨c, θ⟩) slot by slot, shape (K, S, C)."""
    mean_KS1 = (theta_KSC * cost_KSC).sum(axis=2, keepdims=True)
    return np.asarray(theta_KSC * (cost_KSC - mean_KS1))


# ---------------------------------------------------------------------------------------- the adaptive step


class Adaptive(NamedTuple):
    """K distributions and what ASNG remembers of each: Δ, γ, and the path s (padded; the last choice is
    0)."""

    theta_KSC: FloatArray
    slowdown_K: FloatArray
    gamma_K: FloatArray
    path_KSC: FloatArray


def adaptive_start(theta_KSC: FloatArray) -> Adaptive:
    """Δ = 1, γ = 0, s = 0 beside a first θ."""
    ones_K = np.ones(len(theta_KSC))
    return Adaptive(theta_KSC, ones_K, np.zeros_like(ones_K), np.zeros_like(theta_KSC))


def adaptive_step(
    state: Adaptive, gradient_KSC: FloatArray, sizes: Sequence[int], delta0: float = 1.0, alpha: float = 1.5
) -> Adaptive:
    """One step of length δ₀/Δ (Fisher norm) along each natural gradient, then the margin, then Δ, γ and s.

    ASNG, algorithm 1. A distribution whose gradient is 0 stays as it is, memory included."""
    theta_KSC, slowdown_K, gamma_K, path_KSC = state
    scaled_KSC = fisher_scaled(theta_KSC, gradient_KSC, sizes)
    norm_K = np.sqrt((scaled_KSC**2).sum(axis=(1, 2)))
    moves_K = norm_K > 1e-12
    inverse_K = np.divide(1.0, norm_K, out=np.zeros_like(norm_K), where=moves_K)[:, None, None]
    delta_K = delta0 / slowdown_K
    beta_K = np.minimum(delta_K / np.sqrt(max(sum(sizes) - len(sizes), 1)), 1.0)  # of memory: all is new

    theta_new_KSC = with_margin(theta_KSC + delta_K[:, None, None] * gradient_KSC * inverse_K, sizes)
    keep_K, gain_K = 1.0 - beta_K, beta_K * (2.0 - beta_K)
    path_new_KSC = keep_K[:, None, None] * path_KSC + np.sqrt(gain_K)[:, None, None] * scaled_KSC * inverse_K
    gamma_new_K = keep_K**2 * gamma_K + gain_K
    signal_K = (path_new_KSC**2).sum(axis=(1, 2)) / alpha
    slowdown_new_K = slowdown_K * np.exp(beta_K * (gamma_new_K - signal_K))

    moves_K11 = moves_K[:, None, None]
    return Adaptive(
        np.where(moves_K11, theta_new_KSC, theta_KSC),
        np.where(moves_K, slowdown_new_K, slowdown_K),
        np.where(moves_K, gamma_new_K, gamma_K),
        np.where(moves_K11, path_new_KSC, path_KSC),
    )


def fisher_scaled(theta_KSC: FloatArray, gradient_KSC: FloatArray, sizes: Sequence[int]) -> FloatArray:
    """s' = A·G with AᵀA = F, so that ‖s'‖ is the Fisher norm of G; shape (K, S, C), 0 at every last choice.

    s'_j = G_j/√θ_j + √θ_j · (Σ_{i<C} G_i)/(θ_C + √θ_C) for j < C. A is not the symmetric root of F for C ≥ 3;
    the path s depends on that form, so it is kept as the authors have it."""
    sizes_S = np.asarray(sizes)
    free_SC = np.arange(theta_KSC.shape[2]) < sizes_S[:, None] - 1
    last_KS = theta_KSC[:, np.arange(len(sizes_S)), sizes_S - 1]
    gradient_KSC = np.where(free_SC, gradient_KSC, 0.0)
    pull_KS = gradient_KSC.sum(axis=2) / (last_KS + np.sqrt(last_KS))
    root_KSC = np.where(free_SC, np.sqrt(theta_KSC), 1.0)
    return np.asarray(np.where(free_SC, gradient_KSC / root_KSC + root_KSC * pull_KS[:, :, None], 0.0))


def margins(sizes: Sequence[int]) -> FloatArray:
    """The least probability of a choice per slot, shape (S,): 1/(d (C_s − 1)), d slots having a choice at
    all.

    That leaves no distribution (d = 1) or a single one (d = 2 with C = 2) inside the margin; there it is
    half of the uniform probability, 1/(2 C_s), instead. 0 for a slot without a choice."""
    sizes_S = np.asarray(sizes, dtype=float)
    deciding = max(int((sizes_S > 1).sum()), 1)
    least_S = 1.0 / (deciding * np.maximum(sizes_S - 1.0, 1.0))
    least_S = np.where(least_S * sizes_S >= 1.0 - 1e-9, 0.5 / sizes_S, least_S)
    return np.where(sizes_S > 1, least_S, 0.0)


def with_margin(theta_KSC: FloatArray, sizes: Sequence[int]) -> FloatArray:
    """θ lifted to its margin and drawn back onto the simplex without leaving the margin (ASNG, section
    3.4)."""
    valid_SC = valid_choices(sizes)
    least_SC = margins(sizes)[:, None] * valid_SC
    lifted_KSC = np.maximum(theta_KSC, least_SC) * valid_SC
    total_KS1 = lifted_KSC.sum(axis=2, keepdims=True)
    room_KS1 = total_KS1 - least_SC.sum(axis=1, keepdims=True)
    return np.asarray(lifted_KSC - (total_KS1 - 1.0) * (lifted_KSC - least_SC) / room_KS1)
