"""Which architectures lie near a mixture of operations, which is what a gradient method finds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
from numpy.random import Generator

from pipeline.algorithms import relaxation
from pipeline.algorithms.relaxation import Mask
from pipeline.spaces.base import RelaxedSpace
from pipeline.types import Arch, FloatArray, Slot

NONE = "none"
"""Name of the operation that brings nothing, in every space that has one."""

TEMPERATURES = (0.25, 0.5, 1.0, 2.0, 4.0)
"""How far a mixture is perturbed, in turn, to find architectures beside it."""

SECOND_CHANCE = 0.01
"""Weight that every operation has in those perturbations, as a share of the largest: also those that
were masked, or never offered."""


class Mixes(Protocol):
    """Says what an architecture is as a mixture, as a space does and a relaxed evaluator."""

    def mix_of(self, arch: Arch) -> FloatArray: ...


class Discretises(Protocol):
    """Says what architecture a mixture stands for, as a space does and a relaxed evaluator."""

    def discretise(self, mix_EO: FloatArray) -> Arch: ...


class Nearest:
    """Ranks architectures by how far a mixture (E, O) is from them as zeros and ones: the squared distance,
    which Disc of the mixture makes least. A dead edge of a canonical architecture stands on `none`.
    Implements `pipeline.derive.Ranker`."""

    def __init__(self, mixes: Mixes, mix_EO: FloatArray) -> None:
        self._mixes, self._mix_EO = mixes, mix_EO

    def losses(self, archs: Sequence[Arch], *, step: int = 0, thorough: bool = False) -> FloatArray:
        """Shape (N, 1)."""
        arch_NEO = np.stack([self._mixes.mix_of(arch) for arch in archs])
        return np.asarray(((arch_NEO - self._mix_EO) ** 2).sum(axis=(1, 2)))[:, None]


def drawn_by(rule: Discretises, mix_EO: FloatArray, temperature: float, rng: Generator) -> Arch:
    """At a temperature of 1 an operation stands on an edge as often as its share says, where the rule
    takes the strongest."""
    return rule.discretise(relaxation.perturbed(mix_EO, temperature, rng))


def drawn_beside(space: RelaxedSpace, mix_EO: FloatArray, num: int, rng: Generator) -> list[Arch]:
    """Architectures for a mixture with its weights shaken, little and much in turn."""
    loose_EO = with_second_chance(mix_EO, operations_of(space.edges))
    return [drawn_by(space, loose_EO, TEMPERATURES[i % len(TEMPERATURES)], rng) for i in range(num)]


def with_second_chance(mix_EO: FloatArray, valid_EO: Mask) -> FloatArray:
    """The mixture with a little weight on every operation that an edge may have."""
    return np.asarray(mix_EO + SECOND_CHANCE * max(mix_EO.max(), SECOND_CHANCE) * valid_EO)


def operations_of(edges: Iterable[Slot], offers_none: bool = True) -> Mask:
    """Where a mixture may have weight, shape (E, O)."""
    choices = [edge.choices for edge in edges]
    mask_EO = np.zeros((len(choices), max(map(len, choices))), dtype=bool)
    for row, names in enumerate(choices):
        mask_EO[row, : len(names)] = [offers_none or name != NONE for name in names]
    return mask_EO
