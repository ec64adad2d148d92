"""Published scores of untrained networks, to measure `eproxy` by; each loss is minus the published
score.

- `params`, `flops`: the size alone. As an evaluator, the largest network that fits.
- `synflow` (Tanaka et al. 2020, arXiv 2006.05467): with every parameter replaced by its absolute value
  and an input of ones, R is the sum of the outputs; the score is Σ θ·∂R/∂θ over weights of convolutions
  and linear layers. Following Abdelfattah et al. (2021, arXiv 2101.08134) batch norm is left out of the
  network and the sum is the network's score. Here its logarithm is taken, which changes no rank and
  stays finite.
- `nwot` (Mellor et al. 2021, arXiv 2006.04647, third version): log |K| for a batch of N images, where
  K_ij counts the rectifiers that are in the same state, on or off, for images i and j.
- `jacov` (the same authors' first version, 2020): −Σ log(σ_i + k) + 1/(σ_i + k), k = 10⁻⁵, over the
  eigenvalues σ of the correlation matrix of the N gradients of the summed outputs by each image.

All but the first two build the network with the space's own initial weights, in training mode.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.costs.counts import flops, params
from pipeline.data.base import ImageTask
from pipeline.errors import ConfigError
from pipeline.evaluators.scores import (
    ImageScoreSettings,
    ScoreEvaluator,
    ScoreSettings,
    build_seeded,
    fixed_images,
    images_identity,
    workers_on,
)
from pipeline.settings import Settings
from pipeline.spaces.base import SearchSpace
from pipeline.types import Arch, FloatArray, Json

SMALLEST = float(np.finfo(np.float64).tiny)
"""The least normal float64: the logarithm of a sum that vanishes is taken of it."""
JACOV_K = 1e-5


class CountSettings(Settings):
    """There is nothing to set."""


# ------------------------------------------------------------------------------------------------ the scores


def synflow(network: nn.Module, image_shape: tuple[int, int, int]) -> float:
    """log Σ θ·∂R/∂θ in double precision; −708.4 where the sum vanishes, not finite where it overflows.
    The network is spoilt: its weights lose their signs and batch norm is taken out."""
    without_batch_norm(network).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.abs_()
    weights = [parameter for parameter in network.parameters() if parameter.dim() > 1]
    ones = torch.ones(1, *image_shape, dtype=torch.float64, device=weights[0].device)
    gradients = torch.autograd.grad(network(ones).sum(), weights, allow_unused=True)
    total = sum(
        float((weight.detach() * gradient).sum())
        for weight, gradient in zip(weights, gradients, strict=True)
        if gradient is not None
    )
    return math.log(max(total, SMALLEST))


def without_batch_norm(network: nn.Module) -> nn.Module:
    """The network with an identity in every batch norm's place."""
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                setattr(module, name, nn.Identity())
    return network


def nwot(network: nn.Module, images: Tensor) -> float:
    """log |K|; 0 where K is singular, which no other K comes below since its entries are whole numbers.
    Raises ConfigError where the network has no rectifier."""
    with torch.no_grad(), _Rectifiers(len(images)) as seen:
        network(images)
    if seen.units == 0:
        raise ConfigError(
            f"evaluator nwot: {type(network).__name__} has no ReLU to look at; choose another evaluator"
        )
    sign, log_determinant = np.linalg.slogdet(seen.kernel_NN)
    return max(0.0, float(log_determinant)) if sign > 0 else 0.0


class _Rectifiers(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sums up agreements of states over all ReLUs that are computed on this thread, as modules or
    not."""

    def __init__(self, num_images: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.units = 0
        self.kernel_NN: FloatArray = np.zeros((num_images, num_images))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.relu, torch.ops.aten.relu_):
            self._add(output)
        return output

    def _add(self, output: Tensor) -> None:
        on_NU = (output > 0).flatten(1).float()
        both_on_NN = on_NU @ on_NU.T  # whole numbers below 2²⁴ are exact in single precision
        count_N = both_on_NN.diagonal()
        units = on_NU.shape[1]
        same_NN = units - count_N[:, None] - count_N + 2 * both_on_NN
        self.units += units
        self.kernel_NN += same_NN.double().cpu().numpy()


def jacov(network: nn.Module, images: Tensor) -> float:
    """Not finite where an image has no gradient."""
    inputs = images.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(network(inputs).sum(), inputs)
    rows_ND = gradient.flatten(1).double().cpu().numpy()
    rows_ND = rows_ND - rows_ND.mean(axis=1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        rows_ND /= np.linalg.norm(rows_ND, axis=1, keepdims=True)
    if not np.isfinite(rows_ND).all():
        return math.nan
    eigenvalues = np.maximum(np.linalg.eigvalsh(rows_ND @ rows_ND.T), 0.0) + JACOV_K
    return -float((np.log(eigenvalues) + 1 / eigenvalues).sum())


def worst_jacov_loss(num_images: int) -> float:
    """Of images whose gradients are all alike; that of images without correlation is their number."""
    return num_images * (math.log(JACOV_K) + 1 / JACOV_K)


# -------------------------------------------------------------------------------------------- the evaluators


def make_params(
    space: SearchSpace, task: ImageTask, settings: CountSettings, *, total_steps: int, seed: int, device: str
) -> ScoreEvaluator:
    def score(arch: Arch) -> float:
        return -float(params(space.layers(arch)))

    return ScoreEvaluator(space, score, worst=0.0, identity={"proxy": "params"})


def make_flops(
    space: SearchSpace, task: ImageTask, settings: CountSettings, *, total_steps: int, seed: int, device: str
) -> ScoreEvaluator:
    def score(arch: Arch) -> float:
        return -float(flops(space.layers(arch)))

    return ScoreEvaluator(space, score, worst=0.0, identity={"proxy": "flops"})


def make_synflow(
    space: SearchSpace, task: ImageTask, settings: ScoreSettings, *, total_steps: int, seed: int, device: str
) -> ScoreEvaluator:
    def score(arch: Arch) -> float:
        return -synflow(build_seeded(space, arch, seed).to(device), space.image_shape)

    identity: Json = {"proxy": "synflow", "seed": seed}
    return ScoreEvaluator(
        space, score, worst=-math.log(SMALLEST), identity=identity, workers=workers_on(device, settings)
    )


def make_nwot(
    space: SearchSpace,
    task: ImageTask,
    settings: ImageScoreSettings,
    *,
    total_steps: int,
    seed: int,
    device: str,
) -> ScoreEvaluator:
    return _on_images("nwot", nwot, lambda images: 0.0, space, task, settings, seed, device)


def make_jacov(
    space: SearchSpace,
    task: ImageTask,
    settings: ImageScoreSettings,
    *,
    total_steps: int,
    seed: int,
    device: str,
) -> ScoreEvaluator:
    return _on_images("jacov", jacov, worst_jacov_loss, space, task, settings, seed, device)


def _on_images(
    name: str,
    score_of: Callable[[nn.Module, Tensor], float],
    worst_loss: Callable[[int], float],
    space: SearchSpace,
    task: ImageTask,
    settings: ImageScoreSettings,
    seed: int,
    device: str,
) -> ScoreEvaluator:
    """`score_of(network, images)` is better where it is higher; `worst_loss` takes the number of images."""
    images = fixed_images(task, settings, seed).to(device)

    def score(arch: Arch) -> float:
        return -score_of(build_seeded(space, arch, seed).to(device), images)

    identity = {"proxy": name, **images_identity(task, settings, seed)}
    worst = worst_loss(len(images))
    return ScoreEvaluator(space, score, worst=worst, identity=identity, workers=workers_on(device, settings))
