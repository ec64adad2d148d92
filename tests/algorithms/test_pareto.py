"""Fronts and hypervolumes with known answers."""

import numpy as np
import pytest

from pipeline.algorithms import pareto


def test_dominance_needs_to_be_better_somewhere() -> None:
    points = np.array([[1.0, 1.0], [1.0, 1.0], [2.0, 1.0], [0.0, 3.0]])
    expected = np.zeros((4, 4), dtype=bool)
    expected[0, 2] = expected[1, 2] = True
    np.testing.assert_array_equal(pareto.dominates(points), expected)


def test_shells_of_a_grid_are_its_fronts() -> None:
    points = np.array([[i, j] for i in range(4) for j in range(4)], dtype=float)
    np.testing.assert_array_equal(pareto.front_ranks(points), points.sum(axis=1).astype(int))


@pytest.mark.parametrize("num", [1, 2, 7, 20])
def test_hypervolume_of_a_staircase(num: int) -> None:
    points = np.array([[i, num - 1 - i] for i in range(num)], dtype=float)
    shuffled = np.random.default_rng(num).permutation(points)
    assert pareto.hypervolume(shuffled, np.full(2, float(num))) == pytest.approx(num * (num + 1) / 2)


def test_hypervolume_in_three_objectives_agrees_with_counting_cells() -> None:
    points = np.random.default_rng(0).integers(0, 6, (8, 3)).astype(float)
    cells = np.stack(np.meshgrid(*[np.arange(6)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    dominated = (points[None] <= cells[:, None]).all(axis=2).any(axis=1).sum()
    assert pareto.hypervolume(points, np.full(3, 6.0)) == pytest.approx(float(dominated))


def test_points_beyond_the_reference_add_nothing() -> None:
    assert pareto.hypervolume(np.array([[3.0, 0.0], [0.0, 2.0]]), np.array([2.0, 2.0])) == 0.0
