"""How a network is trained: SGD with a linear warm-up and a cosine decay (Loshchilov and Hutter 2016,
arXiv 1608.03983), label smoothing (Szegedy et al. 2015, arXiv 1512.00567), averaged weights, distillation
(Hinton et al. 2015, arXiv 1503.02531), adversarial images (Wong, Rice, Kolter 2020, arXiv 2001.03994); and
how it is attacked once it is trained.

The defaults are for short schedules on a CPU: a high learning rate, small batches, no decay of norms and
biases (He et al. 2018, arXiv 1812.01187). No torch at import: the command line reads
recipes before it needs it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, model_validator

from pipeline.settings import Epochs, Settings

if TYPE_CHECKING:
    from torch import nn


class Distil(Settings):
    """Distillation from a trained teacher: (1 − weight)·CE(labels) + weight·T²·KL(teacher_T ‖ student_T).

    Both softmaxes are at `temperature` T; T² keeps the gradient's size independent of T (Hinton et al.)."""

    weight: float = Field(0.5, gt=0, le=1)
    temperature: float = Field(2.0, gt=0, allow_inf_nan=False)


Levels = Annotated[float, Field(gt=0, le=255)]
"""The largest change of a pixel, in grey levels of 255: 2 is the 2/255 of papers."""


class Adversarial(Settings):
    """Training on adversarial images alone: every batch is changed in one step from a random start, against
    the weights as they stand (`evaluators/attack.py`)."""

    epsilon: Levels = 2.0


class Robustness(Settings):
    """How every finished network is attacked, on `images` of the test split, classes in proportion (all where
    there are fewer; 0 leaves it out). `fgsm` is one step of ε; `pgd` takes `steps` from the image itself,
    `reach` times ε together."""

    images: int = Field(1000, ge=0)
    epsilons: tuple[Levels, ...] = Field((2.0,), min_length=1)
    attacks: tuple[Literal["fgsm", "pgd"], ...] = Field(("fgsm", "pgd"), min_length=1)
    steps: int = Field(10, ge=1)
    reach: float = Field(2.5, gt=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _once_each(self) -> Self:
        for name in ("epsilons", "attacks"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"'{name}' names one twice: {', '.join(map(str, values))}")
        return self


class Recipe(Settings):
    """One network's training.

    `epochs` may be a fraction, and the last one ends early; `lr` is the peak; `warmup_share` the share of all
    steps before it; `cutout` the side in pixels of a square that is covered in every image (arXiv
    1708.04552), `clip_norm` the largest gradient norm and `ema_decay` the averaged weights' memory per step
    (0 switches any of them off); `distil` takes effect where there is a teacher (all tiers but the largest);
    with `adversarial` all batches are adversarial, and weights are chosen by what FGSM with the same ε leaves
    of their accuracy; `start` says where the caller takes the first weights from; the architecture split is
    read every `evaluate_every` epochs, counted back from the last one. bf16 is autocast: it pays on GPUs, and
    slows depthwise networks down on CPUs; `compile` (torch.compile, which needs a C++ compiler) costs a
    minute before the first step and brings nothing to these networks on a CPU; with `cuda_graph` a GPU gets
    its steps as a whole (`graphs.py`), where they are all alike."""

    later = frozenset({"adversarial", "cutout", "compile", "cuda_graph"})

    epochs: Epochs = Field(20, gt=0)
    batch_size: int = Field(64, ge=2)
    lr: float = Field(0.1, gt=0, allow_inf_nan=False)
    momentum: float = Field(0.9, ge=0, lt=1)
    nesterov: bool = True
    weight_decay: float = Field(5e-4, ge=0, allow_inf_nan=False)
    warmup_share: float = Field(0.1, ge=0, lt=1)
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    cutout: int = Field(0, ge=0, le=512)
    ema_decay: float = Field(0.998, ge=0, lt=1)
    clip_norm: float = Field(0.0, ge=0, allow_inf_nan=False)
    distil: Distil | None = None
    adversarial: Adversarial | None = None
    start: Literal["scratch", "supernet"] = "scratch"
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    cuda_graph: bool = True
    evaluate_every: int = Field(1, ge=1)

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> Self:
        if self.nesterov and self.momentum == 0:
            raise ValueError("'nesterov' needs a 'momentum' above 0: raise it, or set nesterov: false")
        return self

    def steps(self, images: int) -> int:
        """Optimiser steps of the whole training, one at least; an incomplete batch at the end of an epoch is
        left out."""
        return max(1, round(self.epochs * (images // min(self.batch_size, images))))

    def learning_rate(self, step: int, steps: int) -> float:
        """The rate of step 0 ≤ `step` < `steps`: a line that reaches `lr` with the last warm-up step, then
        half a cosine that would reach 0 at `steps`."""
        warmup = round(self.warmup_share * steps)
        if step < warmup:
            return self.lr * (step + 1) / warmup
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))

    def evaluates(self, epoch: int, last: int) -> bool:
        """Whether the architecture split is read after this epoch (the first is 1); always after the last."""
        return (last - epoch) % self.evaluate_every == 0


def decay_groups(network: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Parameter groups for an optimiser: matrices and kernels decay; norms' scales and all shifts do not."""
    trained = [p for p in network.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
