"""An evaluator whose answers are timed, for benchmarks that tell learning from the rest of a search."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from pipeline.types import Arch, Arrays, Evaluator, FitInfo, FloatArray


class Timed:
    """Remembers what every training step took, and all losses together, in seconds; also in its state, so
    that a search which goes on knows of what was before."""

    def __init__(self, inner: Evaluator) -> None:
        self._inner = inner
        self.noisy, self.trains = inner.noisy, inner.trains
        self.fit_seconds: list[float] = []
        self.losses_s = 0.0

    @property
    def fit_s(self) -> float:
        return sum(self.fit_seconds)

    def fit(self, archs: Sequence[Arch], *, step: int) -> FitInfo:
        began = time.perf_counter()
        info = self._inner.fit(archs, step=step)
        self.fit_seconds.append(time.perf_counter() - began)
        return info

    def losses(self, archs: Sequence[Arch], *, step: int, thorough: bool = False) -> FloatArray:
        began = time.perf_counter()
        losses = self._inner.losses(archs, step=step, thorough=thorough)
        self.losses_s += time.perf_counter() - began
        return losses

    def state(self) -> Arrays:
        return {**self._inner.state(), "timed": np.array([self.losses_s, *self.fit_seconds])}

    def load_state(self, state: Arrays) -> None:
        self.losses_s, *self.fit_seconds = state["timed"].tolist()
        self._inner.load_state({name: value for name, value in state.items() if name != "timed"})
