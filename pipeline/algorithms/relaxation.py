"""Differentiable search without its network: how weights α become a mixture of operations, what pulls a
mixture towards a single architecture, and which minibatches are for α.

H. Liu, K. Simonyan, Y. Yang, "DARTS: Differentiable Architecture Search", 2018, arXiv 1806.09055:
softmax. K. Maile, E. Lecarpentier, H. Luga, D. G. Wilson, "DARTS-PRIME: Regularization and Scheduling
Improve Constrained Optimization in Differentiable NAS", 2021, arXiv 2106.11655: all the rest.

Axes: E edges, O operations (padded where an edge has fewer). A mask is True where an edge may still
carry the operation; a mixture is 0 elsewhere. Disc(·), the discrete mixture nearest to given values by
the space's rule, comes in as a function: every space has a rule of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from pipeline.types import FloatArray, IntArray

Mask = NDArray[np.bool_]
Disc = Callable[[FloatArray, Mask], FloatArray]
"""Values and mask, both (E, O) → a mixture of zeros and ones within the mask."""


# ----------------------------------------------------------------------------------------------- activations


class Activation(NamedTuple):
    """How α becomes a mixture. `pull_back(alpha, mask, gradient)` turns a gradient by the mixture into
    one by α; `prune(alpha, mask)` gives the α and mask with which the search goes on after a weight
    step."""

    start: Callable[[Mask, Generator], FloatArray]
    mix: Callable[[FloatArray, Mask], FloatArray]
    pull_back: Callable[[FloatArray, Mask, FloatArray], FloatArray]
    prune: Callable[[FloatArray, Mask], tuple[FloatArray, Mask]]
    offers_none: bool
    """Whether the operation `none`, which brings nothing, competes with the others."""


def crb_start(mask_EO: Mask, rng: Generator) -> FloatArray:
    """1/|O| + 1e-4 · N(0, 1), |O| being the operations of the edge."""
    num_E1 = np.maximum(mask_EO.sum(axis=1, keepdims=True), 1)
    return np.where(mask_EO, 1.0 / num_E1 + 1e-4 * rng.standard_normal(mask_EO.shape), 0.0)


def crb(alpha_EO: FloatArray, mask_EO: Mask) -> FloatArray:
    """clamp(α, 0, 1), elementwise: operations of an edge do not compete, and compare across edges."""
    return np.where(mask_EO, np.clip(alpha_EO, 0.0, 1.0), 0.0)


def crb_pull_back(alpha_EO: FloatArray, mask_EO: Mask, gradient_EO: FloatArray) -> FloatArray:
    """The clamp's derivative is 1 on [0, 1] and 0 outside."""
    return np.where(mask_EO & (alpha_EO >= 0) & (alpha_EO <= 1), gradient_EO, 0.0)


def crb_prune(alpha_EO: FloatArray, mask_EO: Mask) -> tuple[FloatArray, Mask]:
    """An α that is not above 0 becomes 0 and is masked; what is masked stays so."""
    mask_EO = mask_EO & (alpha_EO > 0)
    return np.where(mask_EO, alpha_EO, 0.0), mask_EO


def softmax_start(mask_EO: Mask, rng: Generator) -> FloatArray:
    """1e-3 · N(0, 1)."""
    return np.where(mask_EO, 1e-3 * rng.standard_normal(mask_EO.shape), 0.0)


def softmax(alpha_EO: FloatArray, mask_EO: Mask) -> FloatArray:
    """Row by row over what the mask leaves; a row without anything is 0."""
    most_E1 = np.max(np.where(mask_EO, alpha_EO, -np.inf), axis=1, keepdims=True)
    most_E1 = np.where(np.isfinite(most_E1), most_E1, 0.0)
    weight_EO = np.where(mask_EO, np.exp(np.where(mask_EO, alpha_EO - most_E1, 0.0)), 0.0)
    return _rows_to_one(weight_EO)


def softmax_pull_back(alpha_EO: FloatArray, mask_EO: Mask, gradient_EO: FloatArray) -> FloatArray:
    """The Jacobian diag(p) − p pᵀ of every row, applied."""
    mix_EO = softmax(alpha_EO, mask_EO)
    return np.asarray(mix_EO * (gradient_EO - (mix_EO * gradient_EO).sum(axis=1, keepdims=True)))


def keep_all(alpha_EO: FloatArray, mask_EO: Mask) -> tuple[FloatArray, Mask]:
    return alpha_EO, mask_EO


CRB = Activation(crb_start, crb, crb_pull_back, crb_prune, offers_none=False)
SOFTMAX = Activation(softmax_start, softmax, softmax_pull_back, keep_all, offers_none=True)


# ----------------------------------------------------------------------------- pulls towards an architecture


def distance(
    mix_EO: FloatArray, target_EO: FloatArray, cell_E: IntArray | None = None
) -> tuple[float, FloatArray]:
    """Σ over cells of ‖mix − target‖_F, not squared, and its gradient by the mixture; 0 where they meet.

    `cell_E` numbers the cell that an edge belongs to; without it all edges are of one."""
    off_EO = mix_EO - target_EO
    cell_E = np.zeros(len(off_EO), dtype=np.int64) if cell_E is None else cell_E
    norm_C = np.sqrt(np.bincount(cell_E, (off_EO**2).sum(axis=1)))
    norm_E1 = norm_C[cell_E][:, None]
    return float(norm_C.sum()), np.divide(off_EO, norm_E1, out=np.zeros_like(off_EO), where=norm_E1 > 0)


class Admm(NamedTuple):
    """ADMM's discrete copy Z of the mixture and its scaled dual U, both (E, O)."""

    target_EO: FloatArray
    dual_EO: FloatArray


AdmmForm = Literal["textbook", "published"]


def admm_start(alpha_EO: FloatArray, mask_EO: Mask, activation: Activation, form: AdmmForm) -> Admm:
    """U = 0 and Z = act(α), or α in the published form."""
    target_EO = alpha_EO if form == "published" else activation.mix(alpha_EO, mask_EO)
    return Admm(target_EO.copy(), np.zeros_like(alpha_EO))


def admm_distance(
    mix_EO: FloatArray, mask_EO: Mask, admm: Admm, form: AdmmForm, cell_E: IntArray | None = None
) -> tuple[float, FloatArray]:
    """What (ρ/2) weighs, and its gradient by the mixture: Σ ‖(mix − Z + U) ⊙ mask‖², the augmented
    Lagrangian of the constraint mix = Z in scaled form (Boyd et al. 2011, section 3.1.1); the published
    code has the norms without the square."""
    goal_EO = np.where(mask_EO, admm.target_EO - admm.dual_EO, mix_EO)
    if form == "published":
        return distance(mix_EO, goal_EO, cell_E)
    off_EO = mix_EO - goal_EO
    return float((off_EO**2).sum()), 2.0 * off_EO


def admm_update(
    admm: Admm, alpha_EO: FloatArray, mask_EO: Mask, activation: Activation, disc: Disc, form: AdmmForm
) -> Admm:
    """Z = disc(act(α) + U) and U += act(α) − Z; as published, Z = disc(act(α + U)) and U += α − Z."""
    dual_EO = np.where(mask_EO, admm.dual_EO, 0.0)
    if form == "published":
        target_EO = disc(activation.mix(alpha_EO + dual_EO, mask_EO), mask_EO)
        return Admm(target_EO, np.where(mask_EO, dual_EO + alpha_EO - target_EO, 0.0))
    mix_EO = activation.mix(alpha_EO, mask_EO)
    target_EO = disc(mix_EO + dual_EO, mask_EO)
    return Admm(target_EO, np.where(mask_EO, dual_EO + mix_EO - target_EO, 0.0))


def above_zero(values_EO: FloatArray, mask_EO: Mask) -> FloatArray:
    """Values lifted by one amount so that all within the mask are above 0, and 0 outside: what compares
    weights of a mixture then sees the same order, and never prefers what is masked."""
    least = float(values_EO[mask_EO].min(initial=0.0))
    return np.where(mask_EO, values_EO - least + 1e-9, 0.0)


# -------------------------------------------------------------------------------------------------- schedule


class Pace(NamedTuple):
    """Of the dynamic schedule: `ratio` r minibatches for the weights alone per one that also moves α,
    in the long run; `factor` by which the threshold moves, `smoothing` the weight of the newest
    norm."""

    ratio: float = 10.0
    factor: float = 1.05
    smoothing: float = 0.2


class Schedule(NamedTuple):
    """The smoothed squared norm of the weights' gradient, Σ ‖∇_W L_train‖², and the threshold below
    which a minibatch is taken to be informative for α: the weights are settled enough."""

    smoothed: float = 0.0
    threshold: float = 1.0


def decide(schedule: Schedule, pace: Pace) -> tuple[bool, Schedule]:
    """Whether this minibatch moves α, and the schedule after that.

    The threshold falls by factor^r with every move and rises by the factor without one. Its logarithm
    stands still on average only if moves are one in r + 1."""
    moves = 0 < schedule.smoothed < schedule.threshold
    change = pace.factor**-pace.ratio if moves else pace.factor
    return moves, schedule._replace(threshold=schedule.threshold * change)


def observe(schedule: Schedule, pace: Pace, grad_sq_norm: float) -> Schedule:
    """After a weight step whose gradient, before clipping, had this squared norm."""
    smoothed = pace.smoothing * grad_sq_norm + (1 - pace.smoothing) * schedule.smoothed
    return schedule._replace(smoothed=smoothed)


# ---------------------------------------------------------------------------------------- mixtures as shares


def shares(mix_EO: FloatArray) -> FloatArray:
    """Every edge's weights as shares that sum to 1; those of an edge without any stay 0."""
    return _rows_to_one(mix_EO)


def shares_pull_back(mix_EO: FloatArray, gradient_EO: FloatArray) -> FloatArray:
    """A gradient by the shares as one by the mixture; 0 where the mixture is 0."""
    share_EO, total_E1 = shares(mix_EO), mix_EO.sum(axis=1, keepdims=True)
    off_EO = gradient_EO - (share_EO * gradient_EO).sum(axis=1, keepdims=True)
    return np.asarray(np.divide(off_EO, total_E1, out=np.zeros_like(off_EO), where=mix_EO > 0))


def entropy(mix_EO: FloatArray, sizes_E: IntArray) -> float:
    """Mean over edges of the shares' entropy, in units of its largest for `sizes_E` operations; edges
    without choice are left out. 0: decided, 1: uniform."""
    share_EO = shares(mix_EO)
    nats_E = -(share_EO * np.log(np.where(share_EO > 0, share_EO, 1.0))).sum(axis=1)
    open_E = sizes_E > 1
    return float(np.mean(nats_E[open_E] / np.log(sizes_E[open_E]))) if open_E.any() else 0.0


def perturbed(mix_EO: FloatArray, temperature: float, rng: Generator) -> FloatArray:
    """The mixture with its logarithm shaken by Gumbel noise, largest 1; 0 stays 0.

    At temperature 1 an operation is an edge's strongest with a probability equal to its share (the
    Gumbel-max trick: Maddison et al. 2016, arXiv 1611.00712); above, weaker ones get more of a
    chance."""
    live_EO = mix_EO > 0
    if not live_EO.any():
        return np.zeros_like(mix_EO)
    noise_EO = rng.gumbel(size=mix_EO.shape)
    score_EO = np.where(live_EO, np.log(np.where(live_EO, mix_EO, 1.0)) + temperature * noise_EO, -np.inf)
    return np.asarray(np.exp(score_EO - score_EO.max()))


def _rows_to_one(weight_EO: FloatArray) -> FloatArray:
    total_E1 = weight_EO.sum(axis=1, keepdims=True)
    return np.asarray(np.divide(weight_EO, total_E1, out=np.zeros_like(weight_EO), where=total_E1 > 0))


# --------------------------------------------------------------------------------------------- expected cost


class LinearCost(NamedTuple):
    """Costs taken to be linear in which operation stands where: base + Σ weight · zeros and ones.

    `kept_EO` is the share of architectures in which an edge carries anything, 0 for operations that no
    architecture has there (`none`, where that is no choice); L counts limits."""

    base_L: FloatArray
    weight_LEO: FloatArray
    kept_EO: FloatArray


def expected_cost(model: LinearCost, mix_EO: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Costs (L,) of what is drawn by the mixture's shares, and their gradients (L, E, O) by the mixture.

    Through the shares alone: which edges are kept is taken as given."""
    mix_EO = np.where(model.kept_EO > 0, mix_EO, 0.0)
    scaled_LEO = model.weight_LEO * model.kept_EO
    cost_L = model.base_L + (scaled_LEO * shares(mix_EO)).sum(axis=(1, 2))
    return cost_L, np.stack([shares_pull_back(mix_EO, scaled_EO) for scaled_EO in scaled_LEO])


def fit_linear_cost(
    mix_EO: FloatArray,
    drawn_NEO: FloatArray,
    drawn_cost_NL: FloatArray,
    other_NEO: FloatArray,
    other_cost_NL: FloatArray,
) -> LinearCost:
    """From architectures as zeros and ones, with their costs: `drawn` by the mixture's shares, and
    `others`.

    Weights are the least-squares fit to both, so that operations which are hardly drawn have one as
    well. The base makes the expected cost at this mixture the mean cost of what was drawn by it,
    whatever the costs are like. Where every edge always carries an operation, shares are how often it
    is expected to be drawn, and the mean is corrected for what was drawn by chance: additive costs come
    out exactly."""
    drawn_ND, others_ND = (x_NEO.reshape(len(x_NEO), -1) for x_NEO in (drawn_NEO, other_NEO))
    x_ND = np.concatenate([drawn_ND, others_ND])
    y_NL = np.concatenate([drawn_cost_NL, other_cost_NL])
    x_ND, y_NL = x_ND - x_ND.mean(axis=0), y_NL - y_NL.mean(axis=0)
    ridge_DD = 1e-6 * len(x_ND) * np.eye(x_ND.shape[1])  # edges' rows sum alike: the least weights are taken
    weight_DL = np.linalg.solve(x_ND.T @ x_ND + ridge_DD, x_ND.T @ y_NL)
    # contiguous, as it is after a checkpoint: sums over it depend on the order in memory, to the last bit
    weight_LEO = np.ascontiguousarray(weight_DL.T).reshape(-1, *mix_EO.shape)
    there_EO = (drawn_NEO.sum(axis=0) + other_NEO.sum(axis=0)) > 0
    kept_EO = there_EO * drawn_NEO.sum(axis=2).mean(axis=0)[:, None]
    if (drawn_NEO.sum(axis=2) == 1).all():
        linear_L = (weight_LEO * drawn_NEO.mean(axis=0)).sum(axis=(1, 2))
    else:
        linear_L, _ = expected_cost(LinearCost(np.zeros(len(weight_LEO)), weight_LEO, kept_EO), mix_EO)
    return LinearCost(drawn_cost_NL.mean(axis=0) - linear_L, weight_LEO, kept_EO)
