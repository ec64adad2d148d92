"""Accuracy and loss of a network on a split. `assess` alone reads the test split, once, at the end."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.data.base import ImageTask
from pipeline.data.batches import evaluation_batches
from pipeline.data.held_out import test_batches

_PIXELS_PER_BATCH = 2**18  # 256 images of 32 x 32: large enough to be fast, small enough for any memory


@dataclass(frozen=True, slots=True)
class Assessment:
    """`accuracy` is top-1 in per cent, `loss` the mean cross entropy in nats, over `images` images."""

    accuracy: float
    loss: float
    images: int


def assess(network: nn.Module, task: ImageTask, *, device: str = "cpu") -> Assessment:
    """Accuracy on the test split. Nothing may be chosen by it: call it once, on the finished network."""
    seen = np.concatenate([task.splits["weights"], task.splits["architecture"]])
    assert not np.isin(task.splits["test"], seen).any(), "the test split overlaps one that was learnt from"
    return _score(network, test_batches(task, _batch_size(task)), device)


def evaluate(
    network: nn.Module, task: ImageTask, split: Literal["weights", "architecture"], *, device: str = "cpu"
) -> Assessment:
    """Accuracy on a split that choices may be made by, without augmentation."""
    assert split in ("weights", "architecture"), f"{split!r} is not for choices"
    return _score(network, evaluation_batches(task, split, _batch_size(task)), device)


def _batch_size(task: ImageTask) -> int:
    _, height, width = task.image_shape
    return max(32, min(512, _PIXELS_PER_BATCH // (height * width)))


def _score(network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], device: str) -> Assessment:
    """One pass in evaluation mode; the network's mode is put back. Sums stay on the device until the end."""
    training = network.training
    network.eval()
    correct = torch.zeros((), dtype=torch.int64, device=device)
    loss = torch.zeros((), dtype=torch.float64, device=device)
    images = 0
    with torch.inference_mode():
        for images_NCHW, labels_N in batches:
            labels_N = labels_N.to(device)
            logits_NC = network(images_NCHW.to(device)).float()
            correct += (logits_NC.argmax(1) == labels_N).sum()
            loss += F.cross_entropy(logits_NC, labels_N, reduction="sum")
            images += len(labels_N)
    network.train(training)
    assert images > 0, "an empty split cannot be assessed"
    return Assessment(100 * correct.item() / images, loss.item() / images, images)
