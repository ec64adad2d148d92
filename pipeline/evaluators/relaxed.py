"""A supernet under mixing weights as the learning signal of gradient methods.

H. Liu, K. Simonyan, Y. Yang, "DARTS: Differentiable Architecture Search", 2018, arXiv 1806.09055:
weights learn from the `weights` split (the lower level), the mixture gets the gradient of the loss on
the `architecture` split (the upper level), either at the present weights (`order: first`) or at the
weights that one more step would give (`order: second`, their equation 7). The product with second
derivatives is exact, by a second backward pass; their central difference (equation 8) costs as many
passes, and where it crosses the kinks of rectifiers its error can be as large as the product.

An architecture's own loss is that of the mixture of zeros and ones which stands for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, Protocol, cast

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from pipeline.data.base import ImageTask
from pipeline.data.batches import Batches
from pipeline.errors import ConfigError, DivergedTraining
from pipeline.evaluators.mean_loss import mean_loss
from pipeline.evaluators.weights import arrays_of, take_arrays
from pipeline.settings import Settings
from pipeline.spaces.base import RelaxedSpace, SearchSpace
from pipeline.types import Arch, Arrays, FitInfo, FloatArray, Slot

Batch = tuple[Tensor, Tensor]
Loss = Callable[[Tensor], Tensor]
"""The loss of a mixture under the weights as they stand."""


class RelaxedSettings(Settings):
    """The defaults are DARTS's."""

    batch_size: int = Field(64, ge=2)
    learning_rate: float = Field(0.025, gt=0)
    least_learning_rate: float = Field(0.001, ge=0, description="where the cosine ends")
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(3e-4, ge=0)
    clip_norm: float = Field(5.0, gt=0)
    order: Literal["first", "second"] = "first"
    evaluation_images: int = Field(1000, ge=2)
    thorough_images: int = Field(2000, ge=2)
    evaluation_batch: int = Field(
        128, ge=2, description="images whose statistics batch norm takes; more than a cache holds are slow"
    )

    @model_validator(mode="after")
    def _the_rate_falls(self) -> RelaxedSettings:
        if self.least_learning_rate > self.learning_rate:
            raise ValueError(f"'least_learning_rate' is at most 'learning_rate' ({self.learning_rate})")
        return self


class Perturb(Protocol):
    """Makes the images that weights train on, such as adversarial ones. `network` gives the logits of
    the step's mixture; gradients must be asked for by the images alone (`torch.autograd.grad`), and
    randomness must follow from `step`."""

    def __call__(
        self, network: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, *, step: int
    ) -> Tensor: ...


class RelaxedSupernet:
    """Implements `pipeline.types.RelaxedEvaluator` (J = 1), and `Evaluator` beside it.

    `total_steps` is how many calls of `fit` the learning rate's cosine is laid out for. Raises
    ConfigError for a space that cannot mix its operations."""

    noisy = True
    trains = True

    def __init__(
        self,
        space: SearchSpace,
        task: ImageTask,
        settings: RelaxedSettings,
        *,
        total_steps: int,
        seed: int,
        device: str = "cpu",
        perturb: Perturb | None = None,
    ) -> None:
        self.space = relaxed_space(space)
        self.settings = settings
        self.total_steps = max(1, total_steps)
        self.device = torch.device(device)
        self._perturb = perturb
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.supernet = self.space.mixed_supernet()
        self.module = self.supernet.module().to(self.device)
        self.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._named_weights = dict(self.module.named_parameters())
        self._weights = list(self._named_weights.values())
        self._optimiser = torch.optim.SGD(
            self._weights,
            lr=settings.learning_rate,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
        )
        size, held_out = settings.batch_size, len(task.splits["architecture"])
        self._training = Batches(
            task, "weights", size, seed=seed, augment=True, drop_last=True, device=device
        )
        self._upper = _held_out(task, min(size, held_out), seed, device, augment=True)
        self._quick = _held_out(task, min(settings.evaluation_images, held_out), seed, device)
        self._thorough = _held_out(task, min(2 * size, held_out), seed, device)
        self._thorough_batches = max(1, min(settings.thorough_images, held_out) // (2 * size))

    @property
    def edges(self) -> tuple[Slot, ...]:
        return self.space.edges

    def discretise(self, mix_EO: FloatArray) -> Arch:
        return self.space.discretise(mix_EO)

    def mix_of(self, arch: Arch) -> FloatArray:
        return self.space.mix_of(arch)

    # ---------------------------------------------------------------------------------- lower level

    def fit(self, mixed: FloatArray | Sequence[Arch], *, step: int) -> FitInfo:
        """One optimiser step under a mixture, or on the mean loss of architectures."""
        mixes = [mixed] if isinstance(mixed, np.ndarray) else [self.mix_of(arch) for arch in mixed]
        images, labels = self._to_device(self._training.at(step))
        self._optimiser.zero_grad(set_to_none=True)
        total = 0.0
        for mix_EO in mixes:
            loss = self._training_loss(self._tensor(mix_EO), images, labels, step) / len(mixes)
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        norm = float(nn.utils.clip_grad_norm_(self._weights, self.settings.clip_norm))
        if not (math.isfinite(total) and math.isfinite(norm)):  # before a step could spoil the weights
            raise DivergedTraining(
                f"supernet training: the loss is {total} and its gradient's norm {norm} at step {step} "
                f"(learning rate {self._rate(step):.3g}); lower evaluator.learning_rate"
            )
        for group in self._optimiser.param_groups:
            group["lr"] = self._rate(step)
        self._optimiser.step()
        return FitInfo(total, norm**2)

    def _training_loss(self, mix_EO: Tensor, images: Tensor, labels: Tensor, step: int) -> Tensor:
        if self._perturb is not None:
            fixed_EO = mix_EO.detach()
            images = self._perturb(
                lambda shown: self.supernet.forward(shown, fixed_EO), images, labels, step=step
            )
        return F.cross_entropy(self.supernet.forward(images, mix_EO), labels)

    def _rate(self, step: int) -> float:
        """A half cosine from `learning_rate` to `least_learning_rate`."""
        high, low = self.settings.learning_rate, self.settings.least_learning_rate
        done = min(step, self.total_steps) / self.total_steps
        return low + (high - low) * 0.5 * (1 + math.cos(math.pi * done))

    # ---------------------------------------------------------------------------------- upper level

    def losses_and_grads(self, mix_EO: FloatArray, *, step: int) -> tuple[FloatArray, FloatArray]:
        """Shapes (1,) and (1, E, O). With `order: second` both are at the weights after one more step of
        gradient descent on the training images of `step`."""
        mixture = self._tensor(mix_EO).requires_grad_()
        held_out = self._to_device(self._upper.at(step))

        def upper_loss(mixture: Tensor) -> Tensor:
            return F.cross_entropy(self.supernet.forward(held_out[0], mixture), held_out[1])

        if self.settings.order == "first":
            loss = upper_loss(mixture)
            (gradient,) = gradients(loss, [mixture])
        else:
            loss, gradient = self._unrolled(mixture, upper_loss, step)
        return np.array([float(loss.detach())]), gradient.detach().cpu().numpy().astype(float)[None]

    def _unrolled(self, mixture: Tensor, upper_loss: Loss, step: int) -> tuple[Tensor, Tensor]:
        images, labels = self._to_device(self._training.at(step))
        return unrolled_gradient(
            self._weights,
            mixture,
            lambda mixture: self._training_loss(mixture, images, labels, step),
            upper_loss,
            velocity=[self._optimiser.state[w].get("momentum_buffer") for w in self._weights],
            rate=self._rate(step),
            momentum=self.settings.momentum,
            weight_decay=self.settings.weight_decay,
        )

    # -------------------------------------------------------------------------------- architectures

    @torch.inference_mode()
    def losses(self, archs: Sequence[Arch], *, step: int, thorough: bool = False) -> FloatArray:
        stream = self._thorough if thorough else self._quick
        steps = range(self._thorough_batches) if thorough else range(step, step + 1)
        mixtures = [self._tensor(self.mix_of(arch)) for arch in archs]
        losses_N1 = np.zeros((len(archs), 1))
        for at in steps:
            batch = self._to_device(stream.at(at))
            for row, mixture in enumerate(mixtures):
                forward = partial(self.supernet.forward, mix_EO=mixture)
                loss = mean_loss(forward, batch, self.settings.evaluation_batch)
                losses_N1[row, 0] += float(loss) / len(steps)
        return losses_N1

    def _tensor(self, mix_EO: FloatArray) -> Tensor:
        return torch.from_numpy(mix_EO.astype(np.float32)).to(self.device)

    def _to_device(self, batch: Batch) -> Batch:
        images, labels = batch
        return images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)

    # --------------------------------------------------------------------------------------- state

    def state(self) -> Arrays:
        return arrays_of(self._named_weights, self._optimiser)

    def load_state(self, state: Arrays) -> None:
        take_arrays(state, self._named_weights, self._optimiser)


def relaxed_space(space: SearchSpace) -> RelaxedSpace:
    """The space as one that can mix its operations, or a ConfigError that names it or its setting."""
    if not hasattr(space, "mixed_supernet"):
        raise ConfigError(
            f"evaluator 'relaxed' mixes the operations of every edge, and space '{space.name}' has no such "
            "form; take a space of cells, such as nb201, or a method that samples architectures"
        )
    relaxed = cast(RelaxedSpace, space)
    if not relaxed.edges:  # a space that cannot as it is set says so when it is asked
        raise ConfigError(f"space '{space.name}' has no edge whose operations could be mixed")
    return relaxed


def _held_out(task: ImageTask, batch_size: int, seed: int, device: str, augment: bool = False) -> Batches:
    return Batches(
        task, "architecture", batch_size, seed=seed, augment=augment, drop_last=True, device=device
    )


# -------------------------------------------------------------------------------------- the unrolled gradient


def gradients(loss: Tensor, by: Sequence[Tensor], *, keep_graph: bool = False) -> list[Tensor]:
    """As `torch.autograd.grad`, with zeros where the loss does not depend on a tensor; with
    `keep_graph` they can be differentiated again."""
    found = torch.autograd.grad(loss, list(by), allow_unused=True, create_graph=keep_graph)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(by, found, strict=True)]


def unrolled_gradient(
    weights: Sequence[Tensor],
    mixture: Tensor,
    lower_loss: Loss,
    upper_loss: Loss,
    *,
    velocity: Sequence[Tensor | None],
    rate: float,
    momentum: float,
    weight_decay: float,
) -> tuple[Tensor, Tensor]:
    """L_up(w′, mixture) and its gradient by the mixture, where w′ = w − ξ (momentum · velocity + ∇_w
    L_low + decay · w) is one optimiser step of rate ξ, before clipping (arXiv 1806.09055, equation 7):

        ∂L_up(w′)/∂mix − ξ ∇²_{mix,w} L_low(w) · v,   v = ∂L_up(w′)/∂w′.

    Weights are moved in place and put back, bit for bit."""
    slopes = gradients(lower_loss(mixture), weights)
    kept = [weight.detach().clone() for weight in weights]
    try:
        with torch.no_grad():
            for weight, slope, speed in zip(weights, slopes, velocity, strict=True):
                step = slope.add(weight, alpha=weight_decay)
                weight.sub_(step if speed is None else step.add_(speed, alpha=momentum), alpha=rate)
        upper = upper_loss(mixture)
        direct, *directions = gradients(upper, [mixture, *weights])
    finally:
        with torch.no_grad():
            for weight, old in zip(weights, kept, strict=True):
                weight.copy_(old)
    slopes = gradients(lower_loss(mixture), weights, keep_graph=True)
    along = sum((slope * v).sum() for slope, v in zip(slopes, directions, strict=True))
    assert isinstance(along, Tensor)
    (bend,) = gradients(along, [mixture]) if along.requires_grad else (torch.zeros_like(mixture),)
    return upper, direct - rate * bend
