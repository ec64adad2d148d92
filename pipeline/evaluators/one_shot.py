"""A supernet as the learning signal: one set of shared weights answers for every architecture.

Training follows the sandwich rule with in-place distillation (Yu and Huang 2019, arXiv 1903.05134): in
every step the largest network of the sandwich learns from the labels, the others from its outputs. What the
slices of the sandwich are is a setting: the space's largest and smallest members beside the asked-for ones
(`space`, as published), or only the asked-for ones, of which the driver draws one in each tier's cost band
(`bands`), so that no time goes into networks that no tier can use.

Losses are cross entropies on images that the weights never saw (the architecture split), with the batch's own
statistics in batch norm; every architecture of a call sees the same images.

Over several ranks a step is the same step: all see the same images, each trains some of the sandwich, and
the gradients are added up in the order in which one process would add them. Training amplifies a difference
in the last bit several times in every step, so anything but the same bits would soon be another search. The
teacher's rank sends its soft labels before its own backward pass, and a student's forward pass goes on
meanwhile: as no student is larger than the teacher, nobody waits longer than a teacher's forward pass, which
every rank would otherwise repeat.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from functools import partial
from itertools import accumulate
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pipeline.data.base import ImageTask
from pipeline.data.batches import Batches
from pipeline.errors import DivergedTraining
from pipeline.evaluators.mean_loss import mean_loss
from pipeline.evaluators.weights import arrays_of, take_arrays
from pipeline.ranks import ALONE, Ranks, share_out
from pipeline.settings import Settings
from pipeline.spaces.base import SearchSpace
from pipeline.types import Arch, Arrays, FitInfo, FloatArray


class OneShotSettings(Settings):
    batch_size: int = Field(32, ge=2)
    learning_rate: float = Field(0.1, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(1e-5, ge=0)
    clip_norm: float = Field(5.0, gt=0)
    warm_up_steps: int = Field(20, ge=0)
    sandwich: Literal["bands", "space"] = "bands"
    distillation: float = Field(0.5, ge=0, le=1, description="share of the teacher in the others' loss")
    evaluation_images: int = Field(1000, ge=2)
    thorough_images: int = Field(2000, ge=2)
    evaluation_batch: int = Field(
        128, ge=2, description="images whose statistics batch norm takes; more than a cache holds are slow"
    )
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16 (autocast) is for GPUs")


class OneShotEvaluator:
    """Implements `pipeline.types.Evaluator` (J = 1) on a supernet of `space` and the images of `task`.

    `total_steps` is how many calls of `fit` the learning rate's cosine is laid out for."""

    noisy = True
    trains = True

    def __init__(
        self,
        space: SearchSpace,
        task: ImageTask,
        settings: OneShotSettings,
        *,
        total_steps: int,
        seed: int,
        device: str = "cpu",
    ) -> None:
        self.space = space
        self.settings = settings
        self.total_steps = max(1, total_steps)
        self.device = torch.device(device)
        self._ranks: Ranks = ALONE
        self._shared: SharedGradients | None = None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.supernet = space.supernet()
        self.module = self.supernet.module().to(self.device)
        self.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._named_weights = dict(self.module.named_parameters())
        self._weights = list(self._named_weights.values())
        self._optimiser = torch.optim.SGD(
            _decayed(self._weights, settings.weight_decay),
            lr=settings.learning_rate,
            momentum=settings.momentum,
            nesterov=settings.momentum > 0,
        )
        self._training = Batches(
            task, "weights", settings.batch_size, seed=seed, augment=True, drop_last=True, device=device
        )
        held_out = len(task.splits["architecture"])
        self._quick = self._held_out(task, min(settings.evaluation_images, held_out), seed, device)
        most = min(settings.thorough_images, held_out)
        at_once = min(settings.evaluation_batch, most)
        self._thorough = self._held_out(task, at_once, seed, device)
        self._thorough_batches = most // at_once

    def join(self, ranks: Ranks) -> None:
        """From now on `fit` trains only this rank's part of the sandwich; all ranks must call it alike."""
        self._ranks, self._shared = ranks, SharedGradients(self._weights, ranks)

    @staticmethod
    def _held_out(task: ImageTask, batch_size: int, seed: int, device: str) -> Batches:
        return Batches(
            task, "architecture", batch_size, seed=seed, augment=False, drop_last=True, device=device
        )

    # ------------------------------------------------------------------------------------ training

    def fit(self, archs: Sequence[Arch], *, step: int) -> FitInfo:
        self._set_rate(step)
        self._optimiser.zero_grad(set_to_none=True)
        sandwich = self._sandwich(archs)
        owners = self._owners(sandwich)
        losses = self._backward(sandwich, owners, step)
        if self._shared is not None:
            losses = self._shared.sum(losses, owners)
        total = sum(loss / len(sandwich) for loss in losses)
        norm = float(nn.utils.clip_grad_norm_(self._weights, self.settings.clip_norm))
        if not (math.isfinite(total) and math.isfinite(norm)):  # before a step could spoil the weights
            raise DivergedTraining(
                f"supernet training: the loss is {total} and its gradient's norm {norm} at step {step} "
                f"(learning rate {self._rate(step):.3g}); lower evaluator.learning_rate"
            )
        self._optimiser.step()
        return FitInfo(total, norm**2)

    def _backward(self, sandwich: list[Arch], owners: list[int], step: int) -> list[float]:
        """Leave the gradient of this rank's part of the mean loss. Losses, 0 for what other ranks have."""
        told: dict[int, Tensor] = {}
        lesson = self._lesson(owners)
        mine = [place for place, owner in enumerate(owners) if owner == self._ranks.rank]
        if mine:
            images, labels = self._to_device(self._training.at(step))
        for place in mine:
            logits = self._logits(images, sandwich[place])
            if place == 0:
                lesson.give(logits.detach().softmax(1))
                loss = F.cross_entropy(logits, labels)
            else:
                loss = self._student_loss(logits, labels, lesson)
            (loss / len(sandwich)).backward()  # type: ignore[no-untyped-call]
            told[place] = loss.detach()
            if self._shared is not None:
                self._shared.keep()
        lesson.wait()
        losses = [0.0] * len(sandwich)
        for place, value in zip(told, _to_host(told.values()), strict=True):  # after all paths are under way
            losses[place] = value
        return losses

    def _logits(self, images: Tensor, arch: Arch) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.precision == "bf16"):
            return self.supernet.forward(images, arch).float()

    def _sandwich(self, archs: Sequence[Arch]) -> list[Arch]:
        """Distinct architectures, the teacher (most multiply-adds) first."""
        asked = list(archs)
        if self.settings.sandwich == "space":
            asked = [self.space.largest, self.space.smallest, *asked]
        return sorted(set(asked), key=lambda arch: (-self._macs(arch), arch))

    def _macs(self, arch: Arch) -> int:
        return sum(layer.macs for layer in self.space.layers(arch))

    def _owners(self, sandwich: list[Arch]) -> list[int]:
        """The rank of each."""
        if self._ranks.size == 1:
            return [0] * len(sandwich)
        return share_out([self._macs(arch) for arch in sandwich], self._ranks.size)

    def _lesson(self, owners: list[int]) -> Lesson:
        """What the first of the sandwich teaches the ranks that have the others."""
        if self._ranks.size == 1 or len(owners) == 1 or self.settings.distillation == 0:
            return Lesson(ALONE, 0, torch.empty(0))
        room = torch.empty(self.settings.batch_size, self.space.num_classes, device=self.device)
        return Lesson(self._ranks, owners[0], room)

    def _student_loss(self, logits: Tensor, labels: Tensor, lesson: Lesson) -> Tensor:
        from_labels = F.cross_entropy(logits, labels)
        share = self.settings.distillation
        if share == 0:
            return from_labels
        return (1 - share) * from_labels + share * F.cross_entropy(logits, lesson.wait())

    def _rate(self, step: int) -> float:
        """Linear warm-up, then a half cosine to zero."""
        warm = min(1.0, (step + 1) / (self.settings.warm_up_steps + 1))
        return self.settings.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / self.total_steps))

    def _set_rate(self, step: int) -> None:
        for group in self._optimiser.param_groups:
            group["lr"] = self._rate(min(step, self.total_steps))

    # ---------------------------------------------------------------------------------- evaluation

    @torch.inference_mode()
    def losses(self, archs: Sequence[Arch], *, step: int, thorough: bool = False) -> FloatArray:
        stream = self._thorough if thorough else self._quick
        steps = range(self._thorough_batches) if thorough else range(step, step + 1)
        losses = np.zeros((len(archs), 1))
        for at in steps:
            batch = self._to_device(stream.at(at))
            of_step = [
                mean_loss(partial(self._logits, arch=arch), batch, self.settings.evaluation_batch)
                for arch in archs
            ]
            losses[:, 0] += np.array(_to_host(of_step)) / len(steps)
        return losses

    def _to_device(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        images, labels = batch
        return images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)

    # --------------------------------------------------------------------------------------- state

    def state(self) -> Arrays:
        return arrays_of(self._named_weights, self._optimiser)

    def load_state(self, state: Arrays) -> None:
        take_arrays(state, self._named_weights, self._optimiser)


class Lesson:
    """The teacher's soft labels, shape (N, classes), on their way from rank `source` to the others."""

    def __init__(self, ranks: Ranks, source: int, room: Tensor) -> None:
        self._ranks, self._source, self._soft = ranks, source, room
        self._arrive = None if ranks.rank == source else ranks.send(room, source)

    def give(self, soft: Tensor) -> None:
        """On the teacher's rank: send them; `wait` gives them back at once."""
        self._soft = soft
        self._arrive = self._ranks.send(soft, self._source)

    def wait(self) -> Tensor:
        if self._arrive is not None:
            self._arrive()
            self._arrive = None
        return self._soft


class SharedGradients:
    """Adds up the gradients of architectures that different ranks have, in the architectures' order: as one
    process does, to the bit.

    A gradient travels as one vector, laid out in memory as the weights are. It is counted on how many ranks
    some path went through a weight: where none did, it is left without a gradient, as in one process, and so
    without decay and momentum in this step."""

    def __init__(self, weights: Sequence[nn.Parameter], ranks: Ranks) -> None:
        self._weights, self._ranks = weights, ranks
        *self._starts, end = accumulate((weight.numel() for weight in weights), initial=0)
        self._length = -(-end // ranks.size) * ranks.size
        self._kept: list[Tensor] = []
        self._touched = [False] * len(weights)

    @torch.no_grad()
    def keep(self) -> None:
        """Take the gradients away from the weights: those of one architecture."""
        vector = torch.zeros(self._length, device=self._weights[0].device)
        pairs = zip(self._laid_out(vector), self._weights, strict=True)
        found = [(view, weight.grad) for view, weight in pairs if weight.grad is not None]
        torch._foreach_copy_([view for view, _ in found], [gradient for _, gradient in found])
        for place, weight in enumerate(self._weights):
            self._touched[place] |= weight.grad is not None
            weight.grad = None
        self._kept.append(vector)

    @torch.no_grad()
    def sum(self, losses: Sequence[float], owners: Sequence[int]) -> list[float]:
        """Give the weights the sum of what all ranks have kept. Of each architecture's rank and loss, the
        latter 0 where it is not this rank's; returns all losses."""
        device = self._weights[0].device
        own_ML = torch.stack(self._kept) if self._kept else torch.empty(0, self._length, device=device)
        vector = self._ranks.sum_in_order(own_ML, owners)
        counts_and_losses = torch.tensor([*map(float, self._touched), *losses], device=device)
        self._ranks.sum(counts_and_losses)
        found = counts_and_losses.tolist()
        for weight, view, count in zip(self._weights, self._laid_out(vector), found, strict=False):
            weight.grad = view if count else None
        self._kept, self._touched = [], [False] * len(self._weights)
        return found[len(self._weights) :]

    def _laid_out(self, vector: Tensor) -> list[Tensor]:
        """The vector as the weights' gradients."""
        return [
            vector.as_strided(weight.size(), weight.stride(), start)
            for weight, start in zip(self._weights, self._starts, strict=True)
        ]


def _to_host(values: Collection[Tensor]) -> list[float]:
    """Scalars in one transfer: each of its own would make the host wait for the device."""
    return torch.stack(list(values)).tolist() if values else []


def _decayed(weights: list[nn.Parameter], weight_decay: float) -> list[dict[str, object]]:
    """Weight decay on matrices and kernels, none on scales, shifts and biases."""
    return [
        {"params": [w for w in weights if w.dim() > 1], "weight_decay": weight_decay},
        {"params": [w for w in weights if w.dim() <= 1], "weight_decay": 0.0},
    ]
