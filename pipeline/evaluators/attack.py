"""Images that are changed a little so that a network errs: adversarial examples in the L∞ norm.

FGSM: I. Goodfellow, J. Shlens, C. Szegedy, "Explaining and Harnessing Adversarial Examples", 2014, arXiv
1412.6572. PGD: A. Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", 2017,
arXiv 1706.06083. One step from a random start, for training: E. Wong, L. Rice, J. Z. Kolter, "Fast is
better than free", 2020, arXiv 2001.03994, as E2RNAS has it (Yue, Lin, Huang, Zhang 2020, arXiv
2011.09820): its gradient is taken at the clean image, not at the random start.

ε is the most that a pixel's value may change, where 0 is black and 1 is white. Networks see normalised
images, (pixel − mean)/std per channel: `Pixels` knows what a pixel's value is there, so that ε means the
same in every channel and no image leaves black to white.

Pure functions: the network's weights get no gradient, and all randomness is the generator's. A network
in evaluation mode is attacked as it will be used. Images are (N, C, H, W), labels (N,).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.data.base import ImageTask

Network = Callable[[Tensor], Tensor]
"""Normalised images → logits, shape (N, classes)."""

LEVELS = 255
"""Grey levels between black and white: settings state ε in these, as papers do (2 is 2/255)."""

ONE_STEP = 1.25
"""Step of `one_step`, in ε (arXiv 2001.03994)."""

PGD_REACH = 2.5
"""How far the steps of `pgd` go together, in ε (arXiv 1706.06083)."""


@dataclass(frozen=True)
class Pixels:
    """Pixel values, 0 to 1, as networks see them; a value per channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, task: ImageTask) -> Pixels:
        return cls(task.mean, task.std)

    def step(self, size: float, like: Tensor) -> Tensor:
        """A change of `size` in pixel values, shape (1, C, 1, 1)."""
        return size / self._channels(self.std, like)

    def within(self, images: Tensor, clean: Tensor, epsilon: float) -> Tensor:
        """The nearest images that are no further than ε from the clean ones and are images at all."""
        radius = self.step(epsilon, clean)
        std, mean = self._channels(self.std, clean), self._channels(self.mean, clean)
        near = images.clamp(clean - radius, clean + radius)
        return near.clamp(-mean / std, (1 - mean) / std)

    def _channels(self, values: tuple[float, ...], like: Tensor) -> Tensor:
        assert like.shape[1] == len(values), f"{len(values)} channels, but images of shape {like.shape}"
        return torch.tensor(values, dtype=like.dtype, device=like.device).view(1, -1, 1, 1)


def fgsm(network: Network, images: Tensor, labels: Tensor, *, epsilon: float, pixels: Pixels) -> Tensor:
    """One step of ε up the sign of the loss's gradient."""
    clean = images.detach()
    ahead = clean + pixels.step(epsilon, clean) * ascent(network, clean, labels)
    return pixels.within(ahead, clean, epsilon)


def pgd(
    network: Network,
    images: Tensor,
    labels: Tensor,
    *,
    epsilon: float,
    pixels: Pixels,
    steps: int = 10,
    step_size: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Several steps, each brought back to where images may be. `step_size` is in pixel values, by
    default 2.5 ε / steps. It starts at the image, or with a generator at random within ε of it."""
    clean = images.detach()
    step = pixels.step(PGD_REACH * epsilon / steps if step_size is None else step_size, clean)
    start = clean if generator is None else clean + noise(clean, epsilon, pixels, generator)
    found = pixels.within(start, clean, epsilon)
    for _ in range(steps):
        found = pixels.within(found + step * ascent(network, found, labels), clean, epsilon)
    return found


def one_step(
    network: Network,
    images: Tensor,
    labels: Tensor,
    *,
    epsilon: float,
    pixels: Pixels,
    generator: torch.Generator,
) -> Tensor:
    """What weights train on: δ = clip(δ₀ + 1.25 ε sign ∇CE(clean), −ε, ε) with δ₀ uniform within ε."""
    clean = images.detach()
    step = pixels.step(ONE_STEP * epsilon, clean) * ascent(network, clean, labels)
    return pixels.within(clean + noise(clean, epsilon, pixels, generator) + step, clean, epsilon)


def ascent(network: Network, images: Tensor, labels: Tensor) -> Tensor:
    """The sign of the cross entropy's gradient by the images: which way every pixel makes it larger."""
    with torch.enable_grad():
        shown = images.detach().requires_grad_()
        loss = F.cross_entropy(network(shown), labels, reduction="sum")
        (slope,) = torch.autograd.grad(loss, [shown])
    return slope.sign()


def noise(like: Tensor, epsilon: float, pixels: Pixels, generator: torch.Generator) -> Tensor:
    """Uniform within ε. Drawn on the generator's device, so that a CPU's serves every device alike."""
    uniform = torch.rand(like.shape, generator=generator, device=generator.device, dtype=like.dtype)
    return pixels.step(epsilon, like) * (2 * uniform.to(like.device) - 1)
