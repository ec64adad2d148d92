"""Evaluators: what a search can learn from. A new one is one file and one line in `EVALUATORS`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from pipeline.data.base import ImageTask
from pipeline.settings import Settings
from pipeline.spaces.base import SearchSpace
from pipeline.types import Evaluator


class MakeEvaluator(Protocol):
    """`total_steps` is how often `fit` will be called; `device` is torch's name of where to compute."""

    def __call__(
        self,
        space: SearchSpace,
        task: ImageTask,
        settings: Any,
        *,
        total_steps: int,
        seed: int,
        device: str,
    ) -> Evaluator: ...


class EvaluatorEntry(NamedTuple):
    settings: type[Settings]
    make: MakeEvaluator


def _one_shot() -> EvaluatorEntry:
    from pipeline.evaluators.one_shot import OneShotEvaluator, OneShotSettings

    return EvaluatorEntry(OneShotSettings, OneShotEvaluator)


EVALUATORS: dict[str, Callable[[], EvaluatorEntry]] = {
    "one-shot": _one_shot,
}
"""Name → a function that imports the evaluator: most of them need torch, and a catalogue must not."""
