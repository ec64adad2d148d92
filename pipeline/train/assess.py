"""Accuracy and loss of a network on a split, and its accuracy under attack. `assess` and `withstand`
alone read the test split, once, at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.data.base import ImageTask
from pipeline.data.batches import evaluation_batches
from pipeline.data.held_out import test_batches, test_sample
from pipeline.evaluators import attack
from pipeline.train.recipe import Robustness
from pipeline.types import Json

Perturb = Callable[[Tensor, Tensor], Tensor]
"""What an attack makes of images, given their labels."""


@dataclass(frozen=True, slots=True)
class Assessment:
    """`accuracy` is top-1 in per cent, `loss` the mean cross entropy in nats, over `images` images."""

    accuracy: float
    loss: float
    images: int


def assess(network: nn.Module, task: ImageTask, *, device: str = "cpu") -> Assessment:
    """Accuracy on the test split. Nothing may be chosen by it: call it once, on the finished network."""
    _refuse_overlap(task)
    return _score(network, test_batches(task, task.assessed_at_once, device), device)


@dataclass(frozen=True, slots=True)
class Attacked:
    """Top-1 accuracy in per cent over `images` images, as they are (`clean`) and as an attack leaves them.
    `epsilon` and `step_size` are in pixel values, 0 to 1."""

    attack: str
    epsilon: float
    steps: int
    step_size: float
    images: int
    clean: float
    accuracy: float

    def to_json(self) -> Json:
        """Accuracies as shares, as in the manifest."""
        named = {name: getattr(self, name) for name in self.__slots__}
        return named | {"clean": self.clean / 100, "accuracy": self.accuracy / 100}


def withstand(
    network: nn.Module, task: ImageTask, settings: Robustness, *, device: str = "cpu"
) -> tuple[Attacked, ...]:
    """Accuracy under every attack at every ε, in evaluation mode, on a sample of the test split that
    depends on nothing else; nothing may be chosen by it. Nothing comes where the settings ask for no
    images."""
    if settings.images == 0:
        return ()
    _refuse_overlap(task)
    images_NCHW, labels_N = test_sample(task, settings.images, seed=0)
    size, pixels = task.assessed_at_once, attack.Pixels.of(task)
    batches = list(zip(torch.split(images_NCHW, size), torch.split(labels_N, size), strict=True))
    clean = _score(network, batches, device)
    found = []
    for levels in settings.epsilons:
        epsilon = levels / attack.LEVELS
        for name in settings.attacks:
            steps = 1 if name == "fgsm" else settings.steps
            step_size = epsilon if name == "fgsm" else settings.reach * epsilon / steps
            perturb = partial(
                attack.pgd, network, epsilon=epsilon, pixels=pixels, steps=steps, step_size=step_size
            )
            left = _score(network, batches, device, perturb).accuracy
            found.append(Attacked(name, epsilon, steps, step_size, clean.images, clean.accuracy, left))
    return tuple(found)


def _refuse_overlap(task: ImageTask) -> None:
    seen = np.concatenate([task.splits["weights"], task.splits["architecture"]])
    assert not np.isin(task.splits["test"], seen).any(), "the test split overlaps one that was learnt from"


def evaluate(
    network: nn.Module,
    task: ImageTask,
    split: Literal["weights", "architecture"],
    *,
    device: str = "cpu",
    perturb: Perturb | None = None,
) -> Assessment:
    """Accuracy on a split that choices may be made by, without augmentation, or on what `perturb` makes of
    it."""
    assert split in ("weights", "architecture"), f"{split!r} is not for choices"
    return _score(network, evaluation_batches(task, split, task.assessed_at_once, device), device, perturb)


def _score(
    network: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    device: str,
    perturb: Perturb | None = None,
) -> Assessment:
    """One pass in evaluation mode; the network's mode is put back. Sums stay on the device until the end."""
    training = network.training
    network.eval()
    correct = torch.zeros((), dtype=torch.int64, device=device)
    loss = torch.zeros((), dtype=torch.float64, device=device)
    images = 0
    for images_NCHW, labels_N in batches:
        images_NCHW, labels_N = images_NCHW.to(device), labels_N.to(device)
        if perturb is not None:
            images_NCHW = perturb(images_NCHW, labels_N)
        with torch.inference_mode():
            logits_NC = network(images_NCHW).float()
            correct += (logits_NC.argmax(1) == labels_N).sum()
            loss += F.cross_entropy(logits_NC, labels_N, reduction="sum")
        images += len(labels_N)
    network.train(training)
    assert images > 0, "an empty split cannot be assessed"
    return Assessment(100 * correct.item() / images, loss.item() / images, images)
