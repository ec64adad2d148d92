"""An evaluator whose answers come from several ranks: each asks for some of them, and all know all.

Losses of one call are independent of each other, so it does not matter who computes which; they travel as
they are, so that every rank tells its sampler the same numbers, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from pipeline.errors import ConfigError
from pipeline.ranks import Ranks, share_out
from pipeline.types import Arch, Arrays, Evaluator, FitInfo, FloatArray


@runtime_checkable
class TrainsOverRanks(Protocol):
    """An evaluator whose `fit` can be one step of several ranks."""

    def join(self, ranks: Ranks) -> None:
        """From now on `fit` does this rank's part; all ranks call it alike."""
        ...


def over_ranks(evaluator: Evaluator, ranks: Ranks, load: Callable[[Arch], float]) -> Evaluator:
    """The evaluator itself where this is the only rank, else one that spreads its work; `load` is what an
    architecture costs to evaluate, in any unit. Raises ConfigError where it trains in one process only."""
    if ranks.size == 1:
        return evaluator
    if isinstance(evaluator, TrainsOverRanks):
        evaluator.join(ranks)
    elif evaluator.trains:
        raise ConfigError(
            f"{type(evaluator).__name__} trains in one process only, and {ranks.size} were started: search "
            "without torchrun (retraining may have several), or with evaluator one-shot"
        )
    return Spread(evaluator, ranks, load)


class Spread:
    """Implements `pipeline.types.Evaluator`; of the losses only column 0, which sampling methods read."""

    def __init__(self, evaluator: Evaluator, ranks: Ranks, load: Callable[[Arch], float]) -> None:
        self._evaluator, self._ranks, self._load = evaluator, ranks, load

    @property
    def noisy(self) -> bool:
        return self._evaluator.noisy

    @property
    def trains(self) -> bool:
        return self._evaluator.trains

    def losses(self, archs: Sequence[Arch], *, step: int, thorough: bool = False) -> FloatArray:
        """Shape (N, 1)."""
        owners = share_out([self._load(arch) for arch in archs], self._ranks.size)
        own = [place for place, owner in enumerate(owners) if owner == self._ranks.rank]
        losses_N = np.zeros(len(archs))
        if own:
            asked = [archs[place] for place in own]
            losses_N[own] = self._evaluator.losses(asked, step=step, thorough=thorough)[:, 0]
        return self._ranks.sum_array(losses_N)[:, None]

    def fit(self, archs: Sequence[Arch], *, step: int) -> FitInfo:
        return self._evaluator.fit(archs, step=step)

    def state(self) -> Arrays:
        return self._evaluator.state()

    def load_state(self, state: Arrays) -> None:
        self._evaluator.load_state(state)
