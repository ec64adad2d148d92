"""A gradient search on a real supernet: what is masked is computed no more, and a killed search ends with the
same bits."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.costs.table import SpaceCosts
from pipeline.data import load_task
from pipeline.evaluators.relaxed import RelaxedSettings, RelaxedSupernet
from pipeline.progress import Silent
from pipeline.search import METHODS
from pipeline.search.darts_prime import DartsPrime
from pipeline.search.problem import SearchProblem
from pipeline.spaces.nb201 import NB201Settings, NB201Space
from pipeline.spaces.nb201_modules import ConvNorm
from pipeline.types import Arrays, Json, Limit, SearchResult, Tier

CONFIG = DartsPrime(learning_rate=0.1, ratio=1.0, candidates=4, cost_samples=40)


class Memory:
    """A checkpoint in memory; dies after so many savings."""

    def __init__(self, dies_after: int | None = None) -> None:
        self.kept: tuple[Arrays, Json] | None = None
        self.left, self.saves = dies_after, 0

    def load(self) -> tuple[Arrays, Json] | None:
        return copy.deepcopy(self.kept)

    def save(self, arrays: Mapping[str, Any], record: Json) -> None:
        self.kept = copy.deepcopy((dict(arrays), record))
        self.saves += 1
        if self.saves == self.left:
            raise KeyboardInterrupt


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


TASK = load_task("digits", seed=0, settings={"limit": 200}, progress=Silent())
SPACE = NB201Space(TASK.image_shape, 10, NB201Settings(cells=1, channels=2, mixed_norm="nodes"))
TABLE = SpaceCosts(SPACE, None)


def make_problem() -> tuple[SearchProblem, RelaxedSupernet]:
    task, space, table = TASK, SPACE, TABLE
    most = table.of([space.largest])[0, table.metrics.index("params")]
    tiers = tuple(
        Tier("counts", name, (Limit("params", share * most, False, ""),))
        for name, share in (("s", 0.6), ("l", 1.0))
    )
    evaluator = RelaxedSupernet(
        space,
        task,
        RelaxedSettings(batch_size=16, evaluation_images=16),
        total_steps=20,
        seed=0,
    )
    problem = SearchProblem(space, {"counts": table}, tiers, evaluator, 24, warm_up=3, save_every_s=0.0)
    return problem, evaluator


def search(problem: SearchProblem, memory: Memory, trace: list[Json]) -> SearchResult:
    del trace[(memory.kept[1]["iteration"] if memory.kept else 0) :]
    return METHODS["darts-prime"].run(
        problem, CONFIG, checkpoint=memory, trace=trace.append, progress=Silent()
    )


def test_killed_and_resumed_on_a_supernet_it_ends_with_the_same_bits() -> None:
    expected_trace: list[Json] = []
    problem, whole = make_problem()
    expected = search(problem, Memory(), expected_trace)
    assert len(expected_trace) == 3 + 2 * 12
    for kill in (9, 22):  # in the first tier, in the second
        memory, trace = Memory(dies_after=kill), list[Json]()
        with pytest.raises(KeyboardInterrupt):
            search(make_problem()[0], memory, trace)
        memory.left = None
        problem, resumed = make_problem()
        found = search(problem, memory, trace)
        assert trace == expected_trace
        assert found.candidates == expected.candidates
        assert expected.theta_KSC is not None and found.theta_KSC is not None
        np.testing.assert_array_equal(found.theta_KSC, expected.theta_KSC)
        left, right = whole.state(), resumed.state()
        assert all(np.array_equal(left[name], right[name]) for name in left)


def test_convolutions_that_are_masked_run_no_more() -> None:
    problem, evaluator = make_problem()
    ran: list[set[str]] = [set()]
    fit = evaluator.fit

    def watched(mixed: Any, *, step: int) -> Any:
        ran.append(set())
        return fit(mixed, step=step)

    evaluator.fit = watched  # type: ignore[method-assign]
    for name, module in evaluator.module.named_modules():
        if isinstance(module, ConvNorm) and ".convs." in name:
            module.register_forward_hook(lambda *_, name=name: ran[-1].add(name))  # type: ignore[misc]
    trace: list[Json] = []
    search(problem, Memory(), trace)
    tier_of = [record["tiers"][0]["tier"] if "tiers" in record else "" for record in trace]
    for tier in ("counts/s", "counts/l"):
        steps = [names for names, of in zip(ran[1:], tier_of, strict=True) if of == tier][:-1]
        assert len(steps[-1]) < len(steps[0])
        for before, after in itertools.pairwise(steps):
            assert after <= before, "what was masked came back"
