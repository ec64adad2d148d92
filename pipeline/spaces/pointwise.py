"""1×1 convolutions that skip pixels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.spaces.layout import is_traced

NARROW = 16
"""Fewer channels than this are less than oneDNN's widest block of them."""


def pointwise(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """(N, C, H, W) and a kernel (D, C, 1, 1) → (N, D, ⌈H/stride⌉, ⌈W/stride⌉).

    On a CPU few channels have the pixels picked first: where the map is channels-last and a stride skips
    some of it, oneDNN's gradient by the weights writes behind its buffer, 8 channels wide with AVX2, which
    ends the process or changes what lies there (oneDNN issue 6035, open; so in PyTorch 2.12). What an
    exporter or a compiler looks at, and what needs no gradient, stays as it is."""
    if stride == 1 or x.device.type != "cpu" or not torch.is_grad_enabled() or is_traced():
        return F.conv2d(x, weight, None, stride)
    if weight.requires_grad and weight.shape[1] < NARROW:
        return F.conv2d(x[:, :, ::stride, ::stride], weight)
    return F.conv2d(x, weight, None, stride)


class PointwiseConv2d(nn.Conv2d):
    """`nn.Conv2d` with a 1×1 kernel, computed by `pointwise`."""

    def __init__(self, channels_in: int, channels_out: int, stride: int = 1) -> None:
        super().__init__(channels_in, channels_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return pointwise(x, self.weight, self.stride[0])
