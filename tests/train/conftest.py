"""A toy task that a tiny network learns in a second, and a network with everything a checkpoint must hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from pipeline.data.base import ImageTask
from pipeline.train.retrain import seeded
from pipeline.types import IntArray

CLASSES = 3


@dataclass(frozen=True)
class ToySource:
    pixels: NDArray[np.uint8]
    labels: IntArray

    @property
    def shape(self) -> tuple[int, int, int]:
        height, width, channels = self.pixels.shape[1:]
        return height, width, channels

    def read(self, indices: IntArray) -> NDArray[np.uint8]:
        chosen: NDArray[np.uint8] = self.pixels[indices]
        return chosen


def make_task(label_noise: float = 0.0) -> ImageTask:
    """240 images of 6 × 6 whose brightest channel is the class; a share of the labels is drawn anew."""
    rng = np.random.default_rng(7)
    labels = rng.integers(0, CLASSES, 240)
    pixels = rng.integers(0, 120, (240, 6, 6, CLASSES))
    pixels[np.arange(240), :, :, labels] += 60
    redrawn = rng.random(240) < label_noise
    labels[redrawn] = rng.integers(0, CLASSES, redrawn.sum())
    order = rng.permutation(240)
    return ImageTask(
        name="toy",
        classes=("red", "green", "blue"),
        source=ToySource(pixels.astype(np.uint8), labels),
        splits={"weights": order[:150], "architecture": order[150:200], "test": order[200:]},
        mean=(0.3, 0.3, 0.3),
        std=(0.2, 0.2, 0.2),
        flip=True,
        crop_padding=1,
        fingerprint=f"toy-{label_noise}",
    )


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Operators this small only wait for each other on several threads, the more so on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def task() -> ImageTask:
    return make_task()


def make_network(seed: int = 0) -> nn.Module:
    """Dense and depthwise convolution, batch norm, dropout, linear layer."""
    with seeded(seed):
        return nn.Sequential(
            nn.Conv2d(CLASSES, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(8, CLASSES),
        )


@pytest.fixture
def toy_task() -> Callable[..., ImageTask]:
    return make_task


@pytest.fixture
def toy_network() -> Callable[..., nn.Module]:
    return make_network
