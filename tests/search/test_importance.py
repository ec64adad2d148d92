"""The two guides of `importance`, and what it is on one tier."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.algorithms import categorical
from pipeline.errors import ConfigError
from pipeline.evaluators.tabular import TableSpace, TabularCosts, TabularEvaluator, load_benchmark
from pipeline.progress import NoCheckpoint, Silent
from pipeline.search import METHODS, guided
from pipeline.search.asng import own_only
from pipeline.search.importance import Importance, StepSettings, mixture_of, weighted_sampler
from pipeline.search.problem import SearchProblem
from pipeline.settings import Settings, parse_settings
from pipeline.types import Json, Limit, SearchResult, Slot, Tier

NB201 = Path(__file__).parents[2] / "../shared/data/nb201_cifar10.npz"
NUM_SLOTS, NUM_CHOICES = 7, 3
ROWS = np.indices((NUM_CHOICES,) * NUM_SLOTS).reshape(NUM_SLOTS, -1).T


def toy(num_tiers: int, seed: int, evaluations: int, noise: float = 0.0) -> SearchProblem:
    """Additive latencies and additive merits that mostly, not always, go with them."""
    rng = np.random.default_rng([seed, 77])
    ms = np.cumsum(rng.uniform(0.2, 1.0, (NUM_SLOTS, NUM_CHOICES)), axis=1)
    merit = np.sqrt(ms) + rng.normal(0, 0.4, ms.shape)
    ms_R, merit_R = (table[np.arange(NUM_SLOTS), ROWS].sum(axis=1) for table in (ms, merit))
    shares = np.linspace(0.15, 0.7, num_tiers)
    tiers = [
        Tier("cpu", f"t{k}", (Limit("latency_ms", float(np.quantile(ms_R, q)), False, ""),))
        for k, q in enumerate(shares)
    ]
    slots = [Slot(str(i), ("a", "b", "c")) for i in range(NUM_SLOTS)]
    evaluator = TabularEvaluator(ROWS, -merit_R, noise, seed)
    costs = {"cpu": TabularCosts(ROWS, {"latency_ms": ms_R})}
    return SearchProblem(TableSpace("toy", slots), costs, tuple(tiers), evaluator, evaluations, seed=seed)


def search(
    problem: SearchProblem, config: Settings, method: str = "importance", trace: Any = None
) -> SearchResult:
    return METHODS[method].run(
        problem, config, checkpoint=NoCheckpoint(), trace=trace or (lambda record: None), progress=Silent()
    )


def regret(problem: SearchProblem, result: SearchResult) -> float:
    """Mean over tiers of the best loss that keeps the budget against the best found."""
    everything = problem.archs(ROWS)
    losses = problem.evaluator.losses(everything, step=0, thorough=True)[:, 0]
    best = np.where(problem.usage(everything) <= 1, losses[:, None], np.inf).min(axis=0)
    found = [candidate.arch for candidate in result.candidates]
    found_losses = problem.evaluator.losses(found, step=0, thorough=True)
    return float((np.where(problem.usage(found) <= 1, found_losses, np.inf).min(axis=0) - best).mean())


def mean_regret(method: str, config: Settings, evaluations: int, noise: float = 0.0) -> float:
    problems = [toy(3, seed, evaluations, noise) for seed in range(5)]
    return float(np.mean([regret(problem, search(problem, config, method)) for problem in problems]))


def test_on_one_tier_the_weighted_step_is_asng_s() -> None:
    problem, config, rng = toy(1, 0, 100), StepSettings(), np.random.default_rng(0)
    shared = weighted_sampler(problem, config, mixture_of)
    single = weighted_sampler(problem, config, own_only)
    state = shared.init()
    for _ in range(10):
        rows = shared.ask(state, rng)
        archs = problem.archs(rows)
        told = rows, problem.evaluator.losses(archs, step=0)[:, 0], problem.usage(archs), rng
        ours, theirs = shared.tell(state, *told), single.tell(state, *told)
        for left, right in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(left, right)
        assert not np.array_equal(ours.theta_KSC, state.theta_KSC)
        state = ours


def test_pressure_rises_over_budget_and_falls_below() -> None:
    problem = toy(2, 0, 100)
    sampler = weighted_sampler(problem, StepSettings(), mixture_of)
    state, rng = sampler.init(), np.random.default_rng(0)
    rows = sampler.ask(state, rng)
    usage = np.tile([2.0, 0.5], (len(rows), 1))
    moved = sampler.tell(state, rows, np.arange(len(rows), dtype=float), usage, rng)
    assert moved.pressure_K[0] > state.pressure_K[0] > moved.pressure_K[1] >= 0


def test_coefficients_weigh_cost_against_loss() -> None:
    config = Importance(mode="coefficients", coefficients=(0.0, 100.0))
    problem = toy(2, 1, 1_500)
    theta = search(problem, config).theta_KSC
    assert theta is not None
    modes = problem.archs(theta.argmax(axis=2))
    cost = problem.reference_costs(modes)
    loss = problem.evaluator.losses(modes, step=0)[:, 0]
    assert cost[1, 1] < 0.7 * cost[0, 0] and loss[0] < loss[1]


def test_one_coefficient_per_tier() -> None:
    with pytest.raises(ConfigError, match=r"one number per tier \(2 tiers\), got 3"):
        search(toy(2, 0, 10), Importance(mode="coefficients", coefficients=(1.0, 2.0, 3.0)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"coefficients": [1.0]}, "no effect with 'mode: budgets'"),
        ({"mode": "coefficients", "guide": "surrogate"}, "use 'guide: weights'"),
        ({"surrogate": {"scouts": 1}}, "unknown key 'surrogate.scouts'"),
        ({"weights": {"delta": 1.0}}, "unknown key 'weights.delta'.*did you mean 'delta0'"),
    ],
)
def test_settings_without_sense_are_refused(values: Json, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_settings(Importance, values, "run.yaml")


@pytest.mark.parametrize("guide", ["surrogate", "weights"])
def test_the_trace_has_a_record_per_iteration_and_tier(guide: Any) -> None:
    records: list[Json] = []
    search(toy(3, 0, 60), Importance(guide=guide), trace=records.append)
    assert [record["iteration"] for record in records] == list(range(len(records)))
    assert records[-1]["evaluations"] == 60
    told = [record for record in records if "tiers" in record]
    assert len(told) >= len(records) - 1
    for entry in told[-1]["tiers"]:
        assert {"tier", "usage", "loss", "entropy", "effective_sample_size"} <= set(entry)
        assert 0 <= entry["entropy"] <= 1 and entry["usage"] > 0 and entry["effective_sample_size"] >= 0.99
    json.dumps(records, allow_nan=False)


def test_distributions_of_the_result_are_distributions() -> None:
    theta = search(toy(3, 0, 120), Importance()).theta_KSC
    assert theta is not None and theta.shape == (3, NUM_SLOTS, NUM_CHOICES)
    np.testing.assert_allclose(theta.sum(axis=2), 1.0)
    assert (theta > 0).all() and categorical.entropy(theta).max() < 0.95


@pytest.mark.parametrize("within", [True, False])
def test_asng_evaluates_nothing_over_its_budget_unless_told_to(within: bool) -> None:
    problem = toy(3, 0, 120)
    config = parse_settings(METHODS["asng"].config, {"within_budget": within}, "run.yaml")
    asked: list[float] = []

    class Noting(TabularEvaluator):
        def losses(self, archs: Any, *, step: int, thorough: bool = False) -> Any:
            asked.extend(problem.usage(archs).min(axis=1).tolist())
            return super().losses(archs, step=step, thorough=thorough)

    noting = Noting(ROWS, problem.evaluator.losses(problem.archs(ROWS), step=0)[:, 0], 0.0, 0)
    search(replace(problem, evaluator=noting), config, "asng")
    assert (max(asked) <= 1) == within, "the largest tier's budget"


def test_with_a_surrogate_it_beats_independent_runs_and_chance_at_a_third_of_their_evaluations() -> None:
    ours = mean_regret("importance", Importance(), 40)
    assert ours < mean_regret("asng", METHODS["asng"].config(), 120)
    assert ours < mean_regret("random", METHODS["random"].config(), 120)
    assert ours < 0.05


def test_with_weights_it_beats_independent_runs_as_published() -> None:
    config, independent = Importance(guide="weights"), METHODS["asng"].config(within_budget=False)
    assert mean_regret("importance", config, 300) < mean_regret("asng", independent, 300)


def test_noise_does_not_lead_it_astray() -> None:
    assert mean_regret("importance", Importance(), 240, noise=0.5) < 0.15


@pytest.mark.parametrize("noise", [0.5, 0.0])
def test_what_answered_best_is_asked_again_where_answers_are_noisy(noise: float) -> None:
    """Before `confirm_every` none is asked for twice, but by chance among the first, drawn at random."""
    config = parse_settings(Importance, {"surrogate": {"confirm_every": 60}}, "test")

    def asked_again(evaluations: int) -> int:
        result = search(toy(3, 0, evaluations, noise), config)
        return sum(candidate.evaluations - 1 for candidate in result.candidates)

    num = 3 * (2 if noise else 1)
    drawn = num * math.ceil(config.surrogate.first_evaluations / num)
    assert asked_again(60) == asked_again(drawn)
    rounds_after = (150 - 60) / num
    again = asked_again(150) - asked_again(60)
    assert again >= rounds_after if noise else again == 0


@pytest.mark.parametrize(("trains", "in_search"), [(False, True), (True, False), (True, True)])
@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_a_tier_has_one_sample_where_answers_are_fixed_and_two_elsewhere(
    noise: float, trains: bool, in_search: bool
) -> None:
    """Answers of a supernet are fixed once it learns no more, as noisy as they are."""

    class Learner(TabularEvaluator):
        trains = True

    kind = Learner if trains else TabularEvaluator
    evaluator = kind(ROWS, np.arange(float(len(ROWS))), noise, 0)
    problem = replace(toy(3, 0, 60), evaluator=evaluator, train_in_search=in_search)
    sampler, _ = guided.sampler(problem, Importance().surrogate)
    fixed = not in_search or not (trains or noise)
    assert len(sampler.ask(sampler.init(), np.random.default_rng(0))) == (3 if fixed else 6)


def test_the_two_best_are_asked_again_until_they_have_answered_often_enough() -> None:
    """Of 22 evaluations 1 + 22 / 20 answers are wanted, more than two, so they are asked twice."""
    problem = toy(1, 0, 600, noise=0.5)
    config = parse_settings(Importance, {"surrogate": {"confirm_every": 20}}, "test")
    sampler, _ = guided.sampler(problem, config.surrogate)
    rng, state, answers = np.random.default_rng(0), sampler.init(), dict[tuple[int, ...], float]()
    asked: list[list[tuple[int, ...]]] = []
    for _ in range(13):
        rows = sampler.ask(state, rng)
        asked.append([tuple(row) for row in rows.tolist()])
        losses = np.array([answers.setdefault(row, float(len(answers))) for row in asked[-1]])
        state = sampler.tell(state, rows, losses, problem.usage_of(rows), rng)
    best = sorted(answers, key=answers.__getitem__)[:2]
    first = {row for rows in asked[:10] for row in rows}
    assert asked[0] == best and len(first) == 20
    assert set(asked[10]) == set(asked[11]) == set(best)
    assert not first & set(asked[12]), "new ones"


def test_few_remembered_evaluations_are_believed_all_the_same() -> None:
    """`first_evaluations` counts all that were made, also those that are no longer remembered."""
    problem = toy(2, 0, 100)
    config = parse_settings(Importance, {"surrogate": {"memory": 16, "first_evaluations": 20}}, "run.yaml")
    theta_KSC = search(problem, config).theta_KSC
    assert theta_KSC is not None and theta_KSC.max(axis=2).mean() > 0.6, "it has learnt"


def test_a_single_evaluation_at_a_time_says_nothing_of_a_supernet_that_learns() -> None:
    class Learner(TabularEvaluator):
        trains = True

    problem = replace(toy(1, 0, 40), evaluator=Learner(ROWS, np.arange(float(len(ROWS)))))
    config = parse_settings(Importance, {"surrogate": {"samples_per_tier": 1}}, "run.yaml")
    with pytest.raises(ConfigError, match=r"surrogate\.samples_per_tier must be 2 or more"):
        search(problem, config)


def test_no_tier_asks_for_what_another_has_just_asked_for() -> None:
    """Two tiers of one budget: what is best for one is best for the other."""
    two = toy(2, 0, 600)
    problem = replace(two, tiers=(two.tiers[1], replace(two.tiers[1], name="twin")))
    config = parse_settings(Importance, {"surrogate": {"samples_per_tier": 24}}, "test")
    sampler, _ = guided.sampler(problem, config.surrogate)
    rng, state = np.random.default_rng(0), sampler.init()
    for iteration in range(3):
        rows = sampler.ask(state, rng)
        assert len(rows) == 48 and (iteration == 0 or len(set(map(tuple, rows.tolist()))) == 48)
        losses = problem.evaluator.losses(problem.archs(rows), step=iteration)[:, 0]
        state = sampler.tell(state, rows, losses, problem.usage_of(rows), rng)


@pytest.mark.skipif(not NB201.exists(), reason="the NAS-Bench-201 table is not at ../shared/data")
def test_on_nas_bench_201_it_beats_independent_runs() -> None:
    table = load_benchmark(NB201)
    tiers = tuple(
        Tier("any", str(q), (Limit("macs_M", float(np.quantile(table.cost_R, q)), False, ""),))
        for q in (0.1, 0.5, 0.95)
    )
    row = {tuple(choices): r for r, choices in enumerate(table.choices_RS.tolist())}

    def truth(method: str, seed: int) -> float:
        problem = SearchProblem(table.space, {"any": table.costs}, tiers, table.evaluator, 90, seed=seed)
        result = search(problem, METHODS[method].config(), method)
        rows = np.array([row[candidate.arch.choices] for candidate in result.candidates])
        fits = problem.usage([candidate.arch for candidate in result.candidates]) <= 1
        signal_NK = np.where(fits, table.signal_R[rows][:, None], -np.inf)
        return float(table.truth_R[rows[signal_NK.argmax(axis=0)]].mean())

    seeds = range(6)
    assert np.mean([truth("importance", s) for s in seeds]) > np.mean([truth("asng", s) for s in seeds])
