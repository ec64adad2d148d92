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
    """`offers` names what it has beyond the Evaluator protocol: `relaxed`, a `RelaxedEvaluator` as well;
    `extract`, a supernet that networks can take their first weights from."""

    settings: type[Settings]
    make: MakeEvaluator
    offers: frozenset[str] = frozenset()


def _one_shot() -> EvaluatorEntry:
    from pipeline.evaluators.one_shot import OneShotEvaluator, OneShotSettings

    return EvaluatorEntry(OneShotSettings, OneShotEvaluator, frozenset({"extract"}))


def _relaxed() -> EvaluatorEntry:
    from pipeline.evaluators.relaxed import RelaxedSettings, RelaxedSupernet

    return EvaluatorEntry(RelaxedSettings, RelaxedSupernet, frozenset({"relaxed"}))


EVALUATORS: dict[str, Callable[[], EvaluatorEntry]] = {
    "one-shot": _one_shot,
    "relaxed": _relaxed,
}
"""Name → a function that imports the evaluator: most of them need torch, and a catalogue must not."""
