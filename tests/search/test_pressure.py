"""What limits do to a mixture, on a table whose costs are sums over the edges."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest

from pipeline.algorithms import relaxation
from pipeline.evaluators.tabular import TableSpace, TabularCosts
from pipeline.search.pressure import Pressure
from pipeline.search.problem import SearchProblem
from pipeline.types import Arch, Evaluator, FloatArray, Limit, RelaxedEvaluator, Slot, Tier

NAMES = ("none", "skip", "conv")
SLOTS = [Slot(f"e{i}", NAMES) for i in range(3)]
SPACE = TableSpace("toy", SLOTS)
ROWS = np.indices((3, 3, 3)).reshape(3, -1).T
COST_EO = np.array([[1.0, 2.0, 6.0], [1.0, 1.5, 4.0], [1.0, 3.0, 5.0]])
SIZE_EO = np.array([[0.0, 0.0, 9.0], [0.0, 0.0, 4.0], [0.0, 0.0, 1.0]])
CHEAP, DEAR = Arch("toy", (0, 0, 0)), Arch("toy", (2, 2, 2))
EVEN_EO = np.full((3, 3), 1 / 3)


class Relaxed:
    """A mixture stands for its strongest operations."""

    edges = tuple(SLOTS)

    def discretise(self, mix_EO: FloatArray) -> Arch:
        return Arch("toy", tuple(mix_EO.argmax(axis=1).tolist()))

    def mix_of(self, arch: Arch) -> FloatArray:
        return np.eye(3)[list(arch.choices)]


class Additive(TabularCosts):
    additive = np.stack([COST_EO, SIZE_EO])  # type: ignore[assignment]


def pressure(*limits: tuple[str, float], additive: bool = True, **changed: float) -> Pressure:
    columns = {
        name: x_EO[np.arange(3), ROWS].sum(axis=1) for name, x_EO in (("ms", COST_EO), ("size", SIZE_EO))
    }
    tier = Tier("cpu", "t", tuple(Limit(metric, value, False, "") for metric, value in limits))
    table = (Additive if additive else TabularCosts)(ROWS, columns)
    relaxed: Any = Relaxed()
    problem = SearchProblem(SPACE, {"cpu": table}, (tier,), cast(Evaluator, relaxed), evaluations=1)
    settings: Any = {"damping": 4.0, "rate": 0.5, "samples": 400, **changed}
    return Pressure(problem, cast(RelaxedEvaluator, relaxed), tier, **settings)


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_a_kept_limit_does_not_pull_and_its_multiplier_stays_at_zero() -> None:
    loose = pressure(("ms", 100.0))
    costs = loose.linear_costs(EVEN_EO, rng())
    pull_EO, multiplier_L = loose.of(costs, EVEN_EO, CHEAP, np.zeros(1), 1.0)
    assert not pull_EO.any() and multiplier_L.tolist() == [0.0]


def test_a_broken_limit_pulls_as_hard_as_the_multiplier_says_and_down_the_cost() -> None:
    tight = pressure(("ms", 4.0))
    costs = tight.linear_costs(EVEN_EO, rng())
    excess = np.log(COST_EO.mean(axis=1).sum() / 4.0)
    pull_EO, multiplier_L = tight.of(costs, EVEN_EO, CHEAP, np.array([0.3]), 2.0)
    assert np.linalg.norm(pull_EO) == pytest.approx(2.0 * (0.3 + 4.0 * excess))
    assert multiplier_L == pytest.approx([0.3 + 0.5 * excess])
    lower_EO = np.maximum(EVEN_EO - 0.01 * pull_EO / np.linalg.norm(pull_EO), 0)
    assert (COST_EO * relaxation.shares(lower_EO)).sum() < (COST_EO * EVEN_EO).sum()


def test_a_multiplier_shrinks_once_the_limit_is_kept() -> None:
    loose = pressure(("ms", 10.0))
    costs = loose.linear_costs(EVEN_EO, rng())
    _, multiplier_L = loose.of(costs, EVEN_EO, CHEAP, np.array([0.3]), 1.0)
    assert 0 < multiplier_L[0] < 0.3


def test_a_mixture_that_is_cheap_and_stands_for_something_dear_is_pulled() -> None:
    between = pressure(("ms", 10.0))
    costs = between.linear_costs(EVEN_EO, rng())
    cheap_EO, _ = between.of(costs, EVEN_EO, CHEAP, np.zeros(1), 1.0)
    dear_EO, _ = between.of(costs, EVEN_EO, DEAR, np.zeros(1), 1.0)
    assert not cheap_EO.any() and dear_EO.any()


def test_costs_that_are_not_known_to_be_sums_are_fitted() -> None:
    limits = (("ms", 4.0), ("size", 2.0))
    mix_EO = np.random.default_rng(1).dirichlet(np.ones(3), size=3)
    exact, fitted = (pressure(*limits, additive=known).linear_costs(mix_EO, rng()) for known in (True, False))
    exact_L, gradient_LEO = relaxation.expected_cost(exact, mix_EO)
    fitted_L, fitted_LEO = relaxation.expected_cost(fitted, mix_EO)
    assert exact_L == pytest.approx([(COST_EO * mix_EO).sum(), (SIZE_EO * mix_EO).sum()])
    assert fitted_L == pytest.approx(exact_L, rel=1e-4)
    assert fitted_LEO == pytest.approx(gradient_LEO, abs=1e-3)


def test_only_the_broken_one_of_two_limits_pulls() -> None:
    both = pressure(("ms", 100.0), ("size", 2.0))
    costs = both.linear_costs(EVEN_EO, rng())
    pull_EO, multiplier_L = both.of(costs, EVEN_EO, CHEAP, np.zeros(2), 1.0)
    assert multiplier_L[0] == 0 < multiplier_L[1]
    only_EO, _ = pressure(("size", 2.0)).of(costs_of_size(costs), EVEN_EO, CHEAP, np.zeros(1), 1.0)
    assert pull_EO == pytest.approx(only_EO)


def costs_of_size(costs: relaxation.LinearCost) -> relaxation.LinearCost:
    return relaxation.LinearCost(costs.base_L[1:], costs.weight_LEO[1:], costs.kept_EO)


def test_a_trace_tells_both_costs() -> None:
    own = pressure(("ms", 5.0), ("size", 7.0))
    told = own.told(own.linear_costs(EVEN_EO, rng()), EVEN_EO, DEAR, np.array([0.1, 0.2]))
    assert told["usage_chosen"] == pytest.approx(15 / 5)
    assert told["usage"] == pytest.approx(COST_EO.mean(axis=1).sum() / 5)
    assert told["multiplier"] == {"ms": 0.1, "size": 0.2}
