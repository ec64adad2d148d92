"""Synthetic feature maps that a network is asked to reproduce (Li et al. 2022, arXiv 2210.09459).

A target is a sum of features, each of shape (N, C, 8, 8) for N images and C channels:

- `dot`: every value −1 or 1, independently;
- `wave-low`, `wave-middle`, `wave-high`: on a random half of the channels, sin(2π(f₁y + f₂x) + φ), zero
  on the others. A channel's frequencies are drawn from the feature's band, in cycles per pixel; φ is
  uniform and drawn for every image and channel, which makes a sine of a cosine;
- `net`: the feature map of an untrained network of three convolutions on the images, every channel
  standardised over the batch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

Feature = Literal["dot", "wave-low", "wave-middle", "wave-high", "net"]

SIZE = 8
"""Pixels per side of every target."""
BANDS: dict[str, tuple[float, float]] = {
    "wave-low": (0.0, 0.125),
    "wave-middle": (0.125, 0.35),
    "wave-high": (0.375, 0.4875),
}
"""Frequencies in cycles per pixel; the lowest band is what the paper's two leave below them."""
_NET_WIDTH = 32


def target(
    features: Sequence[Feature], level: float, channels: int, images: Tensor, generator: Generator
) -> Tensor:
    """`level` times the sum of the features, shape (N, channels, 8, 8), for images of shape (N, C, H,
    W)."""
    total = torch.zeros(len(images), channels, SIZE, SIZE)
    for feature in features:
        total += _MAKERS[feature](images, channels, generator)
    return level * total


def _dots(images: Tensor, channels: int, generator: Generator) -> Tensor:
    bits = torch.randint(0, 2, (len(images), channels, SIZE, SIZE), generator=generator)
    return 2.0 * bits - 1.0


def _waves(images: Tensor, channels: int, generator: Generator, band: tuple[float, float]) -> Tensor:
    low, high = band
    frequencies = low + (high - low) * torch.rand(2, channels, 1, 1, generator=generator)
    phases = 2 * math.pi * torch.rand(len(images), channels, 1, 1, generator=generator)
    chosen = torch.randperm(channels, generator=generator)[: max(1, channels // 2)]
    pixels = torch.arange(SIZE, dtype=torch.float32)
    cycles = frequencies[0] * pixels[:, None] + frequencies[1] * pixels
    waves = torch.zeros(len(images), channels, SIZE, SIZE)
    waves[:, chosen] = torch.sin(2 * math.pi * cycles + phases)[:, chosen]
    return waves


def _net(images: Tensor, channels: int, generator: Generator) -> Tensor:
    """Three convolutions 3×3, the last one linear, at 32, 16 and 8 pixels per side."""
    x = images.detach().cpu().float().contiguous()
    widths = (x.shape[1], _NET_WIDTH, _NET_WIDTH, channels)
    for layer, (before, after) in enumerate(itertools.pairwise(widths)):
        x = F.interpolate(x, size=(SIZE << (2 - layer),) * 2, mode="bilinear", align_corners=False)
        weight = torch.randn(after, before, 3, 3, generator=generator) * math.sqrt(2 / (9 * before))
        x = F.conv2d(x if layer == 0 else x.relu(), weight, padding=1)
    deviation, mean = torch.std_mean(x, dim=(0, 2, 3), keepdim=True, correction=0)
    return (x - mean) / deviation.clamp_min(1e-6)


_MAKERS: dict[Feature, Callable[[Tensor, int, Generator], Tensor]] = {
    "dot": _dots,
    "wave-low": partial(_waves, band=BANDS["wave-low"]),
    "wave-middle": partial(_waves, band=BANDS["wave-middle"]),
    "wave-high": partial(_waves, band=BANDS["wave-high"]),
    "net": _net,
}
