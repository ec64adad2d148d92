"""What gradient methods share and what tells them apart: their settings, how α becomes a mixture, which
minibatches move it, what pulls it towards an architecture, what makes one direction of several losses.

The loop that follows these rules is `search/gradient.py`. Axes: J losses, E edges, O operations.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
from pydantic import Field

from pipeline.algorithms import relaxation
from pipeline.algorithms.relaxation import Activation, Admm, Mask, Pace
from pipeline.settings import Settings
from pipeline.types import FloatArray, IntArray, Json, Tier

PUBLISHED_RATE, PUBLISHED_STEPS = 3e-4, 19_500
"""Of Adam on α, and minibatches: 50 epochs of half of CIFAR-10's training images, 64 at a time. With a
`pace` weights have more of the images, and the same epochs more minibatches."""

LEAST_MOVES = 200
"""Steps of α in which a tier is decided, each of which sees the noise of a minibatch."""

WARM_UP = 1000
"""Steps of the weights before α moves, where a run states none: a mixed step is a step of every operation."""


class GradientSettings(Settings):
    """What all gradient methods share. Adam's defaults are those of both papers."""

    learning_rate: float | None = Field(default=None, gt=0)
    """Of Adam on α. By default a tier's minibatches take α as far as the published ones do at 3e-4."""
    beta1: float = Field(default=0.5, ge=0, lt=1)
    beta2: float = Field(default=0.999, ge=0, lt=1)
    weight_decay: float = Field(default=1e-3, ge=0)
    candidates: int = Field(default=16, ge=1)
    """How many architectures a tier's search leaves, at most."""
    pressure_rate: float = Field(default=40.0, ge=0)
    """Change of a limit's multiplier λ per unit of log(cost/limit) and of the way that Adam can have
    moved α, its learning rate times its steps: λ has grown before operations are given up."""
    damping: float = Field(default=4.0, ge=0)
    """μ: what log(cost/limit) adds to the multiplier at once, which keeps it from overshooting."""
    cost_samples: int = Field(default=512, ge=16)
    """Architectures whose costs a linear fit is made to."""
    cost_every: int = Field(default=20, ge=1)
    """Steps of α after which the fit is renewed."""


class Pull(Protocol):
    """What draws a mixture towards an architecture. Its memory is that of ADMM, needed or not."""

    def gradient(
        self, mix_EO: FloatArray, mask_EO: Mask, memory: Admm, at: Where
    ) -> tuple[float, FloatArray]:
        """Value, and gradient by the mixture."""
        ...

    def start(self, alpha_EO: FloatArray, mask_EO: Mask, activation: Activation) -> Admm: ...
    def remember(
        self, memory: Admm, alpha_EO: FloatArray, mask_EO: Mask, activation: Activation, at: Where
    ) -> Admm:
        """The memory after a step of α."""
        ...


class Where(NamedTuple):
    """How far a tier's search is: `share` of its minibatches, and `moves`, the steps of α so far; what
    an architecture is: the space's rule, and the cell of every edge."""

    share: float
    moves: int
    disc: relaxation.Disc
    cell_E: IntArray


class NoPull:
    """Implements `Pull`."""

    def gradient(
        self, mix_EO: FloatArray, mask_EO: Mask, memory: Admm, at: Where
    ) -> tuple[float, FloatArray]:
        return 0.0, np.zeros_like(mix_EO)

    def start(self, alpha_EO: FloatArray, mask_EO: Mask, activation: Activation) -> Admm:
        return Admm(np.zeros_like(alpha_EO), np.zeros_like(alpha_EO))

    def remember(
        self, memory: Admm, alpha_EO: FloatArray, mask_EO: Mask, activation: Activation, at: Where
    ) -> Admm:
        return memory


class Combine(Protocol):
    """Makes one direction of several objectives."""

    def __call__(
        self,
        gradients_JEO: FloatArray,
        alpha_EO: FloatArray,
        mask_EO: Mask,
        chosen_EO: FloatArray,
        tier: Tier,
    ) -> tuple[FloatArray, Json]:
        """From the losses' gradients by the mixture, the one by the mixture that α goes down, before pulls
        and limits; and what of it is worth tracing. `chosen_EO` is the architecture the mixture stands
        for, as zeros and ones."""
        ...


class Rules(NamedTuple):
    """What tells gradient methods apart. Without a `pace` every minibatch moves α (the static
    schedule); without `combine` α goes down the first loss alone."""

    activation: Activation
    pace: Pace | None
    pull: Pull
    combine: Combine | None = None

    @property
    def published_steps(self) -> float:
        """Minibatches per search: all images go to the weights but for one in r + 1, or half of them."""
        if self.pace is None:
            return PUBLISHED_STEPS
        return 2 * PUBLISHED_STEPS * self.pace.ratio / (self.pace.ratio + 1)

    def moves(self, steps: int) -> float:
        """Steps of α in so many minibatches, in the long run."""
        return steps / (1 if self.pace is None else 1 + self.pace.ratio)

    @property
    def enough(self) -> int:
        """Minibatches in which a tier is decided: what a run gets that states no number."""
        return round(LEAST_MOVES / self.moves(1))
