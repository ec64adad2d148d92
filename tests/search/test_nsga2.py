"""NSGA-II: its parts against pymoo's, and what one population finds for several tiers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pymoo.operators.survival.rank_and_crowding.metrics import calc_crowding_distance

from pipeline.algorithms.pareto import crowding, front_ranks
from pipeline.evaluators.tabular import TableSpace, TabularCosts, TabularEvaluator
from pipeline.progress import NoCheckpoint, Silent
from pipeline.search import METHODS
from pipeline.search.bands import BandSampler
from pipeline.search.nsga2 import Nsga2, best_first, cost_columns, sampler
from pipeline.search.problem import SearchProblem
from pipeline.types import Json, Limit, SearchResult, Slot, Tier

SIZES = (4,) * 6
ROWS = np.indices(SIZES).reshape(6, -1).T
WORTH = np.random.default_rng(3).random((6, 4)).cumsum(axis=1)
"""Of every choice: the dearer, the better."""
COST = 1.0 + ROWS.sum(axis=1)
LOSS = -WORTH[np.arange(6), ROWS].sum(axis=1) + 0.3 * (ROWS[:, 0] != ROWS[:, 1])


def tier(name: str, device: str = "cpu", **budgets: float) -> Tier:
    return Tier(device, name, tuple(Limit(metric, value, False, "") for metric, value in budgets.items()))


TIERS = (tier("s", latency_ms=6.0), tier("m", latency_ms=10.0), tier("l", latency_ms=14.0))


def problem(tiers: tuple[Tier, ...] = TIERS, **changed: Any) -> SearchProblem:
    space = TableSpace("toy", [Slot(str(i), ("a", "b", "c", "d")) for i in range(6)])
    costs = {"cpu": TabularCosts(ROWS, {"latency_ms": COST})}
    evaluator = TabularEvaluator(ROWS, LOSS)
    return SearchProblem(space, costs, tiers, evaluator, **{"evaluations": 160, **changed})


def search(asked: SearchProblem, method: str = "nsga2", trace: Any = None, **changed: Any) -> SearchResult:
    settings = METHODS[method].config(**changed)
    return METHODS[method].run(
        asked,
        settings,
        checkpoint=NoCheckpoint(),
        trace=trace or (lambda record: None),
        progress=Silent(),
    )


def regret(result: SearchResult, asked: SearchProblem) -> float:
    """Mean over tiers, of the best candidate that keeps the budget."""
    losses = np.array([c.loss for c in result.candidates])
    usage_NK = asked.usage([c.arch for c in result.candidates])
    budgets = [t.limits[0].value for t in asked.tiers]
    best = [LOSS[budget >= COST].min() for budget in budgets]
    found = [losses[usage_NK[:, k] <= 1].min() for k in range(len(budgets))]
    return float(np.mean(np.subtract(found, best)))


def test_crowding_is_pymoo_s() -> None:
    points = np.random.default_rng(0).random((30, 3))
    front = points[front_ranks(points) == 0]
    # theirs is the mean over objectives, and the ends of each are infinite in both
    np.testing.assert_allclose(crowding(front), 3 * calc_crowding_distance(front))
    assert len(front) > 6


def test_an_objective_without_differences_adds_nothing() -> None:
    line = np.array([[0.0, 3.0], [1.0, 2.0], [3.0, 0.0]])
    flat = np.column_stack([line, np.ones(3)])
    np.testing.assert_array_equal(crowding(flat), crowding(line))
    np.testing.assert_array_equal(crowding(line), [np.inf, 2.0, np.inf])
    assert (crowding(np.ones((4, 2))) == 0).all()


def test_fronts_come_before_distance() -> None:
    points = np.array([[0.0, 4.0], [5.0, 5.0], [4.0, 0.0], [2.0, 2.0], [1.9, 2.1]])
    order = best_first(points).tolist()
    assert set(order[:2]) == {0, 2} and set(order[2:4]) == {3, 4} and order[4] == 1


def test_tiers_that_differ_by_a_factor_are_one_cost() -> None:
    tiers = (
        tier("s", latency_ms=1.0, params=10.0),
        tier("m", latency_ms=2.0, params=20.0),
        tier("l", params=30.0, latency_ms=9.0),
        tier("s", "gpu", latency_ms=1.0),
        tier("l", "gpu", latency_ms=7.0),
    )
    assert cost_columns(tiers) == [0, 2, 3]


def test_one_population_serves_all_tiers_better_than_random_draws() -> None:
    found = {"nsga2": [], "random": []}  # type: dict[str, list[float]]
    for method, regrets in found.items():
        for seed in range(8):
            asked = problem(seed=seed)
            regrets.append(regret(search(asked, method), asked))
    assert np.mean(found["nsga2"]) < 0.5 * np.mean(found["random"])


def test_nobody_over_the_most_generous_budget_is_asked_about_where_children_keep_it() -> None:
    asked = problem((tier("s", latency_ms=6.0), tier("m", latency_ms=9.0)))
    result = search(asked, children=40)
    assert result.evaluations == 160
    assert (asked.usage([c.arch for c in result.candidates]).min(axis=1) <= 1).all()


def test_children_are_new_and_the_best_of_both_generations_live() -> None:
    asked = problem()
    parts = sampler(asked, Nsga2(population=10, children=20), BandSampler(asked))
    state, rng = parts.init(), np.random.default_rng(0)
    loss_of = {tuple(row): loss for row, loss in zip(ROWS.tolist(), LOSS.tolist(), strict=True)}
    for _ in range(6):
        before = {tuple(row) for row in state.present.choices_PS.tolist()}
        rows = parts.ask(state, rng)
        born = {tuple(row) for row in rows.tolist()}
        losses = np.array([loss_of[tuple(row)] for row in rows.tolist()])
        assert not before or (len(born) == 10 and not born & before)
        state = parts.tell(state, rows, losses, asked.usage_of(rows), rng)
        living = {tuple(row) for row in state.choices_PS.tolist()}
        assert len(living) == 10 and living <= before | born
        points = np.array([[loss_of[row], sum(row)] for row in before | born])
        front = {row for row, rank in zip(before | born, front_ranks(points), strict=True) if rank == 0}
        assert front <= living if len(front) <= 10 else living <= front


def test_what_keeps_no_budget_ranks_behind_what_does_however_good_it_is() -> None:
    asked = problem((tier("s", latency_ms=6.0), tier("m", latency_ms=9.0)))
    parts = sampler(asked, Nsga2(population=4), BandSampler(asked))
    over = np.array([[3] * 6, [3, 3, 3, 3, 3, 2]])
    within = np.array([[0] * 6, [1] + [0] * 5, [1, 1] + [0] * 4, [1, 1, 1] + [0] * 3])
    rows = np.concatenate([over, within])
    losses = np.array(
        [-9.0, -8.0, 4.0, 4.5, 4.6, 4.7]
    )  # those within are each worse and dearer than the first
    state = parts.tell(parts.init(), rows, losses, asked.usage_of(rows), np.random.default_rng(0))
    assert {tuple(row) for row in state.choices_PS.tolist()} == {tuple(row) for row in within.tolist()}


def test_a_space_smaller_than_the_population_is_searched_to_its_end() -> None:
    rows = np.indices((2, 3)).reshape(2, -1).T
    asked = SearchProblem(
        TableSpace("tiny", [Slot("a", ("x", "y")), Slot("b", ("x", "y", "z"))]),
        {"cpu": TabularCosts(rows, {"latency_ms": 1.0 + rows.sum(axis=1)})},
        (tier("all", latency_ms=9.0),),
        TabularEvaluator(rows, rows.sum(axis=1).astype(float)),
        evaluations=100,
    )
    assert len(search(asked).candidates) == 6


def test_a_stopped_search_ends_with_the_same_bits() -> None:
    kept: list[Any] = []

    class Kept:
        def load(self) -> Any:
            return kept[2] if len(kept) > 2 else None

        def save(self, arrays: Any, record: Any) -> None:
            kept.append((dict(arrays), record))

    def run(checkpoint: Any) -> tuple[list[Any], list[Json]]:
        trace: list[Json] = []
        result = METHODS["nsga2"].run(
            problem(save_every_s=0.0),
            Nsga2(population=12),
            checkpoint=checkpoint,
            trace=trace.append,
            progress=Silent(),
        )
        return [(c.arch, c.loss) for c in result.candidates], trace

    whole, told = run(Kept())
    again, rest = run(Kept())
    assert again == whole and rest == told[3:]
    assert [set(record) for record in told[1]["tiers"]] == [{"tier", "usage", "loss"}] * 3


@pytest.mark.parametrize("wrong", [{"population": 3}, {"crossover": 1.5}, {"children": 0}])
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Nsga2(**wrong)
