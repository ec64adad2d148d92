"""What is worked out of a genotype of the space `cell`, and how: the same walk over nodes and cells makes
tensors (`cell_modules.py`) and writes operators down (`cell.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Generic, NamedTuple, Protocol, TypeVar

from pipeline.spaces.cell_choices import FIRST_NODE, REDUCE, SKIP, Genotype, Incoming, Pair

POOLS = ("max3", "avg3")
POOL_KERNEL = 3


class Convolution(NamedTuple):
    """Depthwise and pointwise, `repeats` times; the stride is that of the first."""

    kernel: int
    dilation: int
    repeats: int


CONVOLUTIONS = {
    "sep3": Convolution(3, 1, 2),
    "sep5": Convolution(5, 1, 2),
    "dil3": Convolution(3, 2, 1),
    "dil5": Convolution(5, 2, 1),
}

V = TypeVar("V")


class Position(NamedTuple):
    """A place in the stack. `sizes` are the pixels per side of the outputs it reads, the older one
    first."""

    kind: int
    width: int
    sizes: tuple[int, int]

    @property
    def size_out(self) -> int:
        return -(-self.sizes[1] // 2) if self.kind == REDUCE else self.sizes[1]

    def stride(self, source: int) -> int:
        return 2 if self.kind == REDUCE and source < FIRST_NODE else 1

    def halves(self, source: int) -> bool:
        """Whether an input is larger than the cell and has to be halved on its way in."""
        return self.sizes[source] != self.sizes[1]


class CellPlan(NamedTuple):
    """What is worked out of a cell: per node what it takes in (nothing: it is zero), and its output's
    nodes."""

    nodes: tuple[Incoming, ...]
    outputs: tuple[int, ...]

    @property
    def reads(self) -> tuple[int, ...]:
        """The inputs that are read."""
        sources = {source for incoming in self.nodes for source, _ in incoming}
        return tuple(source for source in range(FIRST_NODE) if source in sources)


Plan = tuple[CellPlan | None, ...]
"""Per place; None where a cell is zero or nobody reads it, and everywhere when the network has no
path."""


def make_plan(genotype: Genotype, kinds: Sequence[int], loose_ends: bool) -> Plan:
    """The live part of a network: from the stem on what is not zero, and of that what reaches the
    end."""
    cells: list[CellPlan | None] = []
    reached = (True, True)
    for kind in kinds:
        cells.append(_reached(genotype[kind], reached, loose_ends))
        reached = (reached[1], cells[-1] is not None)
    wanted = {len(cells) - 1}
    for place in reversed(range(len(cells))):
        cell = cells[place]
        if place not in wanted:
            cells[place] = None
        elif cell is not None:
            wanted |= {place - FIRST_NODE + source for source in cell.reads}
    return tuple(cells)


def _reached(nodes: Sequence[Incoming], inputs: tuple[bool, bool], loose_ends: bool) -> CellPlan | None:
    alive, live = list(inputs), []
    for incoming in nodes:
        live.append(tuple(pair for pair in incoming if alive[pair.source]))
        alive.append(bool(live[-1]))
    read = {source for incoming in live for source, _ in incoming} if loose_ends else set()
    outputs = tuple(node for node, incoming in enumerate(live, FIRST_NODE) if incoming and node not in read)
    return CellPlan(tuple(live), outputs) if outputs else None


class Operators(Protocol[V]):
    """What is done without weights, whatever values are: tensors, or operators that are written down."""

    def rectify(self, x: V) -> V: ...
    def pool(self, x: V, operation: str, stride: int) -> V: ...
    def join(self, values: Sequence[V]) -> V:
        """Their sum."""
        ...

    def concatenate(self, values: Sequence[V]) -> V: ...


class Node(Generic[V]):
    """A value, and what more than one operation may want of it."""

    def __init__(self, value: V, operators: Operators[V]) -> None:
        self.value = value
        self._operators = operators
        self._pooled: dict[str, V] = {}

    @cached_property
    def rectified(self) -> V:
        return self._operators.rectify(self.value)

    def pooled(self, operation: str, stride: int) -> V:
        """Every value is pooled at one stride."""
        if operation not in self._pooled:
            self._pooled[operation] = self._operators.pool(self.value, operation, stride)
        return self._pooled[operation]


def run_network(
    plan: Plan, stem: V, operators: Operators[V], cell: Callable[[int, Mapping[int, V]], V]
) -> Iterator[tuple[int, V]]:
    """Place and output of every live cell, in order. `cell(place, inputs)` takes rectified inputs."""
    older: Node[V] | None = Node(stem, operators)
    newer = older
    for place, live in enumerate(plan):
        made: Node[V] | None = None
        if live is not None:
            inputs = {}
            for source in live.reads:
                node = (older, newer)[source]
                assert node is not None, "what is read is alive"
                inputs[source] = node.rectified
            made = Node(cell(place, inputs), operators)
            yield place, made.value
        older, newer = newer, made


def run_cell(
    plan: CellPlan,
    inputs: Mapping[int, V],
    operators: Operators[V],
    edge: Callable[[int, Pair, Node[V]], V],
) -> V:
    """A cell's nodes side by side. `edge(node, pair, source)` is what a pair brings to a node."""
    nodes = {source: Node(value, operators) for source, value in inputs.items()}
    for node, incoming in enumerate(plan.nodes, FIRST_NODE):
        if incoming:
            brought = {pair: edge(node, pair, nodes[pair.source]) for pair in dict.fromkeys(incoming)}
            nodes[node] = Node(operators.join([brought[pair] for pair in incoming]), operators)
    return operators.concatenate([nodes[node].value for node in plan.outputs])


def has_weights(operation: str, stride: int) -> bool:
    return operation in CONVOLUTIONS or (operation == SKIP and stride > 1)


def operate(operation: str, source: Node[V], stride: int, weighted: Callable[[V], V]) -> V:
    """What an operation makes of a value; `weighted` is its part with weights, which takes rectified
    values."""
    if has_weights(operation, stride):
        return weighted(source.rectified)
    return source.value if operation == SKIP else source.pooled(operation, stride)
