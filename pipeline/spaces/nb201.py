"""NAS-Bench-201's cells in their macro skeleton (Dong and Yang 2020, arXiv 2001.00326).

A cell has four nodes; node 0 is its input, node 3 its output, and every other pair i < j is joined by an edge
that carries one of five operations. A node is the sum of what its edges bring. A convolution is
ReLU-Conv-BN; the pool is an average over the pixels that are inside the image. The skeleton: a 3×3 stem with
batch norm, three stages of N cells at widths C, 2C and 4C, a residual reduction before the second and the
third, and BN-ReLU, global average pooling and a linear classifier at the end.

Slots and choices are in the order of the published tables, so a row of a table is an `Arch`.

Edges that no live path reaches from the input, or that reach no output, are dead: they are in neither the
built network nor its supernet path, its layers or its ONNX file. This is where the space differs from the
tables, which trained and counted whole networks, dead edges and all (a dead convolution of zeros still brings
its batch norm's shift). `layers` counts the network that is built, `table_params` and `table_macs` count as
the tables do. What several edges want of one node, its rectified or pooled value, is worked out once.
A cell without any path brings zero, so that its network answers the same for every image.

Members that are isomorphic, or that skips make alike, stay apart: they have weights of their own in the
supernet, and rows of their own in the tables.

For gradient methods an edge can carry a weighted sum of its operations; such a mixture has a row per slot and
a column per operation, and stands for the cell of every edge's strongest operation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property, lru_cache, reduce
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

import numpy as np
from pydantic import Field

from pipeline.errors import ConfigError
from pipeline.settings import Settings
from pipeline.spaces.trace import Step, Trace, Value, deployed
from pipeline.types import Arch, FloatArray, Json, Layer, Slot

if TYPE_CHECKING:
    from torch import nn

    from pipeline.spaces.nb201_modules import NB201MixedSupernet, NB201Supernet

NAME = "nb201"
EDGES = ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3))
INCOMING = tuple(
    tuple((slot, source) for slot, (source, end) in enumerate(EDGES) if end == node) for node in (1, 2, 3)
)
"""Slot and source of the edges into nodes 1, 2 and 3."""
OPERATIONS = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
NONE, SKIP, CONV1, CONV3, POOL = range(len(OPERATIONS))
KERNELS = {CONV1: 1, CONV3: 3}
"""Kernel of the operations that are convolutions."""
WIDENING = (1, 2, 4)
"""Width of each stage, in C."""

Choices = tuple[int, ...]
V = TypeVar("V")


class NB201Settings(Settings):
    cells: int = Field(5, ge=1, le=50, description="cells per stage, N")
    channels: int = Field(16, ge=1, le=1024, description="width of the first stage, C")
    mixed_norm: Literal["none", "pools", "nodes"] = Field(
        "none",
        description="batch norm without scale and shift in the mixed supernet alone: after pools as DARTS "
        "searches its own space, or on every node's sum as DARTS-PRIME does",
    )


# --------------------------------------------------------------------------------------------------- the cell


def live_edges(choices: Choices) -> tuple[bool, ...]:
    """Per edge, whether it lies on a path from the cell's input to its output; `none` is no path."""
    reached, needed = {0}, {3}
    for op, (source, target) in zip(choices, EDGES, strict=True):
        if op != NONE and source in reached:
            reached.add(target)
    for op, (source, target) in zip(reversed(choices), reversed(EDGES), strict=True):
        if op != NONE and target in needed:
            needed.add(source)
    return tuple(
        op != NONE and source in reached and target in needed
        for op, (source, target) in zip(choices, EDGES, strict=True)
    )


class Node(Generic[V]):
    """A node's value, and what more than one edge may want of it."""

    def __init__(self, value: V, rectify: Callable[[V], V], pool: Callable[[V], V]) -> None:
        self.value = value
        self._rectify, self._pool = rectify, pool

    @cached_property
    def rectified(self) -> V:
        return self._rectify(self.value)

    @cached_property
    def pooled(self) -> V:
        return self._pool(self.value)


def run_cell(
    entry: V,
    edge: Callable[[int, Node[V]], V | None],
    rectify: Callable[[V], V],
    pool: Callable[[V], V],
    add: Callable[[V, V], V],
    settle: Callable[[V], V] | None = None,
) -> V | None:
    """A cell's output, whatever its values are: tensors, or operators that are written down.

    `edge(slot, source)` is what an edge brings, None where that is nothing; `settle` is done to every node's
    sum. None where no path leads through."""
    nodes: list[Node[V] | None] = [Node(entry, rectify, pool)]
    for incoming in INCOMING:
        brought: list[V] = []
        for slot, start in incoming:
            source = nodes[start]
            value = None if source is None else edge(slot, source)
            if value is not None:
                brought.append(value)
        if not brought:
            nodes.append(None)
            continue
        total = reduce(add, brought)
        nodes.append(Node(total if settle is None else settle(total), rectify, pool))
    return None if nodes[-1] is None else nodes[-1].value


def operate(op: int, source: Node[V], convolve: Callable[[V], V]) -> V | None:
    """What one operation makes of a node; `convolve` is the edge's Conv-BN, which takes rectified values."""
    if op == NONE:
        return None
    if op == SKIP:
        return source.value
    return source.pooled if op == POOL else convolve(source.rectified)


# -------------------------------------------------------------------------------------------------- the space


class NB201Space:
    """The space for one input. Implements `pipeline.spaces.base.RelaxedSpace`."""

    name = NAME
    slots = tuple(Slot(f"{source}-{target}", OPERATIONS) for source, target in EDGES)
    edges = slots
    largest = Arch(NAME, (CONV3,) * len(EDGES))
    smallest = Arch(NAME, tuple(SKIP if edge == (0, 3) else NONE for edge in EDGES))
    """The cheapest connected cell: its network is the bare skeleton."""

    def __init__(
        self, image_shape: tuple[int, int, int], num_classes: int, settings: NB201Settings | None = None
    ) -> None:
        height, width = image_shape[1:]
        if height != width or height < 8:
            raise ConfigError(
                f"space nb201 takes square images of 8×8 pixels or more, not {height}×{width}; "
                "set data.image_size"
            )
        self.settings = settings or NB201Settings()
        self.image_shape = image_shape
        self.num_classes = num_classes
        self.widths = tuple(self.settings.channels * factor for factor in WIDENING)
        self.sizes = (height, -(-height // 2), -(-height // 4))
        self._layers = lru_cache(maxsize=4096)(self._list_layers)

    def canonical(self, arch: Arch) -> Arch:
        """Dead edges set to `none`."""
        self._check(arch)
        live = live_edges(arch.choices)
        return Arch(NAME, tuple(op if alive else NONE for op, alive in zip(arch.choices, live, strict=True)))

    def _check(self, arch: Arch) -> None:
        fits = len(arch.choices) == len(EDGES) and all(0 <= op < len(OPERATIONS) for op in arch.choices)
        if arch.space != NAME or not fits:
            raise ConfigError(
                f"architecture {arch.space}{list(arch.choices)} is not of space nb201, which takes "
                f"{len(EDGES)} choices of 0 to {len(OPERATIONS) - 1}; was it made for another space?"
            )

    def uniform(self) -> Iterator[Arch]:
        """One operation on every edge."""
        for op in range(len(OPERATIONS)):
            if op != NONE:
                yield Arch(NAME, (op,) * len(EDGES))

    def layers(self, arch: Arch) -> tuple[Layer, ...]:
        return self._layers(self.canonical(arch).choices)

    def _list_layers(self, choices: Choices) -> tuple[Layer, ...]:
        return deployed(self._write(choices))

    def trace(self, arch: Arch) -> tuple[Step, ...]:
        """Operator by operator, as it is exported."""
        return self._write(self.canonical(arch).choices)

    def _write(self, choices: Choices) -> tuple[Step, ...]:
        trace = Trace(self.image_shape)
        x = trace.convolve(trace.image, self.widths[0], 3)
        for stage, width in enumerate(self.widths):
            if stage:
                x = _write_reduction(trace, x, width)
            for _ in range(self.settings.cells):
                x = _write_cell(trace, x, choices)
        trace.classify(trace.rectify(trace.normalise(x)), self.num_classes)
        return tuple(trace.steps)

    def table_params(self, arch: Arch) -> int:
        """Trained parameters as the tables count them (`params_M`, there in millions): with dead edges."""
        cells = self.settings.cells
        return sum(layer.parameters for layer in self.layers(self.smallest)) + sum(
            cells * (kernel**2 * width**2 + 2 * width)
            for kernel in self._kernels(arch)
            for width in self.widths
        )

    def table_macs(self, arch: Arch) -> int:
        """Multiply-adds as the tables count them (`macs_M`, there in millions).

        Two things make it more than the multiply-adds of `layers`: dead edges are included, and one addition
        per class for the classifier's bias. Batch norm, pooling and sums count nothing in both."""
        cells = self.settings.cells
        skeleton = sum(layer.macs for layer in self.layers(self.smallest)) + self.num_classes
        return skeleton + sum(
            cells * kernel**2 * width**2 * size**2
            for kernel in self._kernels(arch)
            for width, size in zip(self.widths, self.sizes, strict=True)
        )

    def _kernels(self, arch: Arch) -> Iterator[int]:
        """Of every convolution in the cell, dead or alive."""
        self._check(arch)
        return (KERNELS[op] for op in arch.choices if op in KERNELS)

    def describe(self, arch: Arch) -> Json:
        """Edge → operation; dead edges are `none`."""
        choices = self.canonical(arch).choices
        return {slot.name: OPERATIONS[op] for slot, op in zip(self.slots, choices, strict=True)}

    def fingerprint(self) -> Json:
        return {
            "space": NAME,
            "image_shape": list(self.image_shape),
            "num_classes": self.num_classes,
            **self.settings.model_dump(mode="json", exclude={"mixed_norm"}),
            **({} if self.settings.mixed_norm == "none" else {"mixed_norm": self.settings.mixed_norm}),
            "version": 1,
        }

    def build(self, arch: Arch) -> nn.Module:
        from pipeline.spaces.nb201_modules import NB201Network

        return NB201Network(self, arch)

    def supernet(self) -> NB201Supernet:
        from pipeline.spaces.nb201_modules import NB201Supernet

        return NB201Supernet(self)

    def mixed_supernet(self) -> NB201MixedSupernet:
        from pipeline.spaces.nb201_modules import NB201MixedSupernet

        return NB201MixedSupernet(self)

    def discretise(self, mix_EO: FloatArray) -> Arch:
        """The strongest operation of every edge, the first of equals: `none` where all weights are 0. Edges
        may be dead."""
        assert mix_EO.shape == (len(EDGES), len(OPERATIONS)), f"a mixture of shape {mix_EO.shape}"
        return Arch(NAME, tuple(mix_EO.argmax(axis=1).tolist()))

    def mix_of(self, arch: Arch) -> FloatArray:
        """1 for every edge's operation, `none` included."""
        self._check(arch)
        return np.eye(len(OPERATIONS))[list(arch.choices)]


# ------------------------------------------------------------------------------------ its parts, written down


def _write_reduction(trace: Trace, x: Value, channels: int) -> Value:
    strided = trace.convolve(trace.rectify(x), channels, 3, stride=2)
    main = trace.convolve(trace.rectify(strided), channels, 3)
    averaged = trace.pool(x, "average", 2, kernel=2)
    return trace.add(main, trace.convolve(averaged, channels, norm=False))


def _write_cell(trace: Trace, x: Value, choices: Choices) -> Value:
    def edge(slot: int, source: Node[Value]) -> Value | None:
        op = choices[slot]
        return operate(op, source, lambda active: trace.convolve(active, x.channels, KERNELS[op]))

    def average(value: Value) -> Value:
        return trace.pool(value, "average", 1)

    output = run_cell(x, edge, trace.rectify, average, trace.add)
    return trace.zero(x) if output is None else output
