"""benchmarks/throughput.py: what is counted as whose time."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from benchmarks import throughput
from benchmarks.timed import Timed
from pipeline.costs.table import SpaceCosts
from pipeline.data import load_task
from pipeline.progress import Silent
from pipeline.spaces.mbconv import MBConvSettings, MBConvSpace
from pipeline.types import Arch, FitInfo, FloatArray


@pytest.fixture
def space() -> MBConvSpace:
    return MBConvSpace((1, 8, 8), 10, MBConvSettings(size="tiny"))


class Slow(throughput.ToyEvaluator):
    def losses(self, archs: Sequence[Arch], *, step: int, thorough: bool = False) -> FloatArray:
        time.sleep(0.02)
        return super().losses(archs, step=step)

    def fit(self, archs: Sequence[Arch], *, step: int) -> FitInfo:
        time.sleep(0.01)
        return super().fit(archs, step=step)


def test_training_and_evaluating_are_told_apart() -> None:
    timed = Timed(Slow((3, 2), seed=0))
    timed.fit([Arch("toy", (0, 0, 0))], step=0)
    timed.losses([Arch("toy", (0, 0, 0))], step=0)
    assert len(timed.fit_seconds) == 1
    assert timed.fit_seconds[0] >= 0.01 and timed.losses_s >= 0.02
    assert timed.fit_s == timed.fit_seconds[0]
    again = Timed(throughput.ToyEvaluator((3, 2), seed=0))
    again.load_state(timed.state())
    assert (again.fit_seconds, again.losses_s) == (timed.fit_seconds, timed.losses_s), (
        "in a search that goes on"
    )


def test_own_time_is_a_mean_over_iterations_without_the_evaluator_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """The warm-up ends at 10; iterations end at 100 (of which 90 are the evaluator's), 101 and 105."""
    timed = Timed(throughput.ToyEvaluator((3, 2), seed=0))
    trace = throughput.OwnTime(timed)
    now = iter([100.0, 101.0, 105.0])
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: next(now))
    trace.write({"stage": "warm_up"})
    timed.losses_s = 90.0
    trace.write({"stage": "search"})
    trace.write({"stage": "search"})
    timed.losses_s = 93.0
    trace.write({"stage": "search"})
    assert trace.iterations == 3 and trace.mean_s == pytest.approx((105 - 93 - 10) / 2)


def test_budgets_rise_and_can_be_met(space: MBConvSpace) -> None:
    costs = SpaceCosts(space, None)
    tiers = throughput.tiers_between(costs, space.smallest, space.largest, 5)
    budgets = [tier.budgets["flops"] for tier in tiers]
    smallest = costs.of([space.smallest])[0, costs.metrics.index("flops")]
    assert budgets == sorted(budgets) and budgets[0] > smallest


@pytest.mark.parametrize("trains_on", [False, True])
def test_overhead_leaves_the_evaluator_out(space: MBConvSpace, trains_on: bool) -> None:
    task = load_task("digits", seed=0, progress=Silent())
    asked = Namespace(evaluations=16, warm_up=2, seed=0)
    found = throughput.overhead(space, task, 2, trains_on, asked)
    assert found["share"] == pytest.approx(found["own_seconds"] / found["step_seconds"])
    assert 0 < found["own_seconds"] < 10 and found["evaluation_seconds"] > 0


def test_growth_is_of_a_search_that_has_nothing_to_wait_for() -> None:
    found = throughput.growth(slots=4, choices=3, tiers=2, evaluations=24, seed=0)
    assert 0 < found["own_seconds"] < 10


def test_members_that_differ_widen_the_interval() -> None:
    rng = np.random.default_rng(0)
    noise_MP = rng.normal(0, 0.01, size=(4, 10))
    alike = throughput.nested_interval(1 + noise_MP, rng)
    unlike = throughput.nested_interval(np.array([0.8, 0.9, 1.1, 1.2])[:, None] + noise_MP, rng)
    assert alike[0] < 1 < alike[1] and unlike[1] - unlike[0] > 10 * (alike[1] - alike[0])


def test_toy_costs_are_sums() -> None:
    costs = throughput.ToyCosts((2, 3), seed=0)
    (row,) = costs.of([Arch("toy", (1, 2))])
    np.testing.assert_allclose(row, costs.additive[0, 0, 1] + costs.additive[0, 1, 2])


@pytest.mark.parametrize("option", ["", "channels-first", "bf16"])
def test_a_step_trains(space: MBConvSpace, option: str) -> None:
    images, labels = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 3])
    assert throughput.training_step(space, space.smallest, images, labels, option)() > 0
