"""What every search method of the catalogue must do."""

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from pipeline.evaluators.tabular import TableSpace, TabularCosts, TabularEvaluator
from pipeline.progress import Silent
from pipeline.search import METHODS
from pipeline.search.problem import SearchProblem
from pipeline.settings import Settings
from pipeline.types import Arch, Arrays, FitInfo, FloatArray, Json, Limit, SearchResult, Slot, Tier

SIZES = (3, 2, 3, 1, 3, 2)
ROWS = np.indices(SIZES).reshape(len(SIZES), -1).T
MS = (ROWS * [1.0, 2.0, 0.5, 0.0, 1.5, 0.7]).sum(axis=1) + 1.0
MERIT = np.sqrt(MS) + np.random.default_rng(0).normal(0, 0.2, len(MS))


class LastSlotDies(TableSpace):
    """Choosing 0 in the first slot makes the last one matter no more."""

    def canonical(self, arch: Arch) -> Arch:
        arch = super().canonical(arch)
        return Arch(arch.space, (*arch.choices[:-1], 0)) if arch.choices[0] == 0 else arch


class Memory:
    """A checkpoint in memory; dies after so many savings."""

    def __init__(self, dies_after: int | None = None) -> None:
        self.kept: tuple[Arrays, Json] | None = None
        self.left = dies_after
        self.saves = 0

    def load(self) -> tuple[Arrays, Json] | None:
        return copy.deepcopy(self.kept)

    def save(self, arrays: Mapping[str, Any], record: Json) -> None:
        self.kept = copy.deepcopy((dict(arrays), record))
        self.saves += 1
        if self.left is not None and self.saves >= self.left:
            raise KeyboardInterrupt


class Learner(TabularEvaluator):
    """Losses that fall with every step, by a state that has to survive."""

    def __init__(self) -> None:
        super().__init__(ROWS, -MERIT, noise_std=0.1)
        self.weight = np.zeros(1)

    trains = True

    def fit(self, archs: Sequence[Arch], *, step: int) -> FitInfo:
        info = super().fit(archs, step=step)
        self.weight = self.weight + info.loss * np.sin(step + 1)
        return info

    def losses(self, archs: Sequence[Arch], *, step: int, thorough: bool = False) -> FloatArray:
        return super().losses(archs, step=step, thorough=thorough) + np.tanh(self.weight)

    def state(self) -> Arrays:
        return {"weight": self.weight}

    def load_state(self, state: Arrays) -> None:
        self.weight = state["weight"]


def evaluator_of(kind: str) -> TabularEvaluator:
    if kind == "trains":
        return Learner()
    return TabularEvaluator(ROWS, -MERIT, noise_std=0.3 if kind == "noisy" else 0.0)


def problem(kind: str, seed: int = 0, evaluations: int = 47) -> SearchProblem:
    space = LastSlotDies("toy", [Slot(str(i), tuple("abc"[:size])) for i, size in enumerate(SIZES)])
    tiers = (
        Tier("cpu", "small", (Limit("latency_ms", 3.0, False, ""), Limit("params", 35.0, False, ""))),
        Tier("cpu", "large", (Limit("latency_ms", 7.0, False, ""),)),
        Tier("gpu", "only", (Limit("latency_ms", 4.0, False, ""),)),
    )
    costs = {
        "cpu": TabularCosts(ROWS, {"params": 10 * MS, "latency_ms": MS}),
        "gpu": TabularCosts(ROWS, {"latency_ms": np.sqrt(MS) + 1}),
    }
    evaluator = evaluator_of(kind)
    return SearchProblem(space, costs, tiers, evaluator, evaluations, warm_up=4, seed=seed, save_every_s=0.0)


def search(method: str, asked: SearchProblem, memory: Memory, trace: list[Json]) -> SearchResult:
    del trace[(memory.kept[1]["iteration"] if memory.kept else 0) :]
    config: Settings = METHODS[method].config()
    return METHODS[method].run(asked, config, checkpoint=memory, trace=trace.append, progress=Silent())


def assert_same(left: SearchResult, right: SearchResult) -> None:
    assert left.candidates == right.candidates
    assert (left.method, left.seed, left.evaluations) == (right.method, right.seed, right.evaluations)
    if left.theta_KSC is None or right.theta_KSC is None:
        assert left.theta_KSC is right.theta_KSC
    else:
        np.testing.assert_array_equal(left.theta_KSC, right.theta_KSC)


every_method = pytest.mark.parametrize(
    "method", sorted(name for name, method in METHODS.items() if not method.needs)
)
every_kind = pytest.mark.parametrize("kind", ["fixed", "noisy", "trains"])


@every_method
@every_kind
def test_it_spends_its_evaluations_and_no_more(method: str, kind: str) -> None:
    result = search(method, problem(kind), Memory(), [])
    assert result.method == method
    assert result.evaluations == sum(candidate.evaluations for candidate in result.candidates)
    assert result.evaluations <= 47 if kind == "fixed" else result.evaluations == 47


@every_method
@pytest.mark.parametrize("evaluations", [47, 120])
def test_it_asks_for_as_many_at_once_as_it_says(method: str, evaluations: int) -> None:
    """A supernet's learning rate is laid out over the steps of a search: one an iteration."""
    asked, entry = problem("trains", evaluations=evaluations), METHODS[method]
    trace: list[Json] = []
    search(method, asked, Memory(), trace)
    steps = sum(record["stage"] == "search" for record in trace)
    planned = math.ceil(evaluations / entry.asks(entry.config(), len(asked.tiers)))
    assert planned <= steps <= 1.25 * planned + 1, "more where one is drawn twice in an iteration"


@every_method
def test_it_finds_something_within_every_budget_and_only_canonical_architectures(method: str) -> None:
    asked = problem("fixed")
    archs = [candidate.arch for candidate in search(method, asked, Memory(), []).candidates]
    assert (asked.usage(archs) <= 1).any(axis=0).all()
    assert len(set(archs)) == len(archs)
    assert all(asked.space.canonical(arch) == arch for arch in archs)


@every_method
def test_it_depends_on_its_seed_and_on_nothing_else(method: str) -> None:
    first, again = (search(method, problem("noisy"), Memory(), []) for _ in range(2))
    assert_same(first, again)
    assert search(method, problem("noisy", seed=1), Memory(), []).candidates != first.candidates


@every_method
@every_kind
def test_killed_at_any_checkpoint_it_ends_as_if_nothing_had_been(method: str, kind: str) -> None:
    whole, whole_trace = Memory(), list[Json]()
    expected = search(method, problem(kind), whole, whole_trace)
    for kill in range(1, whole.saves, 3):
        memory, trace = Memory(dies_after=kill), list[Json]()
        with pytest.raises(KeyboardInterrupt):
            search(method, problem(kind), memory, trace)
        memory.left = None
        trace.append({"iteration": "written after the checkpoint, before the kill"})
        assert_same(search(method, problem(kind), memory, trace), expected)
        assert trace == whole_trace


@every_method
def test_a_finished_search_costs_nothing_to_repeat(method: str) -> None:
    memory, asked = Memory(), problem("trains")
    expected = search(method, asked, memory, [])
    asked.evaluator.losses = asked.evaluator.fit = None  # type: ignore[method-assign,assignment]
    assert_same(search(method, asked, memory, []), expected)
