from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize

from pipeline.algorithms import min_norm
from pipeline.types import FloatArray


def by_quadratic_programming(gradients_JD: FloatArray) -> FloatArray:
    """Weights that minimise ‖Σ w_j g_j‖² on the simplex, by scipy's sequential quadratic programming."""
    gram = gradients_JD @ gradients_JD.T
    gram, num = gram / np.trace(gram), len(gram)
    found = minimize(
        lambda w: w @ gram @ w,
        np.full(num, 1 / num),
        jac=lambda w: 2 * gram @ w,
        bounds=[(0, 1)] * num,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": lambda w: np.ones(num)},
        method="SLSQP",
        options={"ftol": 1e-13, "maxiter": 500},
    )
    assert found.success
    return np.asarray(found.x)


def length(gradients_JD: FloatArray, weights_J: FloatArray) -> float:
    return float(np.linalg.norm(weights_J @ gradients_JD))


# ---------------------------------------------------------------------------------------------- two gradients


@pytest.mark.parametrize("seed", range(20))
def test_two_gradients_have_the_closed_form_within_the_paper_s_limits(seed: int) -> None:
    """g₂ is sometimes shorter, longer, or on the same side, so that both limits are met."""
    rng = np.random.default_rng(seed)
    one, two = rng.normal(size=(2, 6)) * rng.choice([0.1, 1.0, 10.0], size=(2, 1))
    two = two + rng.choice([0.0, 3.0]) * one
    share = (two @ two - one @ two) / ((one - two) @ (one - two))
    expected = min(max(share, 0.001), 0.999)
    np.testing.assert_allclose(min_norm.weights(np.stack([one, two]), 0.001), [expected, 1 - expected])


def test_both_limits_are_reached_by_those_seeds() -> None:
    ends = [min_norm.weights(np.array(pair), 0.001)[0] for pair in ([[1.0], [3.0]], [[3.0], [1.0]])]
    np.testing.assert_allclose(ends, [0.999, 0.001])


def test_equal_gradients_share_alike() -> None:
    np.testing.assert_allclose(min_norm.weights(np.array([[1.0, 2.0], [1.0, 2.0]])), [0.5, 0.5])


def test_opposite_gradients_are_stationary() -> None:
    pair = np.array([[1.0, -2.0], [-3.0, 6.0]])
    found = min_norm.weights(pair)
    np.testing.assert_allclose(found, [0.75, 0.25])
    assert length(pair, found) == pytest.approx(0, abs=1e-12)


# ------------------------------------------------------------------------------------------ three and more


@pytest.mark.parametrize("shift", [0.0, 0.3, 2.0])
@pytest.mark.parametrize("seed", range(10))
def test_five_gradients_agree_with_quadratic_programming(seed: int, shift: float) -> None:
    """Shifted to one side, few of them are needed; in three dimensions five can cancel out."""
    rng = np.random.default_rng(seed)
    for dimensions in (3, 12):
        gradients = rng.normal(size=(5, dimensions)) + shift
        found, expected = min_norm.nearest(gradients), by_quadratic_programming(gradients)
        assert found.sum() == pytest.approx(1) and (found >= 0).all()
        assert length(gradients, found) == pytest.approx(length(gradients, expected), abs=1e-6)
        assert length(gradients, found) <= length(gradients, expected) + 1e-9
        if dimensions == 12:  # the hull is a simplex: weights are unique
            np.testing.assert_allclose(found, expected, atol=1e-4)


def test_the_direction_makes_no_objective_worse() -> None:
    """d·g_j ≥ ‖d‖², with equality where the weight is above 0."""
    rng = np.random.default_rng(3)
    for num in (2, 3, 4, 7):
        for _ in range(20):
            gradients = rng.normal(size=(num, 9)) + rng.normal(size=9)
            found = min_norm.nearest(gradients)
            direction = found @ gradients
            along = gradients @ direction
            assert (along >= direction @ direction - 1e-9).all()
            np.testing.assert_allclose(along[found > 1e-9], direction @ direction, atol=1e-9)


def test_the_order_of_the_objectives_does_not_matter() -> None:
    rng = np.random.default_rng(4)
    gradients = rng.normal(size=(5, 8)) + 0.3
    order = rng.permutation(5)
    np.testing.assert_allclose(
        min_norm.nearest(gradients)[order], min_norm.nearest(gradients[order]), atol=1e-9
    )


def test_two_gradients_are_found_by_the_general_method_too() -> None:
    rng = np.random.default_rng(5)
    for _ in range(20):
        pair = rng.normal(size=(2, 3)) + 0.5
        np.testing.assert_allclose(min_norm._wolfe(pair @ pair.T), min_norm.nearest(pair), atol=1e-9)


def test_gradients_that_repeat_or_lie_between_others_do_no_harm() -> None:
    one, two = np.array([2.0, 0.0]), np.array([0.0, 1.0])
    gradients = np.stack([one, two, one, (one + two) / 2, 3 * two])
    direction = min_norm.nearest(gradients) @ gradients
    np.testing.assert_allclose(direction, np.array([0.4, 0.8]), atol=1e-9)


@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_the_unit_of_all_gradients_does_not_matter(scale: float) -> None:
    gradients = np.random.default_rng(6).normal(size=(4, 5)) + 0.4
    np.testing.assert_allclose(min_norm.nearest(scale * gradients), min_norm.nearest(gradients), atol=1e-9)


# ----------------------------------------------------------------------------------- zero gradients, limits


def test_an_objective_that_asks_for_nothing_is_left_out() -> None:
    rng = np.random.default_rng(7)
    three = rng.normal(size=(3, 4))
    three[1] = 0.0
    found = min_norm.weights(three, 0.001)
    assert found[1] == 0
    np.testing.assert_allclose(found[[0, 2]], min_norm.weights(three[[0, 2]], 0.001))
    np.testing.assert_allclose(min_norm.weights(three[:2], 0.001), [1.0, 0.0])
    np.testing.assert_allclose(min_norm.weights(np.zeros((4, 2))), 0.25)


def test_small_weights_are_raised_and_the_others_make_way_in_proportion() -> None:
    np.testing.assert_allclose(
        min_norm.raised(np.array([0.0, 0.25, 0.75]), 0.01), [0.01, 0.2475, 0.7425], rtol=1e-12
    )
    squeezed = min_norm.raised(np.array([0.0, 0.0, 0.1001, 0.8999]), 0.1)
    np.testing.assert_allclose(squeezed, [0.1, 0.1, 0.1, 0.7])
    np.testing.assert_allclose(min_norm.raised(np.array([0.0, 0.3, 0.7]), 1 / 3), 1 / 3)
    untouched = np.array([0.2, 0.8])
    assert min_norm.raised(untouched, 0.001) is untouched


def test_more_than_all_weight_cannot_be_asked_for() -> None:
    with pytest.raises(AssertionError, match="3 weights of 0.5"):
        min_norm.weights(np.eye(3), 0.5)
