"""Mutation, crossover, tournament and the ring of a population."""

import numpy as np
import pytest

from pipeline.algorithms import evolution

SIZES = (3, 1, 5, 2)


def test_mutation_changes_one_slot_at_rate_zero_and_stays_inside_the_space() -> None:
    rng = np.random.default_rng(0)
    rows = evolution.random_choices(SIZES, 500, rng)
    mutated = evolution.mutate(rows, SIZES, 0.0, rng)
    assert ((mutated != rows).sum(axis=1) == 1).all()
    assert ((mutated >= 0) & (mutated < np.array(SIZES))).all()
    assert (mutated[:, 1] == 0).all()
    assert {*map(tuple, mutated[:, [2]].tolist())} == {(c,) for c in range(5)}


def test_mutation_at_rate_one_changes_every_slot_that_can_change() -> None:
    rng = np.random.default_rng(1)
    rows = evolution.random_choices(SIZES, 50, rng)
    assert ((evolution.mutate(rows, SIZES, 1.0, rng) != rows) == [True, False, True, True]).all()


def test_a_space_without_a_decision_has_nothing_to_mutate() -> None:
    rows = np.zeros((3, 2), dtype=np.int64)
    np.testing.assert_array_equal(evolution.mutate(rows, (1, 1), 1.0, np.random.default_rng(2)), rows)


def test_a_child_has_each_slot_from_one_of_its_parents() -> None:
    rng = np.random.default_rng(3)
    mother, father = np.zeros((100, 6), dtype=np.int64), np.ones((100, 6), dtype=np.int64)
    children = evolution.cross(mother, father, rng)
    assert 0.4 < children.mean() < 0.6


def test_the_oldest_makes_way_and_a_full_tournament_finds_the_best() -> None:
    population = evolution.empty_population(3, 1)
    for value in (5.0, 1.0, 7.0, 9.0):
        assert population.full == (value == 9.0)
        population = evolution.add(population, np.array([[int(value)]]), np.array([value]))
    assert sorted(population.fitness_P.tolist()) == [1.0, 7.0, 9.0]
    winners = evolution.tournament(population, 64, 5, np.random.default_rng(4))
    np.testing.assert_array_equal(winners, np.ones((5, 1)))


@pytest.mark.parametrize("shape", [(200, 3), (50, 40), (1, 2), (0, 4)])
def test_the_first_of_each_is_numpys(shape: tuple[int, int]) -> None:
    """Where a row is one word, and where it takes several; a slot may have one choice."""
    rows = np.random.default_rng(0).integers(0, 300 if shape[1] > 3 else 4, size=shape)
    rows[:, 0] = 0
    rows = np.concatenate([rows, rows[:20]])
    _, wanted = np.unique(rows, axis=0, return_index=True)
    np.testing.assert_array_equal(evolution.first_of_each(rows), wanted)
    np.testing.assert_array_equal(evolution.first_of_each(rows[:, ::-1][:, ::-1]), wanted)
