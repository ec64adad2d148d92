"""benchmarks/throughput.py: what is counted as whose time."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from benchmarks import throughput
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
    timed = throughput.Timed(Slow((3, 2), seed=0))
    timed.fit([Arch("toy", (0, 0, 0))], step=0)
    timed.losses([Arch("toy", (0, 0, 0))], step=0)
    assert timed.fits == 1 and 0.01 <= timed.fit_s < 0.02 <= timed.losses_s


def test_budgets_rise_and_can_be_met(space: MBConvSpace) -> None:
    costs = SpaceCosts(space, None)
    tiers = throughput.tiers_between(costs, space.smallest, space.largest, 5)
    budgets = [tier.budgets["flops"] for tier in tiers]
    smallest = costs.of([space.smallest])[0, costs.metrics.index("flops")]
    assert budgets == sorted(budgets) and budgets[0] > smallest


def test_overhead_leaves_the_evaluator_out(space: MBConvSpace) -> None:
    task = load_task("digits", seed=0, progress=Silent())
    found = throughput.overhead(space, task, count=2, iterations=4, seed=0)
    assert found["share"] == pytest.approx(found["own_seconds"] / found["step_seconds"])
    assert 0 < found["own_seconds"] < 10 and found["evaluation_seconds"] > 0


def test_growth_runs_as_many_iterations_as_asked() -> None:
    found = throughput.growth(slots=4, choices=3, tiers=2, iterations=6, seed=0)
    assert found["own_seconds"] > 0


def test_toy_costs_are_sums() -> None:
    costs = throughput.ToyCosts((2, 3), seed=0)
    (row,) = costs.of([Arch("toy", (1, 2))])
    np.testing.assert_allclose(row, costs.additive[0, 0, 1] + costs.additive[0, 1, 2])


@pytest.mark.parametrize("option", ["", "channels-first", "bf16"])
def test_a_step_trains(space: MBConvSpace, option: str) -> None:
    images, labels = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 3])
    assert throughput.training_step(space, space.smallest, images, labels, option)() > 0
