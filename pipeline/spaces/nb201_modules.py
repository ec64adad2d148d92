"""The torch side of the space `nb201`: the ordinary network, and the supernet that holds all of them."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.spaces.nb201 import EDGES, KERNELS, OPERATIONS, Choices, Node, operate, run_cell
from pipeline.types import Arch

if TYPE_CHECKING:
    from pipeline.spaces.nb201 import NB201Space

Edge = tuple[int, int]
"""A slot and one of its operations."""


class ConvNorm(nn.Module):
    """Convolution and batch norm; with `shared` the norm always takes the batch's own statistics."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int, stride: int, shared: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, kernel, stride, kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(channels_out, track_running_stats=not shared)
        _initialise(self.conv)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.norm(self.conv(images))
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

    def __init__(self, channels: int, held: Iterable[Edge], shared: bool) -> None:
        super().__init__()
        self.convs = nn.ModuleDict(
            {_key(slot, op): ConvNorm(channels, channels, KERNELS[op], 1, shared) for slot, op in held}
        )

    def forward(self, x: Tensor, choices: Choices) -> Tensor:
        def edge(slot: int, source: Node[Tensor]) -> Tensor | None:
            return self.operation(slot, choices[slot], source)

        output = run_cell(x, edge, F.relu, _average, operator.add)
        return x - x if output is None else output

    def operation(self, slot: int, op: int, source: Node[Tensor]) -> Tensor | None:
        """What one operation on one edge makes of its source; None for `none`."""
        return operate(op, source, lambda active: self.convs[_key(slot, op)](active))


class Skeleton(nn.Module):
    """Everything around the cells, and the cells with the convolutions `held` of each."""

    def __init__(self, space: NB201Space, held: Iterable[Edge], shared: bool) -> None:
        super().__init__()
        held = tuple(held)
        widths = space.widths
        self.stem = ConvNorm(space.image_shape[0], widths[0], 3, 1, shared)
        self.stages = nn.ModuleList(
            nn.ModuleList(Cell(width, held, shared) for _ in range(space.settings.cells)) for width in widths
        )
        self.reductions = nn.ModuleList(
            Reduction(before, after, shared) for before, after in itertools.pairwise(widths)
        )
        self.norm = nn.BatchNorm2d(widths[-1], track_running_stats=not shared)
        self.classifier = nn.Linear(widths[-1], space.num_classes)
        nn.init.normal_(self.classifier.weight, 0.0, 0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, images: Tensor, choices: Choices) -> Tensor:
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


def _key(slot: int, op: int) -> str:
    return f"{EDGES[slot][0]}-{EDGES[slot][1]}_{OPERATIONS[op]}"


def _average(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def _initialise(conv: nn.Conv2d) -> None:
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
