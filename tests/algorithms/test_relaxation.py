"""Activations, pulls and costs against finite differences; the schedule's rate; masks that are for good."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest

from pipeline.algorithms import relaxation
from pipeline.algorithms.relaxation import CRB, SOFTMAX, Activation, Admm, AdmmForm, Mask, Pace, Schedule
from pipeline.types import FloatArray

EDGES, OPS = 4, 3
CELLS = np.array([0, 0, 1, 1])
MASK = np.array([[1, 1, 1], [1, 0, 1], [0, 1, 0], [1, 1, 1]], dtype=bool)


def alpha(seed: int = 0) -> FloatArray:
    """Inside (0, 1), where no activation has a kink."""
    return np.where(MASK, np.random.default_rng(seed).uniform(0.1, 0.9, MASK.shape), 0.0)


def strongest(values: FloatArray, mask: Mask) -> FloatArray:
    lifted = relaxation.above_zero(values, mask)
    return np.where(mask, np.eye(values.shape[1])[lifted.argmax(axis=1)], 0.0)


def slopes(function: Callable[[FloatArray], float], at: FloatArray, step: float = 1e-6) -> FloatArray:
    """Central differences, entry by entry."""
    found = np.zeros_like(at)
    for index in np.ndindex(at.shape):
        shift = np.zeros_like(at)
        shift[index] = step
        found[index] = (function(at + shift) - function(at - shift)) / (2 * step)
    return found


# ------------------------------------------------------------------------------------------------ activations


@pytest.mark.parametrize("activation", [CRB, SOFTMAX], ids=["crb", "softmax"])
def test_pulling_back_is_the_chain_rule(activation: Activation) -> None:
    weight = np.random.default_rng(1).normal(size=MASK.shape)
    found = activation.pull_back(alpha(), MASK, weight)
    wanted = slopes(lambda at: float((weight * activation.mix(at, MASK)).sum()), alpha())
    np.testing.assert_allclose(found, np.where(MASK, wanted, 0.0), atol=1e-8)
    assert not found[~MASK].any() and not activation.mix(alpha(), MASK)[~MASK].any()


def test_crb_clamps_and_is_flat_outside() -> None:
    mask = np.ones((1, 4), dtype=bool)
    weights = np.array([[-0.5, 0.0, 0.4, 1.7]])
    np.testing.assert_array_equal(relaxation.crb(weights, mask), [[0, 0, 0.4, 1]])
    np.testing.assert_array_equal(relaxation.crb_pull_back(weights, mask, np.ones((1, 4))), [[0, 1, 1, 0]])


def test_a_crb_mask_is_permanent() -> None:
    weights, mask = np.array([[0.2, -0.1, 0.0]]), np.ones((1, 3), dtype=bool)
    weights, mask = relaxation.crb_prune(weights, mask)
    np.testing.assert_array_equal(mask, [[True, False, False]])
    np.testing.assert_array_equal(weights, [[0.2, 0, 0]])
    again, still = relaxation.crb_prune(np.array([[0.2, 0.9, 0.9]]), mask)
    np.testing.assert_array_equal(still, mask)
    np.testing.assert_array_equal(again, [[0.2, 0, 0]])
    np.testing.assert_array_equal(relaxation.crb(np.full((1, 3), 0.5), still), [[0.5, 0, 0]])


def test_crb_starts_alike_and_softmax_uniform() -> None:
    first = relaxation.crb_start(MASK, np.random.default_rng(0))
    np.testing.assert_allclose(first, np.where(MASK, 1 / MASK.sum(axis=1, keepdims=True), 0), atol=1e-3)
    assert (first != np.where(MASK, 1 / MASK.sum(axis=1, keepdims=True), 0))[MASK].all()
    mixed = relaxation.softmax(relaxation.softmax_start(MASK, np.random.default_rng(0)), MASK)
    np.testing.assert_allclose(mixed, np.where(MASK, 1 / MASK.sum(axis=1, keepdims=True), 0), atol=3e-3)


def test_softmax_of_nothing_is_nothing_and_of_much_is_finite() -> None:
    mask = np.array([[False, False], [True, True]])
    mixed = relaxation.softmax(np.array([[3.0, 4.0], [1000.0, -1000.0]]), mask)
    np.testing.assert_array_equal(mixed, [[0, 0], [1, 0]])


# ------------------------------------------------------------------------------ pulls towards an architecture


def test_the_distance_is_a_sum_of_norms_over_cells() -> None:
    mix, target = alpha(), strongest(alpha(), MASK)
    value, gradient = relaxation.distance(mix, target, CELLS)
    wanted = sum(np.linalg.norm((mix - target)[cell == CELLS]) for cell in (0, 1))
    assert value == pytest.approx(wanted)
    np.testing.assert_allclose(
        gradient, slopes(lambda at: relaxation.distance(at, target, CELLS)[0], mix), atol=1e-7
    )


def test_at_its_target_the_distance_has_no_slope() -> None:
    target = strongest(alpha(), MASK)
    value, gradient = relaxation.distance(target, target)
    assert value == 0 and not gradient.any()


@pytest.mark.parametrize("form", ["textbook", "published"])
def test_admm_s_gradient(form: AdmmForm) -> None:
    rng = np.random.default_rng(3)
    admm = Admm(rng.normal(size=MASK.shape), rng.normal(size=MASK.shape))
    value, gradient = relaxation.admm_distance(alpha(), MASK, admm, form, CELLS)
    off = np.where(MASK, alpha() - admm.target_EO + admm.dual_EO, 0)
    squares = [float((off[cell == CELLS] ** 2).sum()) for cell in (0, 1)]
    assert value == pytest.approx(sum(squares) if form == "textbook" else sum(np.sqrt(squares)))
    wanted = slopes(lambda at: relaxation.admm_distance(at, MASK, admm, form, CELLS)[0], alpha())
    np.testing.assert_allclose(gradient, wanted, atol=1e-7)


def test_admm_s_updates_are_those_written_down() -> None:
    weights = np.where(MASK, np.random.default_rng(4).uniform(-0.4, 1.4, MASK.shape), 0.0)
    for form, seen in (("textbook", relaxation.crb(weights, MASK)), ("published", weights)):
        admm = relaxation.admm_start(weights, MASK, CRB, form)  # type: ignore[arg-type]
        np.testing.assert_array_equal(admm.target_EO, seen)
        assert not admm.dual_EO.any()
        first = relaxation.admm_update(admm, weights, MASK, CRB, strongest, form)  # type: ignore[arg-type]
        np.testing.assert_array_equal(first.target_EO, strongest(relaxation.crb(weights, MASK), MASK))
        np.testing.assert_allclose(first.dual_EO, np.where(MASK, seen - first.target_EO, 0))
        second = relaxation.admm_update(first, weights, MASK, CRB, strongest, form)  # type: ignore[arg-type]
        before = (
            relaxation.crb(weights, MASK) + first.dual_EO
            if form == "textbook"
            else relaxation.crb(weights + first.dual_EO, MASK)
        )
        np.testing.assert_array_equal(second.target_EO, strongest(before, MASK))
        np.testing.assert_allclose(second.dual_EO, np.where(MASK, first.dual_EO + seen - second.target_EO, 0))


def test_textbook_admm_settles_on_an_architecture() -> None:
    """Minimise a quadratic over one edge's weights subject to their being one-hot; with less weight than
    the quadratic's own it would go round and round."""
    goal, mask = np.array([[0.3, 0.7, 0.4]]), np.ones((1, 3), dtype=bool)
    weights, rho = goal.copy(), 8.0
    admm = relaxation.admm_start(weights, mask, CRB, "textbook")
    for _ in range(200):
        for _ in range(20):
            _, pull = relaxation.admm_distance(relaxation.crb(weights, mask), mask, admm, "textbook")
            slope = 2 * (weights - goal) + rho / 2 * pull
            weights = np.clip(weights - 0.05 * slope, 0, 1)
        admm = relaxation.admm_update(admm, weights, mask, CRB, strongest, "textbook")
    np.testing.assert_allclose(weights, [[0, 1, 0]], atol=0.02)
    np.testing.assert_array_equal(admm.target_EO, [[0, 1, 0]])


def test_lifting_keeps_the_order_and_never_prefers_what_is_masked() -> None:
    values = np.array([[-3.0, -2.0, -9.0], [0.5, 0.1, 0.2]])
    mask = np.array([[True, True, False], [True, True, True]])
    lifted = relaxation.above_zero(values, mask)
    assert (lifted[mask] > 0).all() and lifted[0, 2] == 0
    np.testing.assert_array_equal(np.argsort(lifted[mask]), np.argsort(values[mask]))


# --------------------------------------------------------------------------------------------------- schedule


def run_schedule(norms: FloatArray, pace: Pace) -> list[bool]:
    schedule, moved = Schedule(), []
    for norm in norms:
        moves, schedule = relaxation.decide(schedule, pace)
        schedule = relaxation.observe(schedule, pace, float(norm))
        moved.append(moves)
    return moved


@pytest.mark.parametrize("ratio", [1.0, 4.0, 10.0])
@pytest.mark.parametrize("level", [1e-2, 30.0])
def test_in_the_long_run_one_minibatch_in_r_plus_one_moves_alpha(ratio: float, level: float) -> None:
    norms = level * np.random.default_rng(0).lognormal(0.0, 0.5, 6000)
    moved = run_schedule(norms, Pace(ratio=ratio))
    assert np.mean(moved[500:]) == pytest.approx(1 / (ratio + 1), rel=0.05)


def test_the_schedule_waits_for_settled_weights() -> None:
    """Norms that fall by half: moves come at once, and then at the old rate."""
    norms = np.concatenate([np.full(2000, 8.0), np.full(40, 1.0)])
    moved = run_schedule(norms, Pace())
    assert not moved[0], "nothing was seen yet"
    assert sum(moved[2000:2040]) > 2 * sum(moved[1960:2000])


def test_the_threshold_s_arithmetic() -> None:
    pace = Pace(ratio=2.0, factor=1.5, smoothing=0.25)
    assert relaxation.decide(Schedule(0.0, 1.0), pace) == (False, Schedule(0.0, 1.5))
    moves, after = relaxation.decide(Schedule(0.9, 1.0), pace)
    assert moves and after.threshold == pytest.approx(1.5**-2)
    assert relaxation.observe(Schedule(4.0, 1.0), pace, 8.0) == Schedule(5.0, 1.0)


# ------------------------------------------------------------------------------------------- shares and costs


def test_pulling_back_from_shares_is_the_chain_rule() -> None:
    weight = np.random.default_rng(1).normal(size=MASK.shape)
    wanted = slopes(lambda at: float((weight * relaxation.shares(at)).sum()), alpha())
    found = relaxation.shares_pull_back(alpha(), weight)
    np.testing.assert_allclose(found, np.where(MASK, wanted, 0), atol=1e-8)


def test_entropy_is_in_units_of_its_largest() -> None:
    sizes = np.array([2, 1, 3])
    even = np.array([[0.2, 0.2, 0], [0.7, 0, 0], [0.1, 0.1, 0.1]])
    assert relaxation.entropy(even, sizes) == pytest.approx(1.0)
    assert relaxation.entropy(np.eye(3) * 0.4, sizes) == 0.0
    half = np.array([[0.5, 0.5, 0], [1, 0, 0], [1, 0, 0]])
    assert relaxation.entropy(half, sizes) == pytest.approx(0.5)


def test_perturbing_draws_by_the_shares() -> None:
    mix, rng = np.array([[0.6, 0.3, 0.0, 0.1]]), np.random.default_rng(0)
    drawn = [int(relaxation.perturbed(mix, 1.0, rng).argmax()) for _ in range(4000)]
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 4000, mix[0], atol=0.03)
    calm = [int(relaxation.perturbed(mix, 0.01, rng).argmax()) for _ in range(50)]
    assert set(calm) == {0}
    assert not relaxation.perturbed(np.zeros((2, 3)), 1.0, rng).any()


def all_architectures() -> FloatArray:
    """Every way to choose an operation per edge, as zeros and ones."""
    return np.stack([np.eye(OPS)[list(row)] for row in itertools.product(range(OPS), repeat=EDGES)])


def test_additive_costs_are_found_exactly() -> None:
    rng = np.random.default_rng(2)
    mix, every = rng.uniform(0.1, 1, (EDGES, OPS)), all_architectures()
    price = rng.uniform(1, 5, (2, EDGES, OPS))
    costs = np.einsum("leo,neo->nl", price, every) + 7.0
    chance = (relaxation.shares(mix) * every).sum(axis=2).prod(axis=1)
    drawn = rng.choice(len(every), size=400, p=chance)
    model = relaxation.fit_linear_cost(mix, every[drawn], costs[drawn], every, costs)
    cost, gradient = relaxation.expected_cost(model, mix)
    np.testing.assert_allclose(cost, chance @ costs, rtol=1e-4)
    assert (np.abs(costs[drawn].mean(axis=0) - chance @ costs) > 1e-3).any(), (
        "what was drawn is off by chance"
    )
    stored = relaxation.LinearCost(*(np.array(part, order="C") for part in model))
    for told, again in zip((cost, gradient), relaxation.expected_cost(stored, mix), strict=True):
        np.testing.assert_array_equal(told, again, err_msg="to the bit, as after a checkpoint")
    exact = [slopes(lambda at, k=k: float((price[k] * relaxation.shares(at)).sum()), mix) for k in (0, 1)]  # type: ignore[misc]
    np.testing.assert_allclose(gradient, exact, atol=1e-3)


def test_the_gradient_of_expected_cost_is_that_of_its_value() -> None:
    rng = np.random.default_rng(5)
    kept = np.where(rng.random((EDGES, OPS)) < 0.7, 0.6, 0.0)
    model = relaxation.LinearCost(np.array([3.0]), rng.normal(size=(1, EDGES, OPS)), kept)
    mix = rng.uniform(0.2, 0.8, (EDGES, OPS))
    wanted = slopes(lambda at: float(relaxation.expected_cost(model, at)[0][0]), mix)
    np.testing.assert_allclose(relaxation.expected_cost(model, mix)[1][0], wanted, atol=1e-8)


def test_costs_that_are_not_additive_are_right_where_the_mixture_is() -> None:
    """A product of edges' prices: no sum, so the fit holds near its mixture alone."""
    rng = np.random.default_rng(6)
    mix, every = rng.uniform(0.1, 1, (EDGES, OPS)), all_architectures()
    price = rng.uniform(1, 3, (EDGES, OPS))
    costs = (price * every).sum(axis=2).prod(axis=1)[:, None]

    def truth(at: FloatArray) -> float:
        return float((price * relaxation.shares(at)).sum(axis=1).prod())

    chance = (relaxation.shares(mix) * every).sum(axis=2).prod(axis=1)
    drawn = rng.choice(len(every), size=4000, p=chance)
    model = relaxation.fit_linear_cost(mix, every[drawn], costs[drawn], every[drawn], costs[drawn])
    cost, gradient = relaxation.expected_cost(model, mix)
    assert cost[0] == pytest.approx(truth(mix), rel=0.03)
    wanted = slopes(truth, mix)
    assert np.corrcoef(gradient[0].ravel(), wanted.ravel())[0, 1] > 0.98


def test_where_edges_can_be_left_out_the_value_is_the_mean_of_what_was_drawn() -> None:
    """Only the stronger of two edges is kept, as rules like DARTS's do."""
    rng = np.random.default_rng(8)
    mix = np.array([[0.5, 0.1], [0.2, 0.4]])
    price = np.array([[1.0, 6.0], [2.0, 9.0]])

    def drawn(temperature: float) -> FloatArray:
        shaken = relaxation.perturbed(mix, temperature, rng)
        edge = shaken.max(axis=1).argmax()
        kept = np.zeros_like(mix)
        kept[edge, shaken[edge].argmax()] = 1.0
        return kept

    some, others = (np.stack([drawn(t) for _ in range(500)]) for t in (1.0, 3.0))
    costs, other_costs = ((price * x).sum(axis=(1, 2))[:, None] for x in (some, others))
    model = relaxation.fit_linear_cost(mix, some, costs, others, other_costs)
    cost, gradient = relaxation.expected_cost(model, mix)
    assert cost[0] == pytest.approx(costs.mean())
    assert 0 < model.kept_EO.max() < 1
    assert (gradient[0, :, 1] > 0).all() and (gradient[0, :, 0] < 0).all()


def test_what_no_architecture_has_takes_no_part() -> None:
    """A third operation that never stands anywhere, as `none` in a space where it is no choice."""
    every = np.stack([np.eye(3)[list(row)] for row in itertools.product(range(2), repeat=2)])
    costs = np.einsum("eo,neo->n", np.array([[1.0, 5, 0], [2, 8, 0]]), every)[:, None]
    mix = np.array([[0.2, 0.2, 0.6], [0.1, 0.3, 0.6]])
    model = relaxation.fit_linear_cost(mix, every, costs, every, costs)
    _, gradient = relaxation.expected_cost(model, mix)
    assert not gradient[0, :, 2].any(), "weight on it is no way to become cheaper"
    assert (gradient[0, :, 1] > 0).all() and (gradient[0, :, 0] < 0).all()
