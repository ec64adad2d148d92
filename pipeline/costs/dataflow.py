"""Networks as a list of steps: how many numbers an operator puts out, and whose it reads. What memory is
worked out from, without building anything.

Written down in the order in which the exported graph has its operators, for the spaces named in `FLOWS`;
`tests/costs` holds them to the graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from pipeline.spaces.base import SearchSpace
    from pipeline.spaces.cell import CellSpace, Pair, Position
    from pipeline.spaces.cell import Node as CellNode
    from pipeline.spaces.mbconv import MBConvSpace, Unit
    from pipeline.spaces.nb201 import NB201Space
    from pipeline.spaces.nb201 import Node as NB201Node
    from pipeline.types import Arch

Kind = Literal["input", "conv", "norm", "activation", "view", "other"]


class Step(NamedTuple):
    """An operator: `numbers` are what it puts out for one image, `reads` the steps whose output it takes."""

    kind: Kind
    numbers: int
    reads: tuple[int, ...] = ()


class Value(NamedTuple):
    """A feature map: the number of the step that made it, its channels and pixels per side."""

    maker: int
    channels: int
    size: int


class Tape:
    """Writes a network down, beginning with its image (C, H, W). What is worked out of the same values twice
    without weights is there once, as in an exported graph."""

    def __init__(self, image_shape: tuple[int, int, int]) -> None:
        channels, size, _ = image_shape
        self.steps = [Step("input", channels * size**2)]
        self.image = Value(0, channels, size)
        self._known: dict[tuple[str, int, tuple[int, ...]], int] = {}

    def convolve(self, x: Value, channels: int, stride: int = 1) -> Value:
        """Batch norm is folded into it."""
        size = -(-x.size // stride)
        return Value(self._append("conv", channels * size**2, (x.maker,)), channels, size)

    def rectify(self, x: Value) -> Value:
        return self._once("relu", x.channels, x.size, x, kind="activation")

    def normalise(self, x: Value) -> Value:
        return self._once("norm", x.channels, x.size, x, kind="norm")

    def pool(self, x: Value, operation: str, stride: int) -> Value:
        return self._once(operation, x.channels, -(-x.size // stride), x)

    def add(self, x: Value, y: Value) -> Value:
        return self._once("add", x.channels, x.size, x, y)

    def zero(self, x: Value) -> Value:
        """The difference of a value and itself."""
        return self._once("zero", x.channels, x.size, x, x)

    def join(self, values: Sequence[Value]) -> Value:
        return reduce(self.add, values)

    def concatenate(self, values: Sequence[Value]) -> Value:
        if len(values) == 1:
            return values[0]
        return self._once("concat", sum(value.channels for value in values), values[0].size, *values)

    def shift(self, x: Value) -> Value:
        """Without its first row, then without its first column: exporters slice one axis at a time."""
        rows = self._maker("rows", x.channels * (x.size - 1) * x.size, (x.maker,))
        return self._once("columns", x.channels, x.size - 1, x._replace(maker=rows))

    def classify(self, x: Value, num_classes: int) -> tuple[Step, ...]:
        """Global average pooling and a linear layer; the steps of the whole."""
        pooled = self._once("mean", x.channels, 1, x)
        flat = self._once("flatten", x.channels, 1, pooled, kind="view")
        self._append("other", num_classes, (flat.maker,))
        return tuple(self.steps)

    def _once(self, name: str, channels: int, size: int, *inputs: Value, kind: Kind = "other") -> Value:
        makers = tuple([value.maker for value in inputs])
        return Value(self._maker(name, channels * size**2, makers, kind), channels, size)

    def _maker(self, name: str, numbers: int, makers: tuple[int, ...], kind: Kind = "other") -> int:
        key = (name, numbers, makers)
        if key not in self._known:
            self._known[key] = self._append(kind, numbers, makers)
        return self._known[key]

    def _append(self, kind: Kind, numbers: int, makers: tuple[int, ...]) -> int:
        self.steps.append(Step(kind, numbers, makers))
        return len(self.steps) - 1


# --------------------------------------------------------------------------------------------------- mbconv


def mbconv_flow(space: MBConvSpace, arch: Arch) -> tuple[Step, ...]:
    tape = Tape(space.image_shape)
    plan = space.plan(arch)

    def unit(x: Value, unit: Unit) -> Value:
        x = tape.convolve(x, unit.channels_out, unit.stride)
        return tape.rectify(x) if unit.relu else x

    x = unit(tape.image, plan.stem)
    for block in plan.blocks:
        entry, x = x, reduce(unit, block.units, x)
        x = tape.add(entry, x) if block.residual else x
    return tape.classify(unit(x, plan.head), plan.num_classes)


# ---------------------------------------------------------------------------------------------------- nb201


def nb201_flow(space: NB201Space, arch: Arch) -> tuple[Step, ...]:
    """With one cell per stage: the cells of a stage are alike, and so is what each of them needs."""
    from pipeline.spaces.nb201 import operate, run_cell

    tape = Tape(space.image_shape)
    choices = space.canonical(arch).choices

    def edge(slot: int, source: NB201Node[Value]) -> Value | None:
        return operate(choices[slot], source, lambda active: tape.convolve(active, active.channels))

    def average(x: Value) -> Value:
        return tape.pool(x, "average 3", 1)

    x = tape.convolve(tape.image, space.widths[0])
    for stage, width in enumerate(space.widths):
        if stage:
            main = tape.convolve(tape.rectify(x), width, stride=2)
            main = tape.convolve(tape.rectify(main), width)
            x = tape.add(main, tape.convolve(tape.pool(x, "average 2", 2), width))
        output = run_cell(x, edge, tape.rectify, average, tape.add)
        x = tape.zero(x) if output is None else output
    return tape.classify(tape.rectify(tape.normalise(x)), space.num_classes)


# ----------------------------------------------------------------------------------------------------- cell


def cell_flow(space: CellSpace, arch: Arch) -> tuple[Step, ...]:
    from pipeline.spaces.cell import run_cell, run_network

    tape = Tape(space.image_shape)
    plan = space.plan(arch)

    def cell(place: int, inputs: Mapping[int, Value]) -> Value:
        position, live = space.positions[place], plan[place]
        assert live is not None, "only live cells are worked out"
        entered = {
            source: (_halve if position.halves(source) else Tape.convolve)(tape, x, position.width)
            for source, x in inputs.items()
        }
        output = run_cell(live, entered, tape, lambda node, pair, x: _edge(tape, position, pair, x))
        if space.variant.loose_ends:
            output = tape.convolve(tape.rectify(output), position.width)
        return output

    x = tape.image
    for step, stride in enumerate(space.stem_strides):
        x = tape.convolve(tape.rectify(x) if step else x, space.stem_width, stride)
    outputs = [output for _, output in run_network(plan, x, tape, cell)]
    return tape.classify(outputs[-1] if outputs else tape.zero(x), space.num_classes)


def _edge(tape: Tape, position: Position, pair: Pair, source: CellNode[Value]) -> Value:
    from pipeline.spaces.cell import CONVOLUTIONS, SKIP, operate

    stride = position.stride(pair.source)

    def weighted(x: Value) -> Value:
        if pair.operation == SKIP:
            return _halve(tape, x, position.width)
        for step in range(CONVOLUTIONS[pair.operation].repeats):
            x = tape.rectify(x) if step else x
            depthwise = tape.convolve(x, x.channels, 1 if step else stride)
            x = tape.convolve(depthwise, x.channels)
        return x

    return operate(pair.operation, source, stride, weighted)


def _halve(tape: Tape, x: Value, channels: int) -> Value:
    """Two convolutions, on the even and, where the size is even, on the odd pixels."""
    shifted = x if x.size % 2 else tape.shift(x)
    even = tape.convolve(x, channels // 2, 2)
    odd = tape.convolve(shifted, channels - channels // 2, 2)
    return tape.concatenate([even, odd])


FLOWS: dict[str, Callable[[Any, Arch], tuple[Step, ...]]] = {
    "mbconv": mbconv_flow,
    "nb201": nb201_flow,
    "cell": cell_flow,
}
"""By the name of a space. Memory cannot be limited in a space that is not here."""


def flow_of(space: SearchSpace, arch: Arch) -> tuple[Step, ...]:
    """Raises KeyError for a space that is not in `FLOWS`, ConfigError for an architecture of another."""
    return FLOWS[space.name](space, arch)
