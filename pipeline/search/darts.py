"""Plain DARTS, the baseline: softmax over each edge's operations, and a step of α with every minibatch.

H. Liu, K. Simonyan, Y. Yang, "DARTS: Differentiable Architecture Search", 2018, arXiv 1806.09055. First
or second order is the evaluator's `order`. Budgets are ours (`gradient.py`).

It is known to collapse towards skip connections on NAS-Bench-201 (Dong and Yang 2020, arXiv 2001.00326); in
the short searches of `benchmarks/darts_nb201.py` it does not.
"""

from __future__ import annotations

from collections.abc import Callable

from pipeline.algorithms import relaxation
from pipeline.search.base import RELAXED, SearchMethod
from pipeline.search.gradient import descend
from pipeline.search.gradient_rules import WARM_UP, GradientSettings, NoPull, Rules
from pipeline.search.problem import SearchProblem
from pipeline.types import Checkpoint, Json, Progress, SearchResult

RULES = Rules(relaxation.SOFTMAX, pace=None, pull=NoPull())


class Darts(GradientSettings):
    """Settings of `darts`."""


def run(
    problem: SearchProblem,
    config: Darts,
    *,
    checkpoint: Checkpoint,
    trace: Callable[[Json], None],
    progress: Progress,
) -> SearchResult:
    """One search per tier; what is raised, see `descend`."""
    return descend("darts", problem, config, RULES, checkpoint=checkpoint, trace=trace, progress=progress)


def suggests(config: Darts) -> Json:
    return {
        "evaluator": RELAXED,
        "space": {"mixed_norm": "pools"},
        "evaluations": RULES.enough,
        "warm_up": WARM_UP,
    }


METHOD = SearchMethod(Darts, run, frozenset({RELAXED}), suggests)
