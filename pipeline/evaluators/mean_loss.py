"""The loss of a supernet's path on more images than a cache holds at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def mean_loss(logits_of: Callable[[Tensor], Tensor], batch: tuple[Tensor, Tensor], at_most: int) -> Tensor:
    """Mean cross entropy in nats over images (N, C, H, W) and labels (N,), a scalar. The batch is shown
    in as few parts as may be, none of more than `at_most` images and their sizes one apart at the most; batch
    norm sees a part at a time."""
    images, labels = batch
    parts = -(-len(labels) // at_most)
    pairs = zip(images.tensor_split(parts), labels.tensor_split(parts), strict=True)
    sums = [F.cross_entropy(logits_of(part), answers, reduction="sum") for part, answers in pairs]
    return torch.stack(sums).sum() / len(labels)
