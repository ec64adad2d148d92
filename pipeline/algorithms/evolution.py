"""Regularised evolution's parts, on rows of choices.

E. Real, A. Aggarwal, Y. Huang, Q. V. Le, "Regularized Evolution for Image Classifier Architecture Search",
2018, arXiv 1802.01548: the best of a random few is mutated, and the oldest member dies, however good it is.

Axes: P members, S slots, N rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.random import Generator

from pipeline.types import FloatArray, IntArray


def random_choices(sizes: Sequence[int], num_rows: int, rng: Generator) -> IntArray:
    """Rows drawn uniformly, shape (num_rows, S)."""
    return rng.integers(0, np.asarray(sizes), size=(num_rows, len(sizes)), dtype=np.int64)


def first_of_each(rows_NS: IntArray) -> IntArray:
    """Where each distinct row stands first, in lexicographic order of the rows; choices are not negative.

    As np.unique over an axis has it, at a fraction of the time: rows are read as numbers, in as few words as
    hold them, and the big-endian bytes of several words sort as numbers do."""
    words_NW = _words(rows_NS)
    if words_NW.shape[1] == 1:
        return np.unique(words_NW.ravel(), return_index=True)[1]
    written_NW = words_NW.astype(">i8")
    row = np.dtype((np.void, written_NW.itemsize * written_NW.shape[1]))
    return np.unique(written_NW.view(row).ravel(), return_index=True)[1]


def _words(rows_NS: IntArray) -> IntArray:
    """Rows of W columns in the same order, each of which holds as many slots as it can."""
    words: list[IntArray] = []
    room = 1
    rows_NS = rows_NS.astype(np.int64, copy=False)
    for slot_N, size in zip(rows_NS.T, (rows_NS.max(axis=0, initial=0) + 1).tolist(), strict=True):
        if size > room or not words:
            words.append(np.zeros(len(rows_NS), dtype=np.int64))
            room = 2**63 - 1
        words[-1] = words[-1] * size + slot_N
        room //= size
    return np.stack(words, axis=1)


def mutate(choices_NS: IntArray, sizes: Sequence[int], rate: float, rng: Generator) -> IntArray:
    """A copy where every slot changes with probability `rate`, and one at least; a change is never to itself.

    Slots with one choice stay; rows of a space without any decision come back as they are."""
    sizes_S = np.asarray(sizes)
    deciding = np.flatnonzero(sizes_S > 1)
    if not len(deciding):
        return choices_NS.copy()
    changed_NS = (rng.random(choices_NS.shape) < rate) & (sizes_S > 1)
    forced_N = rng.choice(deciding, size=len(choices_NS))
    changed_NS[np.arange(len(choices_NS)), forced_N] |= ~changed_NS.any(axis=1)
    offset_NS = 1 + rng.integers(0, np.maximum(sizes_S - 1, 1), size=choices_NS.shape)
    return np.where(changed_NS, (choices_NS + offset_NS) % sizes_S, choices_NS)


def cross(mother_NS: IntArray, father_NS: IntArray, rng: Generator) -> IntArray:
    """Uniform crossover: every slot from either parent with equal probability."""
    return np.where(rng.random(mother_NS.shape) < 0.5, mother_NS, father_NS)


class Population(NamedTuple):
    """P places in a ring; `born` counts all members ever, so the next one takes place `born mod P`."""

    choices_PS: IntArray
    fitness_P: FloatArray
    born: IntArray

    @property
    def full(self) -> bool:
        return int(self.born) >= len(self.fitness_P)


def empty_population(num_members: int, num_slots: int) -> Population:
    """No members yet; an empty place has fitness +inf."""
    choices_PS = np.zeros((num_members, num_slots), dtype=np.int64)
    return Population(choices_PS, np.full(num_members, np.inf), np.asarray(0, dtype=np.int64))


def add(population: Population, choices_NS: IntArray, fitness_N: FloatArray) -> Population:
    """The population after N births, the oldest member making way at each."""
    choices_PS, fitness_P = population.choices_PS.copy(), population.fitness_P.copy()
    places_N = (int(population.born) + np.arange(len(fitness_N))) % len(fitness_P)
    for place, row_S, fitness in zip(places_N, choices_NS, fitness_N, strict=True):
        choices_PS[place], fitness_P[place] = row_S, fitness
    return Population(
        choices_PS, fitness_P, np.asarray(int(population.born) + len(fitness_N), dtype=np.int64)
    )


def tournament(population: Population, num_entrants: int, num_winners: int, rng: Generator) -> IntArray:
    """The fittest (lowest) of `num_entrants` random members, `num_winners` times over, shape (num_winners,
    S)."""
    entrants_NE = rng.integers(0, len(population.fitness_P), size=(num_winners, num_entrants))
    winners_N = np.argmin(population.fitness_P[entrants_NE], axis=1)
    return np.asarray(population.choices_PS[entrants_NE[np.arange(num_winners), winners_N]])
