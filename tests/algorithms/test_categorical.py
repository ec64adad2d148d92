"""Identities of the distributions and of the adaptive step."""

import itertools

import numpy as np
import pytest

from pipeline.algorithms import categorical

SIZES = (3, 2, 4, 1)


def random_theta(num: int, seed: int, sizes: tuple[int, ...] = SIZES) -> np.ndarray:
    rng = np.random.default_rng(seed)
    theta = rng.uniform(0.2, 1.0, (num, len(sizes), max(sizes))) * categorical.valid_choices(sizes)
    return theta / theta.sum(axis=2, keepdims=True)


def every_row(sizes: tuple[int, ...] = SIZES) -> np.ndarray:
    return np.array(list(itertools.product(*map(range, sizes))))


def test_probabilities_of_all_architectures_sum_to_one() -> None:
    log_prob = categorical.log_prob(random_theta(3, 0), every_row())
    np.testing.assert_allclose(np.exp(log_prob).sum(axis=1), 1.0)


def test_samples_have_the_frequencies_of_theta_and_stay_inside_the_slots() -> None:
    theta = random_theta(2, 1)
    drawn = categorical.sample(theta, 20_000, np.random.default_rng(1))
    assert (drawn < np.array(SIZES)).all()
    for k in range(2):
        np.testing.assert_allclose(categorical.one_hot(drawn[k], 4).mean(axis=0), theta[k], atol=0.015)


def test_mixture_weights_are_bounded_and_average_to_one_exactly_under_the_mixture() -> None:
    log_prob = categorical.log_prob(random_theta(3, 2), every_row())
    weights = categorical.mixture_weights(log_prob)
    assert weights.min() >= 0 and weights.max() <= 3
    np.testing.assert_allclose((weights * np.exp(log_prob).mean(axis=0)).sum(axis=1), 1.0)


def test_mixture_weights_of_one_distribution_are_one() -> None:
    weights = categorical.mixture_weights(categorical.log_prob(random_theta(1, 3), every_row()))
    np.testing.assert_allclose(weights, 1.0)


def test_effective_sample_size_counts_equal_weights_and_ignores_zeros() -> None:
    weights = np.array([[1.0, 1.0, 1.0, 1.0], [4.0, 0.0, 0.0, 0.0], [2.0, 2.0, 0.0, 0.0]])
    np.testing.assert_allclose(categorical.effective_sample_size(weights), [4.0, 1.0, 2.0])


def test_entropy_runs_from_decided_to_uniform() -> None:
    decided = np.array([[[1.0, 0.0], [0.0, 1.0]]])
    assert categorical.entropy(decided) == pytest.approx([0.0])
    assert categorical.entropy(categorical.uniform((2, 2), 1)) == pytest.approx([1.0])


def utility_of(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return categorical.quantile_utility(values[None], weights[None])[0]


@pytest.mark.parametrize("num_samples", [2, 4, 5, 6, 7, 8])
def test_equal_weights_give_asng_utilities(num_samples: int) -> None:
    values = np.random.default_rng(4).permutation(num_samples).astype(float)
    best = int(np.ceil(num_samples / 4))
    expected = np.where(values < best, 1.0, np.where(values >= num_samples - best, -1.0, 0.0)) / best
    utility = utility_of(values, np.ones(num_samples)) / num_samples
    np.testing.assert_allclose(utility, expected, atol=1e-12)
    others = np.zeros(3 * num_samples)  # samples of other tiers, which this one does not learn from
    values, weights = np.append(values, others), np.append(np.ones(num_samples), others)
    utility = utility_of(values, weights) / num_samples
    np.testing.assert_allclose(utility, np.append(expected, others), atol=1e-12)


def test_utilities_sum_to_zero_ties_share_and_a_flat_pool_says_nothing() -> None:
    rng = np.random.default_rng(5)
    weights = rng.uniform(0, 2, 12)
    utility = utility_of(rng.integers(0, 4, 12).astype(float), weights)
    assert utility.sum() == pytest.approx(0.0, abs=1e-12)
    tied = utility_of(np.array([-1.0, -1.0, 0.0, 1.0]), np.ones(4))
    assert tied[0] == pytest.approx(tied[1]) == pytest.approx(2.0)
    np.testing.assert_allclose(utility_of(np.zeros(12), weights), 0.0, atol=1e-12)


def test_a_sample_without_weight_has_no_say() -> None:
    values, weights = np.array([-9.0, 1.0, 2.0, 3.0, 4.0]), np.array([0.0, 1.0, 1.0, 1.0, 1.0])
    utility = utility_of(values, weights)
    assert utility[0] == 0.0 and utility[1] > 0 > utility[4]


def test_every_distribution_learns_from_its_own_row() -> None:
    rng, sizes = np.random.default_rng(20), (3, 4)
    values, weights = rng.integers(0, 5, (3, 9)).astype(float), rng.integers(0, 3, (3, 9)).astype(float)
    utility = categorical.quantile_utility(values, weights)
    each = [utility_of(row, weight) for row, weight in zip(values, weights, strict=True)]
    np.testing.assert_array_equal(utility, each)
    theta, rows = random_theta(3, 21, sizes), rng.integers(0, 3, (3, 9, 2))
    own = categorical.natural_gradient(theta, rows, utility)
    for k in range(3):
        alone = categorical.natural_gradient(theta[k : k + 1], rows[k], utility[k : k + 1])
        np.testing.assert_allclose(own[k], alone[0], rtol=1e-12)


def fisher(theta: np.ndarray) -> np.ndarray:
    """Fisher information of the free probabilities θ_1 … θ_{C−1} of one slot."""
    return np.diag(1 / theta[:-1]) + 1 / theta[-1]


def test_natural_gradient_is_fisher_inverse_times_finite_differences() -> None:
    sizes = (3, 4)
    theta = random_theta(1, 6, sizes)
    rows = every_row(sizes)
    value = np.random.default_rng(6).normal(size=len(rows))

    def expectation(shifted: np.ndarray) -> float:
        return float(np.exp(categorical.log_prob(shifted, rows))[0] @ value)

    weights = np.exp(categorical.log_prob(theta, rows)) * value * len(rows)
    gradient = categorical.natural_gradient(theta, rows, weights)[0]
    for slot, size in enumerate(sizes):
        plain = np.zeros(size - 1)
        for j in range(size - 1):
            step = np.zeros_like(theta)
            step[0, slot, j], step[0, slot, size - 1] = 1e-6, -1e-6
            plain[j] = (expectation(theta + step) - expectation(theta - step)) / 2e-6
        natural = np.linalg.solve(fisher(theta[0, slot, :size]), plain)
        np.testing.assert_allclose(gradient[slot, : size - 1], natural, atol=1e-7)
        assert gradient[slot].sum() == pytest.approx(0.0, abs=1e-12)


def test_additive_natural_gradient_is_the_natural_gradient_over_all_architectures() -> None:
    theta, rows = random_theta(2, 7), every_row()
    cost = np.random.default_rng(7).uniform(0, 1, theta.shape) * categorical.valid_choices(SIZES)
    for k in range(2):
        value = cost[k, np.arange(len(SIZES)), rows].sum(axis=1)
        weights = np.exp(categorical.log_prob(theta[k : k + 1], rows)) * value * len(rows)
        expected = categorical.natural_gradient(theta[k : k + 1], rows, weights)[0]
        np.testing.assert_allclose(
            categorical.additive_natural_gradient(theta, cost)[k], expected, atol=1e-12
        )


def test_scaled_gradient_has_the_fisher_norm_and_the_authors_form() -> None:
    theta = random_theta(1, 8)
    gradient = np.random.default_rng(8).normal(size=theta.shape) * categorical.valid_choices(SIZES)
    gradient -= gradient.sum(axis=2, keepdims=True) * theta
    scaled = categorical.fisher_scaled(theta, gradient, SIZES)
    squared = 0.0
    for slot, size in enumerate(SIZES[:3]):
        free, probs = gradient[0, slot, : size - 1], theta[0, slot, :size]
        squared += free @ fisher(probs) @ free
        last = probs[-1]
        expected = free / np.sqrt(probs[:-1]) + np.sqrt(probs[:-1]) * free.sum() / (last + np.sqrt(last))
        np.testing.assert_allclose(scaled[0, slot, : size - 1], expected)
    assert (scaled**2).sum() == pytest.approx(squared)


@pytest.mark.parametrize("sizes", [(2,), (5,), (2, 2), (2, 3), (3, 1, 1), (2, 2, 2), (3, 2, 4, 1), (1, 1)])
def test_margin_keeps_the_simplex(sizes: tuple[int, ...]) -> None:
    rng = np.random.default_rng(9)
    theta = rng.normal(0.3, 1.0, (20, len(sizes), max(sizes)))
    theta += ((1 - (theta * categorical.valid_choices(sizes)).sum(axis=2)) / np.array(sizes))[:, :, None]
    inside = categorical.with_margin(theta, sizes)
    least = categorical.margins(sizes)[:, None] * categorical.valid_choices(sizes)
    np.testing.assert_allclose(inside.sum(axis=2), 1.0)
    assert (inside >= least - 1e-12).all()
    np.testing.assert_allclose(inside * (1 - categorical.valid_choices(sizes)), 0.0)
    np.testing.assert_allclose(categorical.with_margin(inside, sizes), inside, atol=1e-12)


def test_margins_are_asng_s_except_where_those_leave_no_room() -> None:
    np.testing.assert_allclose(categorical.margins((3, 2, 4)), [1 / 6, 1 / 3, 1 / 9])
    np.testing.assert_allclose(categorical.margins((4, 1)), [1 / 8, 0.0])
    np.testing.assert_allclose(categorical.margins((2, 2)), [1 / 4, 1 / 4])


def test_step_has_length_delta_and_leaves_still_distributions_alone() -> None:
    sizes = (5, 5, 5, 5, 5)
    state = categorical.adaptive_start(categorical.uniform(sizes, 2))
    gradient = np.zeros_like(state.theta_KSC)
    gradient[0] = np.random.default_rng(10).normal(size=gradient[0].shape)
    gradient[0] -= gradient[0].mean(axis=1, keepdims=True)
    moved = categorical.adaptive_step(state, gradient, sizes, delta0=0.05)
    step = categorical.fisher_scaled(state.theta_KSC, moved.theta_KSC - state.theta_KSC, sizes)
    assert np.sqrt((step[0] ** 2).sum()) == pytest.approx(0.05)
    for before, after in zip(state, moved, strict=True):
        np.testing.assert_array_equal(before[1], after[1])


def test_step_follows_the_published_recursion() -> None:
    sizes = (3, 3, 3)
    state = categorical.adaptive_start(categorical.uniform(sizes, 1))
    delta, beta = 0.4, 0.4 / np.sqrt(6)
    gradient = np.zeros_like(state.theta_KSC)
    gradient[0, 0] = [0.2, -0.1, -0.1]
    moved = categorical.adaptive_step(state, gradient, sizes, delta0=delta, alpha=1.5)
    gamma = beta * (2 - beta)
    assert moved.gamma_K == pytest.approx([gamma])
    assert (moved.path_KSC**2).sum() == pytest.approx(gamma)
    assert moved.slowdown_K == pytest.approx([np.exp(beta * (gamma - gamma / 1.5))])


def test_a_first_step_of_any_length_stays_finite() -> None:
    """N = 24 as on NAS-Bench-201; from δ₀ = 2√N on the published memory has no real share."""
    sizes = (5,) * 6
    state = categorical.adaptive_start(categorical.uniform(sizes, 1))
    rng = np.random.default_rng(0)
    for _ in range(5):
        rows = categorical.sample(state.theta_KSC, 8, rng)[0]
        gradient = categorical.natural_gradient(state.theta_KSC, rows, rng.normal(size=(1, 8)))
        state = categorical.adaptive_step(state, gradient, sizes, delta0=10.0)
        assert all(np.isfinite(part).all() for part in state)


def test_steps_find_the_best_architecture_of_an_additive_loss() -> None:
    sizes, rng = (4,) * 8, np.random.default_rng(11)
    loss = rng.permuted(np.tile(np.arange(4.0), (8, 1)), axis=1)
    state = categorical.adaptive_start(categorical.uniform(sizes, 1))
    for _ in range(400):
        rows = categorical.sample(state.theta_KSC, 8, rng)[0]
        utility = utility_of(loss[np.arange(8), rows].sum(axis=1), np.ones(8))[None]
        gradient = categorical.natural_gradient(state.theta_KSC, rows, utility)
        state = categorical.adaptive_step(state, gradient, sizes)
    np.testing.assert_array_equal(state.theta_KSC[0].argmax(axis=1), loss.argmin(axis=1))
