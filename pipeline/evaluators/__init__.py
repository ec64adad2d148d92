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


def _relaxed_adversarial() -> EvaluatorEntry:
    from pipeline.evaluators.adversarial import AdversarialSettings, make_adversarial

    return EvaluatorEntry(AdversarialSettings, make_adversarial, frozenset({"relaxed"}))


def _eproxy() -> EvaluatorEntry:
    from pipeline.evaluators.eproxy import EproxySettings, make_eproxy

    return EvaluatorEntry(EproxySettings, make_eproxy)


def _params() -> EvaluatorEntry:
    from pipeline.evaluators.proxies import CountSettings, make_params

    return EvaluatorEntry(CountSettings, make_params)


def _flops() -> EvaluatorEntry:
    from pipeline.evaluators.proxies import CountSettings, make_flops

    return EvaluatorEntry(CountSettings, make_flops)


def _synflow() -> EvaluatorEntry:
    from pipeline.evaluators.proxies import make_synflow
    from pipeline.evaluators.scores import ScoreSettings

    return EvaluatorEntry(ScoreSettings, make_synflow)


def _nwot() -> EvaluatorEntry:
    from pipeline.evaluators.proxies import make_nwot
    from pipeline.evaluators.scores import ImageScoreSettings

    return EvaluatorEntry(ImageScoreSettings, make_nwot)


def _jacov() -> EvaluatorEntry:
    from pipeline.evaluators.proxies import make_jacov
    from pipeline.evaluators.scores import ImageScoreSettings

    return EvaluatorEntry(ImageScoreSettings, make_jacov)


EVALUATORS: dict[str, Callable[[], EvaluatorEntry]] = {
    "one-shot": _one_shot,
    "relaxed": _relaxed,
    "relaxed-adversarial": _relaxed_adversarial,
    "eproxy": _eproxy,
    "params": _params,
    "flops": _flops,
    "synflow": _synflow,
    "nwot": _nwot,
    "jacov": _jacov,
}
"""Name → a function that imports the evaluator: most of them need torch, and a catalogue must not."""
