"""A supernet as the learning signal: one set of shared weights answers for every architecture.

Training follows the sandwich rule with in-place distillation (Yu and Huang 2019, arXiv 1903.05134): in
every step the largest network of the sandwich learns from the labels, the others from its outputs. What the
slices of the sandwich are is a setting: the space's largest and smallest members beside the asked-for ones
(`space`, as published), or only the asked-for ones, of which the driver draws one in each tier's cost band
(`bands`), so that no time goes into networks that no tier can use.

Losses are cross entropies on images that the weights never saw (the architecture split), with the batch's own
statistics in batch norm; every architecture of a call sees the same images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pipeline.data.base import ImageTask
from pipeline.data.batches import Batches
from pipeline.errors import DivergedTraining
from pipeline.settings import Settings
from pipeline.spaces.base import SearchSpace
from pipeline.types import Arch, Arrays, FitInfo, FloatArray


class OneShotSettings(Settings):
    batch_size: int = Field(96, ge=2)
    learning_rate: float = Field(0.1, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(1e-5, ge=0)
    clip_norm: float = Field(5.0, gt=0)
    warm_up_steps: int = Field(20, ge=0)
    sandwich: Literal["bands", "space"] = "bands"
    distillation: float = Field(0.5, ge=0, le=1, description="share of the teacher in the others' loss")
    evaluation_images: int = Field(1000, ge=2)
    thorough_images: int = Field(2000, ge=2)


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
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.supernet = space.supernet()
        self.module = self.supernet.module().to(self.device)
        self.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._names = [name for name, _ in self.module.named_parameters()]
        self._weights = list(self.module.parameters())
        self._optimiser = torch.optim.SGD(
            _decayed(self._weights, settings.weight_decay),
            lr=settings.learning_rate,
            momentum=settings.momentum,
            nesterov=settings.momentum > 0,
        )
        self._training = Batches(
            task, "weights", settings.batch_size, seed=seed, augment=True, drop_last=True
        )
        held_out = len(task.splits["architecture"])
        self._quick = self._held_out(task, min(settings.evaluation_images, held_out), seed)
        self._thorough = self._held_out(task, min(settings.batch_size * 2, held_out), seed)
        self._thorough_batches = max(1, min(settings.thorough_images, held_out) // (settings.batch_size * 2))

    @staticmethod
    def _held_out(task: ImageTask, batch_size: int, seed: int) -> Batches:
        return Batches(task, "architecture", batch_size, seed=seed, augment=False, drop_last=True)

    # ------------------------------------------------------------------------------------ training

    def fit(self, archs: Sequence[Arch], *, step: int) -> FitInfo:
        sandwich = self._sandwich(archs)
        images, labels = self._to_device(self._training.at(step))
        self._set_rate(step)
        self._optimiser.zero_grad(set_to_none=True)
        teacher: Tensor | None = None
        total = 0.0
        for arch in sandwich:
            logits = self.supernet.forward(images, arch)
            loss = self._loss(logits, labels, teacher)
            (loss / len(sandwich)).backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach()) / len(sandwich)
            if teacher is None:
                teacher = logits.detach().softmax(1)
        norm = float(nn.utils.clip_grad_norm_(self._weights, self.settings.clip_norm))
        if not (math.isfinite(total) and math.isfinite(norm)):  # before a step could spoil the weights
            raise DivergedTraining(
                f"supernet training: the loss is {total} and its gradient's norm {norm} at step {step} "
                f"(learning rate {self._rate(step):.3g}); lower evaluator.learning_rate"
            )
        self._optimiser.step()
        return FitInfo(total, norm**2)

    def _sandwich(self, archs: Sequence[Arch]) -> list[Arch]:
        """Distinct architectures, the teacher (most multiply-adds) first."""
        asked = list(archs)
        if self.settings.sandwich == "space":
            asked = [self.space.largest, self.space.smallest, *asked]
        return sorted(set(asked), key=lambda arch: (-self._macs(arch), arch))

    def _macs(self, arch: Arch) -> int:
        return sum(layer.macs for layer in self.space.layers(arch))

    def _loss(self, logits: Tensor, labels: Tensor, teacher: Tensor | None) -> Tensor:
        from_labels = F.cross_entropy(logits, labels)
        share = self.settings.distillation
        if teacher is None or share == 0:
            return from_labels
        return (1 - share) * from_labels + share * F.cross_entropy(logits, teacher)

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
            images, labels = self._to_device(stream.at(at))
            for row, arch in enumerate(archs):
                logits = self.supernet.forward(images, arch)
                losses[row, 0] += float(F.cross_entropy(logits, labels)) / len(steps)
        return losses

    def _to_device(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        images, labels = batch
        return images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)

    # --------------------------------------------------------------------------------------- state

    def state(self) -> Arrays:
        weights = dict(zip(self._names, self._weights, strict=True))
        arrays = {f"weight/{name}": _to_numpy(value.detach()) for name, value in weights.items()}
        for name, value in weights.items():
            momentum = self._optimiser.state[value].get("momentum_buffer")
            if momentum is not None:
                arrays[f"momentum/{name}"] = _to_numpy(momentum)
        return arrays

    @torch.no_grad()
    def load_state(self, state: Arrays) -> None:
        for name, value in zip(self._names, self._weights, strict=True):
            value.copy_(torch.from_numpy(state[f"weight/{name}"]))
            momentum = state.get(f"momentum/{name}")
            if momentum is not None:
                self._optimiser.state[value]["momentum_buffer"] = (
                    torch.from_numpy(momentum.copy())
                    .to(value.device)
                    .contiguous(memory_format=_format(value))
                )


def _to_numpy(value: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return value.contiguous().cpu().numpy().copy()


def _format(value: Tensor) -> torch.memory_format:
    return torch.channels_last if value.dim() == 4 else torch.contiguous_format


def _decayed(weights: list[nn.Parameter], weight_decay: float) -> list[dict[str, object]]:
    """Weight decay on matrices and kernels, none on scales, shifts and biases."""
    return [
        {"params": [w for w in weights if w.dim() > 1], "weight_decay": weight_decay},
        {"params": [w for w in weights if w.dim() <= 1], "weight_decay": 0.0},
    ]
