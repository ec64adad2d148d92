"""What the choices of the space `cell` stand for: per kind of cell and node, what the node takes in.

`darts` and `enas` differ in how that is chosen (`Variant`); a genotype says the same of both.
"""

from __future__ import annotations

import itertools
from functools import lru_cache
from typing import NamedTuple, Protocol

from pipeline.types import Slot

KINDS = ("normal", "reduce")
NORMAL, REDUCE = range(len(KINDS))
FIRST_NODE = 2
"""Values 0 and 1 are the cell's inputs."""
NONE, SKIP = "none", "skip"

Choices = tuple[int, ...]


class Pair(NamedTuple):
    """What a node takes in: an earlier value, and an operation on it."""

    source: int
    operation: str


Incoming = tuple[Pair, ...]
Genotype = tuple[tuple[Incoming, ...], ...]
"""Per kind of cell, per node; `none` is left out."""


class Variant(Protocol):
    """How a node is chosen. All nodes take the same number of choices, `width`."""

    operations: tuple[str, ...]
    nodes: int
    width: int
    loose_ends: bool
    """Whether the output is a convolution of the nodes that nobody reads; else it is all nodes."""

    def slots(self, name: str, node: int) -> tuple[Slot, ...]: ...
    def decode(self, node: int, choices: Choices) -> Incoming: ...
    def encode(self, node: int, incoming: Incoming) -> Choices:
        """The choices of a node that takes this in; all 0 for one that takes in nothing."""
        ...

    def thinnest(self, node: int, first: Pair) -> Incoming:
        """The node in the cheapest cell that has `first` as its only way in."""
        ...


class Darts:
    operations: tuple[str, ...] = (NONE, SKIP, "max3", "avg3", "sep3", "sep5", "dil3", "dil5")
    nodes = 4
    width = 3
    loose_ends = False

    def slots(self, name: str, node: int) -> tuple[Slot, ...]:
        inputs = tuple(f"{low},{high}" for low, high in _two_of(node))
        return (
            Slot(f"{name}.inputs", inputs),
            Slot(f"{name}.first", self.operations),
            Slot(f"{name}.second", self.operations),
        )

    def decode(self, node: int, choices: Choices) -> Incoming:
        inputs, *operations = choices
        named = [self.operations[operation] for operation in operations]
        pairs = (Pair(*pair) for pair in zip(_two_of(node)[inputs], named, strict=True))
        return tuple(pair for pair in pairs if pair.operation != NONE)

    def encode(self, node: int, incoming: Incoming) -> Choices:
        """An input that brings nothing is the first that is free."""
        by_source = {source: self.operations.index(operation) for source, operation in incoming}
        free = (source for source in range(node) if source not in by_source)
        low, high = sorted([*by_source, *free][:2])
        return _two_of(node).index((low, high)), by_source.get(low, 0), by_source.get(high, 0)

    def thinnest(self, node: int, first: Pair) -> Incoming:
        return (first,) if node == FIRST_NODE else ()


class Enas:
    operations: tuple[str, ...] = (SKIP, "avg3", "max3", "sep3", "sep5")
    nodes = 5
    width = 4
    loose_ends = True

    def slots(self, name: str, node: int) -> tuple[Slot, ...]:
        inputs = tuple(map(str, range(node)))
        return (
            Slot(f"{name}.input_a", inputs),
            Slot(f"{name}.operation_a", self.operations),
            Slot(f"{name}.input_b", inputs),
            Slot(f"{name}.operation_b", self.operations),
        )

    def decode(self, node: int, choices: Choices) -> Incoming:
        input_a, operation_a, input_b, operation_b = choices
        return Pair(input_a, self.operations[operation_a]), Pair(input_b, self.operations[operation_b])

    def encode(self, node: int, incoming: Incoming) -> Choices:
        chosen = sorted((source, self.operations.index(operation)) for source, operation in incoming)
        return tuple(itertools.chain.from_iterable(chosen)) or (0,) * self.width

    def thinnest(self, node: int, first: Pair) -> Incoming:
        return (first if node == FIRST_NODE else Pair(node - 1, SKIP),) * 2


VARIANTS: dict[str, Variant] = {"darts": Darts(), "enas": Enas()}


@lru_cache
def _two_of(values: int) -> tuple[tuple[int, int], ...]:
    return tuple(itertools.combinations(range(values), 2))
