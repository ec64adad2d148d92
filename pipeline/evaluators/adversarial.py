"""A relaxed supernet whose weights train on adversarial images alone: the lower level of E2RNAS.

Z. Yue, B. Lin, X. Huang, Y. Zhang, "Effective, Efficient and Robust Neural Architecture Search", 2020,
arXiv 2011.09820: every batch is perturbed in one step against the weights and the mixture as they stand
(`attack.one_step`), ε = 2/255. The upper level sees images as they are. Any gradient method can search
on it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from pipeline.data.base import ImageTask
from pipeline.evaluators import attack
from pipeline.evaluators.relaxed import RelaxedSettings, RelaxedSupernet
from pipeline.spaces.base import SearchSpace

STREAM = 3
"""Last word of the seeds of the perturbations; those of batches are 1 and 2."""


class AdversarialSettings(RelaxedSettings):
    """Those of `relaxed`, and how strong the attack is. The paper searches with `order: second`."""

    epsilon: float = Field(2.0, gt=0, le=attack.LEVELS, description="largest change of a pixel, in 1/255")


@dataclass(frozen=True)
class OneStep:
    """Implements `pipeline.evaluators.relaxed.Perturb`; a function of (seed, step) and what it is
    given."""

    pixels: attack.Pixels
    epsilon: float
    seed: int

    def __call__(
        self, network: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, *, step: int
    ) -> Tensor:
        words = np.random.SeedSequence([self.seed, step, STREAM])
        generator = torch.Generator().manual_seed(int(words.generate_state(1, np.uint64)[0] >> 1))
        return attack.one_step(
            network, images, labels, epsilon=self.epsilon, pixels=self.pixels, generator=generator
        )


def make_adversarial(
    space: SearchSpace,
    task: ImageTask,
    settings: AdversarialSettings,
    *,
    total_steps: int,
    seed: int,
    device: str,
) -> RelaxedSupernet:
    """As `RelaxedSupernet`, which says what is raised."""
    perturb = OneStep(attack.Pixels.of(task), settings.epsilon / attack.LEVELS, seed)
    return RelaxedSupernet(
        space, task, settings, total_steps=total_steps, seed=seed, device=device, perturb=perturb
    )
