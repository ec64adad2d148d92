"""The problem, the bands and the loop that drives samplers."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from pipeline.costs.table import SpaceCosts
from pipeline.errors import ConfigError, DivergedTraining, InfeasibleBudget, StaleArtifact
from pipeline.evaluators.tabular import TableSpace, TabularCosts, TabularEvaluator
from pipeline.progress import NoCheckpoint, Silent
from pipeline.search import METHODS
from pipeline.search.bands import BandSampler
from pipeline.search.problem import SearchProblem
from pipeline.search.random import Random
from pipeline.spaces.mbconv import MBConvSettings, MBConvSpace
from pipeline.spaces.nb201 import NB201Settings, NB201Space
from pipeline.types import Arch, CostTable, FitInfo, FloatArray, Limit, SearchResult, Slot, Tier

SIZES = (3, 3, 3, 3)
ROWS = np.indices(SIZES).reshape(4, -1).T
MS = ROWS.sum(axis=1) + 1.0
SPACE = TableSpace("toy", [Slot(str(i), ("a", "b", "c")) for i in range(4)])


def tier(name: str, device: str = "cpu", **budgets: float) -> Tier:
    return Tier(device, name, tuple(Limit(metric, value, False, "") for metric, value in budgets.items()))


def problem(*tiers: Tier, evaluator: Any = None, **kwargs: Any) -> SearchProblem:
    costs = TabularCosts(ROWS, {"latency_ms": MS, "params": 10 * MS})
    return SearchProblem(
        SPACE,
        {"cpu": costs, "gpu": TabularCosts(ROWS, {"latency_ms": 2 * MS})},
        tiers or (tier("s", latency_ms=4.0), tier("l", latency_ms=8.0)),
        evaluator or TabularEvaluator(ROWS, -MS),
        **{"evaluations": 40, **kwargs},
    )


def search(asked: SearchProblem, method: str = "random", **kwargs: Any) -> SearchResult:
    settings = METHODS[method].config()
    common: dict[str, Any] = {
        "checkpoint": NoCheckpoint(),
        "trace": lambda record: None,
        "progress": Silent(),
    }
    return METHODS[method].run(asked, settings, **{**common, **kwargs})


class Learner(TabularEvaluator):
    """A table that counts what it is asked, as an evaluator that trains."""

    def __init__(self) -> None:
        super().__init__(ROWS, -MS)
        self.log: list[tuple[str, int, int]] = []

    trains = True

    def fit(self, archs: Sequence[Arch], *, step: int) -> FitInfo:
        self.log.append(("fit", step, len(archs)))
        return FitInfo(1.0)

    def losses(self, archs: Sequence[Arch], *, step: int, thorough: bool = False) -> FloatArray:
        self.log.append(("losses", step, len(archs)))
        return super().losses(archs, step=step, thorough=thorough)


def test_usage_is_the_tightest_limit_on_the_tier_s_own_device() -> None:
    asked = problem(
        tier("two", latency_ms=4.0, params=20.0),
        tier("one", latency_ms=4.0),
        tier("g", "gpu", latency_ms=4.0),
    )
    np.testing.assert_allclose(asked.usage([Arch("toy", (1, 1, 0, 0))]), [[1.5, 0.75, 1.5]])
    each_in_one_tier = asked.usage_in(np.array([[1, 1, 0, 0]] * 4), np.array([2, 0, 0, 1]))
    np.testing.assert_allclose(each_in_one_tier, [1.5, 1.5, 1.5, 0.75])


def test_usage_is_looked_up_once_per_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, seen = problem(), []
    plain = TabularCosts.of
    monkeypatch.setattr(TabularCosts, "of", lambda self, archs: seen.extend(archs) or plain(self, archs))
    first, second = Arch("toy", (0, 0, 0, 0)), Arch("toy", (2, 0, 0, 0))
    asked.usage([first, first])
    np.testing.assert_allclose(asked.usage([first, second]), [[0.25, 0.125], [0.75, 0.375]])
    assert seen == [first, second]


def test_what_is_forgotten_is_worked_out_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.search.problem.MOST_KNOWN", 5)
    asked, rng = problem(), np.random.default_rng(0)
    for _ in range(20):
        rows_NS = rng.integers(3, size=(7, 4))
        expected = np.array(
            [asked.costs["cpu"].of([Arch("toy", tuple(row))])[0, 0] for row in rows_NS.tolist()]
        )
        np.testing.assert_array_equal(asked.usage_of(rows_NS), expected[:, None] / [4.0, 8.0])
        np.testing.assert_array_equal(asked.canonical(rows_NS), rows_NS)


def test_rows_are_looked_up_in_their_canonical_form() -> None:
    """In nb201 a dead edge costs nothing: it counts as `none`."""
    space = NB201Space((3, 8, 8), 10, NB201Settings(cells=1, channels=4))
    costs = SpaceCosts(space, None)
    asked = SearchProblem(space, {"cpu": costs}, (tier("s", params=1e6),), TabularEvaluator(ROWS, -MS), 1)
    rows_NS = np.array([[0, 3, 3, 1, 0, 0], [0, 0, 0, 1, 0, 0]])
    np.testing.assert_array_equal(asked.canonical(rows_NS), rows_NS[[1, 1]])
    bare = costs.of([space.smallest])[0, costs.metrics.index("params")]
    np.testing.assert_allclose(asked.usage_of(rows_NS), bare / 1e6)
    assert asked.usage_of(rows_NS[:0]).shape == (0, 1) and asked.usage([]).shape == (0, 1)


def test_reference_costs_are_shares_of_the_dearest() -> None:
    asked = problem(tier("t", params=50.0, latency_ms=5.0))
    archs = [Arch("toy", (2, 2, 2, 2)), Arch("toy", (0, 0, 0, 0))]
    np.testing.assert_allclose(asked.reference_costs(archs), [[1.0], [1 / 9]])


def test_the_dearest_is_the_space_s_largest_which_nobody_draws() -> None:
    space = MBConvSpace((3, 16, 16), 5, MBConvSettings(blockwise=True))
    costs = {"cpu": SpaceCosts(space, None)}
    for seed in range(2):
        evaluator = TabularEvaluator(ROWS, MS)
        asked = SearchProblem(space, costs, (tier("t", flops=1e9),), evaluator, 1, seed=seed)
        np.testing.assert_allclose(asked.reference_costs([space.largest]), [[1.0]])


@pytest.mark.parametrize(
    ("tiers", "kwargs", "message"),
    [
        (
            (tier("t", "tpu", latency_ms=1.0),),
            {},
            "tpu/t: no cost table for device 'tpu'; there are: cpu, gpu",
        ),
        ((tier("t", "gpu", params=1.0),), {}, "gpu/t: unknown metric 'params'; there are: latency_ms"),
        ((tier("t"),), {}, "cpu/t: has no limit"),
        ((), {"evaluations": 0}, "evaluations must be at least 1, got 0"),
    ],
)
def test_a_problem_that_cannot_be_searched_is_refused(tiers: Any, kwargs: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        problem(*tiers, **kwargs)


def test_band_members_keep_the_budget_and_use_it() -> None:
    asked = problem(tier("s", latency_ms=4.0), tier("l", latency_ms=7.0))
    drawn = BandSampler(asked, low=0.8, least=4).draw(50, np.random.default_rng(0))
    usage = asked.usage(asked.archs(drawn))
    for k in range(2):
        assert (usage[k::2, k] <= 1).all() and (usage[k::2, k] >= 0.8).all()


def test_a_thin_band_is_widened_and_an_empty_one_is_infeasible() -> None:
    """Four networks take 2 ms and one takes 1 ms, which is below the band."""
    asked = problem(tier("s", latency_ms=2.0))
    usage = asked.usage_of(BandSampler(asked).members_KNS[0])
    assert sorted(usage[:, 0].tolist()) == [0.5, 1.0, 1.0, 1.0, 1.0]
    with pytest.raises(InfeasibleBudget, match="cpu/s: .*the nearest takes 2 times as much"):
        BandSampler(problem(tier("s", latency_ms=0.5)))


def test_the_walk_finds_bands_that_the_pool_misses() -> None:
    sizes, rng = (4,) * 12, np.random.default_rng(0)
    weights = rng.uniform(1, 2, (12, 4)) * [1, 4, 9, 16]

    class Additive:
        metrics = ("latency_ms",)
        additive = weights[None]

        def of(self, archs: Sequence[Arch]) -> FloatArray:
            rows = np.array([arch.choices for arch in archs])
            return np.asarray(weights[np.arange(12), rows].sum(axis=1)[:, None])

    space = TableSpace("deep", [Slot(str(i), tuple("abcd")) for i in range(12)])
    limit = 1.6 * float(weights.min(axis=1).sum())
    table = Additive()
    asked = SearchProblem(
        space, {"cpu": table}, (tier("t", latency_ms=limit),), TabularEvaluator(ROWS, MS), 1
    )
    pool = rng.integers(0, sizes, (500, 12))
    assert (asked.usage(asked.archs(pool)) > 1).all()
    members = BandSampler(asked, pool_size=500).members_KNS[0]
    usage = asked.usage(asked.archs(members))
    assert len(members) > 2 * 32 and usage.max() <= 1 and usage.min() >= 0.8
    assert asked.reference_costs(asked.archs(members)).max() < 1


def test_a_band_holds_no_network_twice() -> None:
    space = MBConvSpace((3, 16, 16), 5, MBConvSettings(blockwise=True, operations=("k3e1", "k5e3")))
    costs = SpaceCosts(space, None)
    budget = float(costs.of([space.largest])[0, costs.metrics.index("flops")]) / 8
    evaluator = TabularEvaluator(ROWS, MS)
    asked = SearchProblem(space, {"cpu": costs}, (tier("t", flops=budget),), evaluator, 1)
    members = BandSampler(asked, low=0.1, pool_size=2000).members_KNS[0]
    assert len(members) > 32 and len(np.unique(members, axis=0)) == len(members)
    np.testing.assert_array_equal(asked.canonical(members), members)


@pytest.mark.parametrize("memory_batch", [None, 1])
def test_usage_is_the_same_by_rows_and_by_architectures(memory_batch: int | None) -> None:
    space = MBConvSpace((3, 16, 16), 5, MBConvSettings(blockwise=True))
    costs = SpaceCosts(space, None, memory_batch)

    class OneByOne:
        metrics, additive = costs.metrics, None

        def of(self, archs: Sequence[Arch]) -> FloatArray:
            return costs.of(archs)

    rng = np.random.default_rng(0)
    rows = np.stack([rng.integers(len(slot.choices), size=20) for slot in space.slots], axis=1)
    limits = {"flops": 2e6, "params": 5e4} | ({} if memory_batch is None else {costs.metrics[-1]: 1e5})
    tiers = (tier("s", flops=1e6), tier("l", **limits))
    tables: list[CostTable] = [costs, OneByOne()]
    evaluator = TabularEvaluator(ROWS, MS)
    quick, slow = (SearchProblem(space, {"cpu": table}, tiers, evaluator, 1) for table in tables)
    np.testing.assert_array_equal(quick.usage_of(rows), slow.usage_of(rows))
    tier_N = np.arange(20) % 2
    for asked in (quick, slow):
        own_N = asked.usage_of(rows)[np.arange(20), tier_N]
        np.testing.assert_array_equal(asked.usage_in(rows, tier_N), own_N)
        np.testing.assert_array_equal(asked.usage_in(rows, 0 * tier_N), asked.usage_of(rows)[:, 0])
    np.testing.assert_array_equal(quick.canonical(rows), slow.canonical(rows))


def test_warm_up_comes_first_and_each_iteration_trains_then_evaluates_on_one_step() -> None:
    """As many steps as the learning rate is laid out for: repeats in an iteration are asked about once, and
    what they leave over is spent without training."""
    learner = Learner()
    search(problem(evaluator=learner, warm_up=3, fit_samples=2, evaluations=16))
    assert learner.log[:4] == [("fit", 0, 2), ("fit", 1, 2), ("fit", 2, 2), ("fit", 3, 2)]
    kinds = [(kind, step) for kind, step, _ in learner.log[3:]]
    assert kinds == [("fit", 3), ("losses", 3), ("fit", 4), ("losses", 4), ("losses", 5)]
    assert sum(num for kind, _, num in learner.log if kind == "losses") == 16


def test_an_answer_that_cannot_change_is_asked_for_once() -> None:
    result = search(problem(evaluations=81))
    assert all(candidate.evaluations == 1 for candidate in result.candidates)
    assert len(result.candidates) == result.evaluations <= 81


def test_noisy_answers_are_asked_for_again_and_the_last_is_kept() -> None:
    evaluator = TabularEvaluator(ROWS, -MS, noise_std=1.0)
    result = search(problem(evaluator=evaluator, evaluations=200))
    assert sum(candidate.evaluations for candidate in result.candidates) == result.evaluations == 200


def test_a_loss_that_is_not_a_number_names_the_step_and_the_architecture() -> None:
    losses = np.where(MS == 7.0, math.nan, -MS)
    with pytest.raises(DivergedTraining, match=r"search step 0: loss of toy\[\d, \d, \d, \d\] is nan"):
        search(problem(tier("t", latency_ms=7.0), evaluator=TabularEvaluator(ROWS, losses)))


def test_a_checkpoint_of_another_search_is_refused() -> None:
    class Stale(NoCheckpoint):
        def load(self) -> Any:
            return {}, {"inputs": "other", "method": "asng"}

    with pytest.raises(StaleArtifact, match=r"another search \(asng\) than random"):
        search(problem(), checkpoint=Stale())


@pytest.mark.parametrize("method", ["random", "importance"])
def test_a_checkpoint_of_a_search_over_other_costs_is_refused(method: str) -> None:
    kept: list[Any] = []

    class Keeping(NoCheckpoint):
        def save(self, arrays: Any, record: Any) -> None:
            kept.append((arrays, record))

        def load(self) -> Any:
            return kept[0] if kept else None

    search(problem(made_from={"costs": "a"}, save_every_s=0.0), method, checkpoint=Keeping())
    search(problem(made_from={"costs": "a"}), method, checkpoint=Keeping())
    with pytest.raises(StaleArtifact):
        search(problem(made_from={"costs": "b"}), method, checkpoint=Keeping())


def test_an_architecture_of_another_space_has_no_usage() -> None:
    with pytest.raises(ConfigError):
        problem().usage([Arch("other", (0, 0, 0, 0))])
    with pytest.raises(ConfigError):
        problem().usage([Arch("toy", (0, 0)), Arch("toy", (0, 0))])


def test_checkpoints_come_when_they_are_due() -> None:
    saved: list[int] = []

    class Counting(NoCheckpoint):
        def save(self, arrays: Any, record: Any) -> None:
            saved.append(record["iteration"])

    search(problem(save_every_s=0.0), checkpoint=Counting())
    assert saved[:-1] == list(range(1, len(saved)))
    saved.clear()
    search(problem(save_every_s=1e9), checkpoint=Counting())
    assert len(saved) == 1


def test_settings_refuse_what_they_do_not_know() -> None:
    with pytest.raises(ValueError):
        Random(samples=3)  # type: ignore[call-arg]
