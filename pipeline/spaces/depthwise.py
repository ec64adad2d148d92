"""Depthwise convolutions whose gradients take about as long as their values, on a CPU too.

PyTorch's CPU kernels (oneDNN) are slow for the weight gradient of a depthwise convolution wider than three
columns, and for both gradients of a dilated one. So on a CPU the gradients, and they alone, are worked out
by what is fast: a dilated kernel is a larger one with zeros between its weights, and the gradient of a
wide kernel is made of stripes, three columns each, of the map moved aside. Up to rounding these are the same
numbers, and they can be differentiated again.

Axes: N images, C channels, H×W pixels, k×k weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.spaces.layout import is_traced

STRIPE = 3
"""Columns of a kernel whose weight gradient is fast."""


class DepthwiseConv2d(nn.Conv2d):
    """`nn.Conv2d` of every channel by itself with an odd kernel, padded so that stride 1 keeps the size."""

    def __init__(self, channels: int, kernel: int, stride: int = 1, dilation: int = 1) -> None:
        padding = dilation * (kernel // 2)
        super().__init__(channels, channels, kernel, stride, padding, dilation, groups=channels, bias=False)
        self.geometry = Geometry(channels, kernel, stride, dilation)

    def forward(self, x: Tensor) -> Tensor:
        return depthwise(x, self.weight, self.geometry)


def depthwise(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """(N, C, H, W) by (C, 1, k, k), k odd → (N, C, ⌈H/stride⌉, ⌈W/stride⌉)."""
    if x.device.type != "cpu" or geometry.is_fast or _is_watched():
        return geometry.convolve(x, weight)
    out: Tensor = _Depthwise.apply(x, weight, geometry)  # type: ignore[no-untyped-call]
    return out


class Geometry(NamedTuple):
    """A depthwise convolution, but for its weights: C and k are numbers, whoever traces it."""

    channels: int
    kernel: int
    stride: int = 1
    dilation: int = 1

    @property
    def reach(self) -> int:
        """Pixels on either side of the middle; also how many zeros are padded."""
        return self.dilation * (self.kernel // 2)

    @property
    def span(self) -> int:
        return 2 * self.reach + 1

    @property
    def is_fast(self) -> bool:
        """Whether PyTorch's own gradients are."""
        return self.span <= STRIPE

    def convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, None, self.stride, self.reach, self.dilation, self.channels)


def _is_watched() -> bool:
    """By an exporter or a compiler; or types are changed on the way."""
    return is_traced() or torch.is_autocast_enabled("cpu")


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry = geometry
        return geometry.convolve(x, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        by_x, by_weight = ctx.needs_input_grad[:2]
        return (
            _gradient_by_input(x, gradients[0], weight, ctx.geometry) if by_x else None,
            _gradient_by_weight(x, gradients[0], ctx.geometry) if by_weight else None,
            None,
        )


def _gradient_by_input(x: Tensor, slope: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    if geometry.dilation > 1:
        spread = weight.new_zeros(geometry.channels, 1, geometry.span, geometry.span)
        spread[:, :, :: geometry.dilation, :: geometry.dilation] = weight
        weight = spread
    return _gradients(x, slope, weight, geometry.stride, (geometry.reach, geometry.reach), by_input=True)


def _gradient_by_weight(x: Tensor, slope: Tensor, geometry: Geometry) -> Tensor:
    """Shape (C, 1, k, k)."""
    offsets = range(-geometry.reach, geometry.reach + 1, geometry.dilation)
    middles = _middles(offsets)
    moved, framed_slope = _frames(x, slope, geometry, middles)
    empty = x.new_empty(geometry.channels, 1, geometry.span, STRIPE)
    stripes = [
        _gradients(aside, framed_slope, empty, geometry.stride, (geometry.reach, STRIPE // 2), by_input=False)
        for aside in moved
    ]
    of_offset = {
        middle + column - 1: stripe[..., column]
        for middle, stripe in zip(middles, stripes, strict=True)
        for column in range(STRIPE)
    }
    return torch.stack([of_offset[offset] for offset in offsets], dim=3)[:, :, :: geometry.dilation]


def _middles(offsets: Iterable[int]) -> list[int]:
    """Middles of the fewest stripes that have all these columns; the last may have more."""
    middles: list[int] = []
    for offset in offsets:
        if not middles or offset > middles[-1] + 1:
            middles.append(offset + 1)
    return middles


def _frames(
    x: Tensor, slope: Tensor, geometry: Geometry, aside: Sequence[int]
) -> tuple[list[Tensor], Tensor]:
    """The map moved aside by so many columns each, and the output's gradient between columns of zeros.

    What is moved are views of one buffer, whose rows follow each other with as many zeros between them as
    the kernel reaches: what is pushed out of a row on one side comes in on the other side of the next, and is
    0 wherever the gradient is not."""
    (num, channels, height, _), (rows, columns) = x.shape, slope.shape[2:]
    wide = columns + max(2, -(-geometry.reach // geometry.stride))
    framed_slope = slope.new_empty(num, rows, wide, channels)
    _fill(framed_slope, slope, 1)
    framed = (num, height, geometry.stride * wide, channels)
    most, pixels = max(map(abs, aside)) * channels, math.prod(framed)
    buffer = x.new_empty(pixels + 2 * most)
    buffer[:most].zero_()
    buffer[most + pixels :].zero_()
    _fill(buffer[most : most + pixels].view(framed), x, geometry.stride)
    starts = [most + columns * channels for columns in aside]
    moved = [buffer[start : start + pixels].view(framed).permute(0, 3, 1, 2) for start in starts]
    return moved, framed_slope.permute(0, 3, 1, 2)


def _fill(frame: Tensor, x: Tensor, first: int) -> None:
    """Write the map (N, C, H, W) into the columns from `first` on of the frame (N, H, columns, C), and zeros
    beside it."""
    last = first + x.shape[3]
    frame[:, :, :first].zero_()
    frame[:, :, last:].zero_()
    frame[:, :, first:last] = x.permute(0, 2, 3, 1)


def _gradients(
    x: Tensor, slope: Tensor, weight: Tensor, stride: int, padding: tuple[int, int], *, by_input: bool
) -> Tensor:
    mask = [by_input, not by_input, False]
    steps, laid_out, no_dilation, nothing = [stride] * 2, list(padding), [1, 1], [0, 0]
    found = torch.ops.aten.convolution_backward(
        slope, x, weight, None, steps, laid_out, no_dilation, False, nothing, len(weight), mask
    )
    gradient: Tensor = found[0 if by_input else 1]
    return gradient
