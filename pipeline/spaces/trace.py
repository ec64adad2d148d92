"""A network written down without being built: every operator of the file that is exported from it, in the
file's order, and what a runtime makes of them.

Memory is worked out from the operators as exported (`pipeline.costs.memory`), the rest from `deployed`: the
operators that are left once a runtime has fused them. The fusions are those of ONNX Runtime on a CPU at its
default optimisation level (core/optimizer/nchwc_transformer.cc, where it has blocked layouts, and
conv_add_act_fusion.cc elsewhere); `tests/spaces/test_trace.py` holds them to its optimised graphs. It fuses
fewer sums where channels do not fill its blocks (8 or 16), and no rectifier into a lone batch norm where it
has no blocked layouts. Other providers may fuse less: what a fused sum takes is fitted for each device, and
may be as much as a sum's.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, reduce
from typing import Literal, NamedTuple

from pipeline.types import Layer, LayerKind

Kind = LayerKind | Literal["input", "view", "other"]
"""Besides layers: the images, what is only another shape of its input, and what moves numbers."""


class Step(NamedTuple):
    """An operator: `numbers` are what it puts out for one image, `reads` the steps whose output it takes.
    `layer` is None for what works nothing out: the images, views, slices and concatenations."""

    kind: Kind
    numbers: int
    reads: tuple[int, ...] = ()
    layer: Layer | None = None


class Value(NamedTuple):
    """A feature map: the number of the step that made it, its channels and pixels per side."""

    maker: int
    channels: int
    size: int


_layer = lru_cache(maxsize=4096)(Layer)
"""Networks repeat their operators hundreds of times; each is kept once."""


class Trace:
    """Writes a network down, beginning with its image (C, H, W). What is worked out of the same values twice
    without weights is there once, as in an exported graph.

    Implements `pipeline.spaces.cell_plan.Operators`."""

    def __init__(self, image_shape: tuple[int, int, int]) -> None:
        channels, size, _ = image_shape
        self.steps = [Step("input", channels * size**2)]
        self.image = Value(0, channels, size)
        self._known: dict[tuple[str, int, tuple[int, ...]], Value] = {}

    def convolve(
        self, x: Value, channels: int, kernel: int = 1, stride: int = 1, *, groups: int = 1, norm: bool = True
    ) -> Value:
        """With `norm`, batch norm is folded into it."""
        weights = kernel**2 * (x.channels // groups) * channels
        parameters = weights + 2 * channels * norm
        size = -(-x.size // stride)
        return self._append(
            _layer("conv", x.channels, channels, x.size, size, kernel, groups, parameters, norm), x
        )

    def normalise(self, x: Value) -> Value:
        """Batch norm that stands alone."""
        parameters = 2 * x.channels
        return self._append(_layer("norm", x.channels, x.channels, x.size, x.size, parameters=parameters), x)

    def rectify(self, x: Value) -> Value:
        return self._once("activation", _layer("activation", x.channels, x.channels, x.size, x.size), x)

    def pool(self, x: Value, operation: str, stride: int, kernel: int = 3) -> Value:
        size = -(-x.size // stride)
        layer = _layer("pool", x.channels, x.channels, x.size, size, kernel)
        return self._once(f"{operation} {kernel}", layer, x)

    def add(self, x: Value, y: Value) -> Value:
        return self._once("add", _layer("add", x.channels, x.channels, x.size, x.size), x, y)

    def zero(self, x: Value) -> Value:
        """The difference of a value and itself."""
        return self._once("subtract", _layer("add", x.channels, x.channels, x.size, x.size), x, x)

    def join(self, values: Sequence[Value]) -> Value:
        return reduce(self.add, values)

    def concatenate(self, values: Sequence[Value]) -> Value:
        if len(values) == 1:
            return values[0]
        channels, size = sum(value.channels for value in values), values[0].size
        return self._move("concatenate", channels, channels * size**2, size, *values)

    def shift(self, x: Value) -> Value:
        """Without its first row, then without its first column: exporters slice one axis at a time."""
        size = x.size - 1
        rows = self._move("without a row", x.channels, x.channels * size * x.size, x.size, x)
        return self._move("without a column", x.channels, x.channels * size**2, size, rows)

    def classify(self, x: Value, num_classes: int) -> None:
        """Global average pooling and a linear layer."""
        pooled = self._append(_layer("pool", x.channels, x.channels, x.size, 1), x)
        self.steps.append(Step("view", x.channels, (pooled.maker,)))
        flat = pooled._replace(maker=len(self.steps) - 1)
        parameters = (x.channels + 1) * num_classes
        self._append(_layer("linear", x.channels, num_classes, parameters=parameters), flat)

    def _append(self, layer: Layer, *inputs: Value) -> Value:
        return self._write(layer, tuple([value.maker for value in inputs]))

    def _once(self, name: str, layer: Layer, *inputs: Value) -> Value:
        reads = tuple([value.maker for value in inputs])
        key = (name, layer.size_out, reads)
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = self._write(layer, reads)
        return known

    def _write(self, layer: Layer, reads: tuple[int, ...]) -> Value:
        channels, size = layer.channels_out, layer.size_out
        self.steps.append(Step(layer.kind, channels * size**2, reads, layer))
        return Value(len(self.steps) - 1, channels, size)

    def _move(self, name: str, channels: int, numbers: int, size: int, *inputs: Value) -> Value:
        reads = tuple([value.maker for value in inputs])
        key = (name, size, reads)
        if key not in self._known:
            self.steps.append(Step("other", numbers, reads))
            self._known[key] = Value(len(self.steps) - 1, channels, size)
        return self._known[key]


# ------------------------------------------------------------------------------------------- what is deployed


_INTO_CONVOLUTION: tuple[Kind, ...] = ("norm", "add", "activation")
"""What a convolution takes in, in this order, each at most once."""

_INTO_NORM: tuple[Kind, ...] = ("activation",)


def deployed(steps: Sequence[Step]) -> tuple[Layer, ...]:
    """The layers of a network as a runtime runs it.

    An operator is taken in by the convolution before it where nobody else reads what that makes: a batch
    norm (`normalised`: it is gone), a sum (`fused_add`: the kernel begins with the other summand in place of
    zeros) and a rectifier (gone), which also goes into a batch norm that stands alone. A convolution takes a
    sum before a rectifier or none, and one sum only; one of two convolutions takes theirs."""
    readers = Counter(itertools.chain.from_iterable([step.reads for step in steps]))
    layers: list[Layer] = []
    takes: list[tuple[Kind, ...]] = []  # per step, what the kernel that it is in takes in after it
    for kind, _, reads, layer in steps:
        into = [takes[maker] for maker in reads if readers[maker] == 1 and kind in takes[maker]]
        if into:
            takes.append(into[0][into[0].index(kind) + 1 :])
        else:
            takes.append(_INTO_CONVOLUTION if kind == "conv" else _INTO_NORM if kind == "norm" else ())
        if layer is not None and not (into and kind == "activation"):
            layers.append(_taken_in(layer) if into else layer)
    return tuple(layers)


@lru_cache(maxsize=4096)
def _taken_in(layer: Layer) -> Layer:
    return replace(layer, normalised=True) if layer.kind == "norm" else replace(layer, kind="fused_add")
