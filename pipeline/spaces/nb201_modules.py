"""The torch side of the space `nb201`: the ordinary network, the supernet that holds all of them, and the one
in which every edge is a weighted sum."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable
from functools import partial, reduce
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.spaces.nb201 import (
    EDGES,
    KERNELS,
    NONE,
    OPERATIONS,
    SKIP,
    Choices,
    Node,
    live_edges,
    operate,
    run_cell,
)
from pipeline.spaces.pooling import average_pool
from pipeline.types import Arch

if TYPE_CHECKING:
    from pipeline.spaces.nb201 import NB201Space

Edge = tuple[int, int]
"""A slot and one of its operations."""


class ConvNorm(nn.Module):
    """Convolution and batch norm; with `shared` the norm always takes the batch's own statistics, with
    `affine` it has a scale and a shift."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        kernel: int,
        stride: int,
        shared: bool,
        affine: bool = True,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, kernel, stride, kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(channels_out, affine=affine, track_running_stats=not shared)
        _initialise(self.conv)

    def forward(self, images: Tensor, scale: Tensor | None = None) -> Tensor:
        """`scale`, one number, where the norm is shared and has none of its own."""
        convolved: Tensor = self.conv(images)
        out: Tensor = self.norm(convolved) if scale is None else _normalise(convolved, scale)
        return out


class Reduction(nn.Module):
    """Half the size at another width: two convolutions beside an averaged and projected short cut."""

    def __init__(self, channels_in: int, channels_out: int, shared: bool) -> None:
        super().__init__()
        self.strided = ConvNorm(channels_in, channels_out, 3, 2, shared)
        self.plain = ConvNorm(channels_out, channels_out, 3, 1, shared)
        self.shortcut = nn.Conv2d(channels_in, channels_out, 1, bias=False)
        _initialise(self.shortcut)

    def forward(self, x: Tensor) -> Tensor:
        main: Tensor = self.plain(F.relu(self.strided(F.relu(x))))
        averaged = F.avg_pool2d(x, 2, 2, ceil_mode=True, count_include_pad=False)
        short: Tensor = self.shortcut(averaged)
        return main + short


class Cell(nn.Module):
    """The convolutions of one cell, by edge and operation."""

    def __init__(self, channels: int, held: Iterable[Edge], shared: bool, affine: bool = True) -> None:
        super().__init__()
        self.convs = nn.ModuleDict(
            {
                _key(slot, op): ConvNorm(channels, channels, KERNELS[op], 1, shared, affine)
                for slot, op in held
            }
        )

    def forward(self, x: Tensor, choices: Choices) -> Tensor:
        def edge(slot: int, source: Node[Tensor]) -> Tensor | None:
            return self.operation(slot, choices[slot], source)

        output = run_cell(x, edge, F.relu, _average, operator.add)
        return x - x if output is None else output

    def operation(self, slot: int, op: int, source: Node[Tensor]) -> Tensor | None:
        """What one operation on one edge makes of its source; None for `none`."""
        return operate(op, source, lambda active: self.convs[_key(slot, op)](active))


class Mixture(NamedTuple):
    """Weights of all operations of all edges, and which of them are computed, edge by edge."""

    weight_EO: Tensor
    live: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, weight_EO: Tensor) -> Mixture:
        """An operation is computed where its weight is not 0, it brings something, and its edge lies on a
        path from the cell's input to its output."""
        rows = weight_EO.detach().tolist()
        live = [tuple(op for op, weight in enumerate(row) if op != NONE and weight != 0) for row in rows]
        reached = live_edges(tuple(SKIP if ops else NONE for ops in live))
        return cls(weight_EO, tuple(ops if alive else () for ops, alive in zip(live, reached, strict=True)))


class MixedCell(Cell):
    """A cell whose edges are weighted sums. Convolutions' norms have no scale, which would be a second
    weight; `norm` as in `NB201Settings.mixed_norm`."""

    def __init__(self, channels: int, held: Iterable[Edge], shared: bool, norm: str) -> None:
        super().__init__(channels, held, shared, affine=False)
        self.pool = _normalised_average if norm == "pools" else _average
        self.settle = _normalise if norm == "nodes" else None

    def forward(self, x: Tensor, mixture: Mixture) -> Tensor:  # type: ignore[override]
        def edge(slot: int, source: Node[Tensor]) -> Tensor | None:
            parts = [self._weighted(mixture, slot, op, source) for op in mixture.live[slot]]
            return reduce(operator.add, parts) if parts else None

        output = run_cell(x, edge, F.relu, self.pool, operator.add, self.settle)
        return x - x if output is None else output

    def _weighted(self, mixture: Mixture, slot: int, op: int, source: Node[Tensor]) -> Tensor:
        """Of a convolution, the weight is its norm's scale: a pass less over the map in each direction."""
        weight = mixture.weight_EO[slot, op]
        if op in KERNELS:
            scaled: Tensor = self.convs[_key(slot, op)](source.rectified, weight)
            return scaled
        value = self.operation(slot, op, source)
        assert value is not None, "`none` is never live"
        return weight * value


class Skeleton(nn.Module):
    """Everything around the cells, and the cells with the convolutions `held` of each."""

    def __init__(
        self,
        space: NB201Space,
        held: Iterable[Edge],
        shared: bool,
        make_cell: Callable[[int, Iterable[Edge], bool], nn.Module] = Cell,
    ) -> None:
        super().__init__()
        held = tuple(held)
        widths = space.widths
        self.stem = ConvNorm(space.image_shape[0], widths[0], 3, 1, shared)
        self.stages = nn.ModuleList(
            nn.ModuleList(make_cell(width, held, shared) for _ in range(space.settings.cells))
            for width in widths
        )
        self.reductions = nn.ModuleList(
            Reduction(before, after, shared) for before, after in itertools.pairwise(widths)
        )
        self.norm = nn.BatchNorm2d(widths[-1], track_running_stats=not shared)
        self.classifier = nn.Linear(widths[-1], space.num_classes)
        nn.init.normal_(self.classifier.weight, 0.0, 0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, images: Tensor, choices: Choices | Mixture) -> Tensor:
        """Logits, shape (N, classes), of the cell with these choices; dead edges must be `none`."""
        x: Tensor = self.stem(images)
        for cells, reduction in zip(self.stages, [None, *self.reductions], strict=True):
            x = x if reduction is None else reduction(x)
            assert isinstance(cells, nn.ModuleList)
            for cell in cells:
                x = cell(x, choices)
        logits: Tensor = self.classifier(F.relu(self.norm(x)).mean((2, 3)))
        return logits


class NB201Network(nn.Module):
    """An ordinary classifier: images (N, C, H, W) → logits (N, classes)."""

    def __init__(self, space: NB201Space, arch: Arch) -> None:
        super().__init__()
        self.choices = space.canonical(arch).choices
        held = ((slot, op) for slot, op in enumerate(self.choices) if op in KERNELS)
        self.skeleton = Skeleton(space, held, shared=False)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.skeleton(images, self.choices)
        return logits


class NB201Supernet(nn.Module):
    """Every member of the space: each edge of each cell has weights of its own for each convolution.
    Implements `pipeline.spaces.base.Supernet`."""

    def __init__(self, space: NB201Space) -> None:
        super().__init__()
        self.space = space
        every = ((slot, op) for slot in range(len(EDGES)) for op in KERNELS)
        self.skeleton = Skeleton(space, every, shared=True)

    def module(self) -> nn.Module:
        return self

    def forward(self, images: Tensor, arch: Arch) -> Tensor:
        logits: Tensor = self.skeleton(images, self.space.canonical(arch).choices)
        return logits

    @torch.no_grad()
    def extract(self, arch: Arch) -> NB201Network:
        network = NB201Network(self.space, arch)
        for name, weight in network.named_parameters():
            weight.copy_(self.get_parameter(name))
        return network


class NB201MixedSupernet(nn.Module):
    """Every cell's edges are weighted sums of all their operations, with the same weights in all cells.
    Implements `pipeline.spaces.base.MixedSupernet`."""

    def __init__(self, space: NB201Space) -> None:
        super().__init__()
        every = ((slot, op) for slot in range(len(EDGES)) for op in KERNELS)
        make_cell = partial(MixedCell, norm=space.settings.mixed_norm)
        self.skeleton = Skeleton(space, every, shared=True, make_cell=make_cell)

    def module(self) -> nn.Module:
        return self

    def forward(self, images: Tensor, mix_EO: Tensor) -> Tensor:
        logits: Tensor = self.skeleton(images, Mixture.of(mix_EO))
        return logits


def _key(slot: int, op: int) -> str:
    return f"{EDGES[slot][0]}-{EDGES[slot][1]}_{OPERATIONS[op]}"


def _normalise(x: Tensor, scale: Tensor | None = None) -> Tensor:
    """Batch norm without shift, by the batch's own statistics; the scale is one number for all channels."""
    scale_C = None if scale is None else scale.repeat(x.shape[1])
    return F.batch_norm(x, None, None, scale_C, training=True)


def _average(x: Tensor) -> Tensor:
    return average_pool(x, 3, 1, 1)


def _normalised_average(x: Tensor) -> Tensor:
    return _normalise(_average(x))


def _initialise(conv: nn.Conv2d) -> None:
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
