"""A small classification task made of noise: an image's brightest channel is its class."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pipeline.data.base import ImageTask
from pipeline.types import IntArray

CLASSES = 3


@dataclass
class WatchedImages:
    """Images, and a record of which ones were read."""

    pixels: NDArray[np.uint8]
    labels: IntArray
    reads: list[IntArray] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, int, int]:
        height, width, channels = self.pixels.shape[1:]
        return height, width, channels

    def read(self, indices: IntArray) -> NDArray[np.uint8]:
        self.reads.append(indices)
        return self.pixels[indices]


def make_task() -> ImageTask:
    """240 images of 8×8: 120 for weights, 80 for the architecture, 40 to test."""
    rng = np.random.default_rng(7)
    labels = np.arange(240) % CLASSES
    pixels = rng.integers(0, 120, (240, 8, 8, CLASSES))
    pixels[np.arange(240), :, :, labels] += 100
    order = rng.permutation(240)
    return ImageTask(
        name="toy",
        classes=("red", "green", "blue"),
        source=WatchedImages(pixels.astype(np.uint8), labels),
        splits={"weights": order[:120], "architecture": order[120:200], "test": order[200:]},
        mean=(0.3, 0.3, 0.3),
        std=(0.2, 0.2, 0.2),
        flip=True,
        crop_padding=1,
        fingerprint="toy",
    )
