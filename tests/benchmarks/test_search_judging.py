"""Regrets, tests and savings against numbers worked out by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import search_judging
from benchmarks.search_judging import (
    COUNTS,
    GRID,
    Contest,
    Quality,
    Results,
    first_within,
    gather,
    interval,
    judge,
    p_lower,
    savings,
    targets_of,
    to_target,
)
from benchmarks.search_methods import ASNG, OURS
from pipeline.evaluators.tabular import TableSpace, TabularCosts, TabularEvaluator
from pipeline.types import FloatArray, IntArray, Limit, Slot, Tier

ROWS = np.indices((4, 4)).reshape(2, -1).T
TRUTH = ROWS.sum(axis=1).astype(float)
COST = ROWS.sum(axis=1) + 1.0


def contest() -> Contest:
    """Quality and cost both rise with the choices' sum; budgets admit sums up to 2 and up to 4."""
    tiers = tuple(Tier("table", str(b), (Limit("ms", b, False, ""),)) for b in (3.0, 5.0))
    quality = Quality(lambda choices_NS: choices_NS.sum(axis=1).astype(float), np.array([2.0, 4.0]), 0.0)
    slots = [Slot(name, tuple("abcd")) for name in "xy"]
    table = TabularEvaluator(ROWS, -TRUTH)
    costs = TabularCosts(ROWS, {"ms": COST})
    return Contest(TableSpace("toy", slots), costs, tiers, table.reseeded, {"truth": quality}, middle=0.0)


def asked(*rows: tuple[int, int]) -> IntArray:
    return np.array(rows)


def test_a_tier_takes_the_best_that_keeps_its_budget() -> None:
    rows = asked((3, 3), (1, 0), (2, 1), (0, 2))
    judged = judge(contest(), rows, -rows.sum(axis=1).astype(float))
    np.testing.assert_array_equal(judged.regret["truth", "answers"][-1], [0.0, 1.0])
    assert judged.regret["truth", "model"].shape == (len(COUNTS), 2)


def test_with_nothing_within_its_budget_a_tier_regrets_the_whole_range() -> None:
    rows = asked((3, 3), (3, 2))
    judged = judge(contest(), rows, -rows.sum(axis=1).astype(float))
    np.testing.assert_array_equal(judged.regret["truth", "answers"][0], [2.0, 4.0])


def test_several_answers_of_a_network_are_averaged() -> None:
    rows = asked((0, 1), (1, 1), (0, 1))
    judged = judge(contest(), rows, np.array([-9.0, -5.0, 3.0]))
    assert judged.regret["truth", "answers"][0, 0] == 0.0, "a mean of -3 is worse than -5"


def test_what_comes_later_does_not_count_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search_judging, "COUNTS", (1, 2))
    rows = asked((0, 1), (0, 2))
    judged = judge(contest(), rows, -rows.sum(axis=1).astype(float))
    np.testing.assert_array_equal(judged.regret["truth", "answers"][:, 0], [1.0, 0.0])
    assert judged.hypervolume_E[0] < judged.hypervolume_E[1]


def test_hypervolume_is_the_area_between_the_median_and_what_was_seen() -> None:
    rows = asked((1, 1))
    judged = judge(contest(), rows, np.array([-2.0]))
    assert judged.hypervolume_E[-1] == pytest.approx(2.0 * (1 - 3 / 5), abs=1e-6)


def results(regret_Z: FloatArray, course_G: FloatArray) -> Results:
    regret_ZEK = np.repeat(regret_Z[:, None, None], len(COUNTS), axis=1)
    course_ZG = course_G + 0.0 * regret_Z[:, None]  # one course for all searches, or one each
    return Results({("truth", "answers"): regret_ZEK}, {"truth": course_ZG}, np.ones((1, len(COUNTS))), 0.0)


def test_the_paired_test_sees_a_small_lead_that_holds_for_every_seed() -> None:
    rng = np.random.default_rng(0)
    hard = rng.normal(10, 3, size=(40, 1))
    ours = hard + rng.normal(0, 0.05, size=(40, 1))
    assert p_lower(ours, hard + 0.1)[0] < 1e-6
    assert p_lower(hard + 0.1, ours)[0] > 0.99
    assert p_lower(ours, ours)[0] == 1.0


def test_the_paired_test_is_scipy_s() -> None:
    from scipy import stats

    rng = np.random.default_rng(1)
    ours, theirs = rng.normal(size=(12, 3)), rng.normal(0.3, 1, size=(12, 3))
    wanted = stats.ttest_rel(ours, theirs, axis=0, alternative="less").pvalue
    np.testing.assert_allclose(p_lower(ours, theirs), wanted)


def test_the_interval_covers_the_mean_and_narrows_with_seeds() -> None:
    rng = np.random.default_rng(2)
    few, many = (rng.normal(1.0, 1.0, size=(n, 1)) for n in (10, 1000))
    (low_few, high_few), (low, high) = interval(few)[:, 0], interval(many)[:, 0]
    assert low < 1.0 < high and high - low < (high_few - low_few) / 4
    assert high - low == pytest.approx(2 * 1.96 / np.sqrt(1000), rel=0.15)


def test_the_share_of_asng_s_evaluations_by_hand() -> None:
    falling = 10.0 / np.arange(1, 241)
    ours = results(np.zeros(4), 10.0 / (3 * np.arange(1, 81)))
    found = savings(ours, results(np.zeros(4), falling), "truth")
    assert [saving.asng for saving in found] == [3 * count for count in COUNTS]
    assert all(saving.ratio == pytest.approx(1 / 3) and not saving.bound for saving in found)
    never = savings(ours, results(np.zeros(4), falling + 9.0), "truth")
    assert never[0].bound and never[0].asng is None and never[0].ratio == 50 / (240 * GRID)


def test_evaluations_to_a_target_count_those_who_never_came() -> None:
    """Two of five searches arrive, and one of them after the evaluations that all have."""
    courses = np.full((5, 240), 1.0)
    courses[0, 9:] = 0.1
    courses[1, 100:] = 0.1
    found = results(np.zeros(5), courses)
    assert to_target(found, 0.5) == (None, 100.0, None, 0.2)
    courses[:3, 19:] = 0.1
    assert to_target(results(np.zeros(5), courses), 0.5) == (200.0, 100.0, None, 0.6)


def test_targets_say_at_which_counts_it_falls_short() -> None:
    rng = np.random.default_rng(3)
    ours = results(rng.normal(0, 0.1, 20), 10.0 / np.arange(1, 81))
    better = results(rng.normal(1, 0.1, 20), np.full(240, 20.0))
    found = targets_of({OURS: ours, ASNG: better})
    assert [target.passed for target in found] == [True, True]
    better.regret["truth", "answers"][:, 2] = ours.regret["truth", "answers"][:, 2]
    (missed, _) = targets_of({OURS: ours, ASNG: better})
    assert not missed.passed and missed.came == "7 of 8, not at 150"


def test_a_course_is_held_where_a_search_ended_early() -> None:
    rows = asked(*[(0, 1)] * 25)
    judged = judge(contest(), rows, np.full(25, -1.0))
    assert gather([judged], 1.0, 100).course["truth"].shape == (1, 10)
    assert first_within(np.array([3.0, 2.0, 1.0]), 2.0) == 2 * GRID
    assert first_within(np.array([3.0]), 2.0) is None


def test_the_plot_is_drawn(tmp_path: Path) -> None:
    found = results(np.arange(3.0), 10.0 / np.arange(1, 81))
    search_judging.plot({OURS: found}, 0.0, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
