"""Landscapes against brute force, and both scripts end to end at a tiny size."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import search_judging, search_methods, search_runs, search_synthetic, search_tabular
from benchmarks.search_methods import CONTESTANTS, OURS, Contestant, Oracle, Recording, Spent
from benchmarks.search_synthetic import NUM_CHOICES, Landscape, contest, landscape
from pipeline.errors import StaleArtifact
from pipeline.search.problem import SearchProblem

EVERY = np.array(list(itertools.product(range(NUM_CHOICES), repeat=5)))


@pytest.mark.parametrize("interaction", [0.0, 1.0])
def test_dynamic_programming_finds_what_brute_force_finds(interaction: float) -> None:
    ground = landscape(5, interaction, seed=3)
    quality_N, cost_N = ground.quality(EVERY), ground.cost(EVERY)
    best_B = ground.best_by_cost()
    for cost in np.unique(cost_N):
        assert best_B[cost] == pytest.approx(quality_N[cost_N == cost].max())
    assert np.isfinite(best_B).sum() == len(np.unique(cost_N))
    assert search_synthetic._worst(ground) == pytest.approx(quality_N.min())


def test_interactions_are_what_is_left_after_the_sum_of_merits() -> None:
    ground = landscape(12, 1.0, seed=0)
    rows = np.random.default_rng(0).integers(0, NUM_CHOICES, size=(20_000, 12))
    merits = Landscape(ground.cost_SC, ground.merit_SC, np.zeros_like(ground.pair_LCC), ground.order_S)
    share = merits.quality(rows).var() / ground.quality(rows).var()
    assert ground.quality(rows).std() == pytest.approx(1.0, abs=0.05) and 0.3 < share < 0.7
    additive = landscape(12, 0.0, seed=0)
    assert 0.3 < np.corrcoef(additive.quality(rows), additive.cost(rows))[0, 1] < 0.9


def test_a_contest_knows_its_optimum() -> None:
    found = contest(5, 1.0, 0.0, seed=1)
    usage = found.usage(EVERY)
    quality = found.qualities["truth"]
    values = quality.of(EVERY)
    best = [values[usage[:, k] <= 1].max() for k in range(len(found.tiers))]
    np.testing.assert_allclose(quality.best_K, best)


def test_noise_is_the_seed_s_own_and_fresh_at_every_step() -> None:
    found = contest(5, 0.0, 0.5, seed=1)
    archs = found.problem(found.evaluator(0), 10, 0).archs(EVERY[:50])
    one, other = found.evaluator(0), found.evaluator(1)
    first = one.losses(archs, step=0)
    np.testing.assert_array_equal(first, one.losses(archs, step=0))
    assert not np.allclose(first, one.losses(archs, step=1))
    assert not np.allclose(first, other.losses(archs, step=0))
    exact = one.losses(archs, step=0, thorough=True)
    np.testing.assert_allclose(exact[:, 0], -found.qualities["truth"].of(EVERY[:50]))
    assert 0.3 < (first - exact).std() < 0.7


def problem(evaluations: int, noise: float = 0.0) -> tuple[SearchProblem, Recording]:
    found = contest(6, 1.0, noise, seed=2)
    recording = Recording(found.evaluator(2))
    return found.problem(recording, evaluations, 2), recording


def test_an_oracle_counts_a_network_once_where_answers_are_fixed() -> None:
    asked, recording = problem(2)
    oracle = Oracle(asked)
    assert oracle.loss([0] * 6) == oracle.loss([0] * 6)
    oracle.loss([1] * 6)
    with pytest.raises(Spent):
        oracle.loss([2] * 6)
    assert len(recording.asked) == 2


def test_an_oracle_counts_every_noisy_answer() -> None:
    oracle = Oracle(problem(2, noise=1.0)[0])
    assert oracle.loss([0] * 6) != oracle.loss([0] * 6)
    with pytest.raises(Spent):
        oracle.loss([0] * 6)


def test_an_oracle_ends_a_peer_that_has_converged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search_methods, "IDLE_LIMIT", 3)
    oracle = Oracle(problem(9)[0])
    oracle.loss([0] * 6)
    with pytest.raises(Spent):
        for _ in range(3):
            oracle.loss([0] * 6)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", CONTESTANTS)
def test_every_method_spends_its_evaluations_and_finds_something_good(name: str) -> None:
    asked, recording = problem(60)
    CONTESTANTS[name].run(asked)
    assert 40 <= len(recording.asked) <= 60 and len(recording.asked) == len(recording.answers)
    assert len(set(recording.asked)) == len(recording.asked), "answers are fixed: none is paid for twice"
    usage = asked.usage(recording.asked)
    assert (usage.min(axis=1) <= 1).mean() > 0.5


@pytest.mark.parametrize("name", ["nsga2 (pymoo)", "nsga2 (optuna)", "tpe (optuna)", "catcma (cmaes)"])
def test_peers_are_reproducible(name: str) -> None:
    (first, one), (second, other) = problem(30), problem(30)
    CONTESTANTS[name].run(first)
    CONTESTANTS[name].run(second)
    assert one.asked == other.asked


# --------------------------------------------------------------------------------------------------- scripts


def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (search_judging, search_runs):
        monkeypatch.setattr(module, "COUNTS", (10, 20, 30))


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, script: Any, *words: str) -> dict[str, Any]:
    name = script.__name__.rpartition(".")[2]
    small(monkeypatch)
    files = ["--json", str(folder / "found.json"), "--seeds", "2"]
    monkeypatch.setattr("sys.argv", [name, *files, "--methods", f"{OURS},asng per tier,random", *words])
    script.main()
    found: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return found


def test_the_synthetic_script_searches_every_seed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--slots", "5", "--kinds", "additive")
    found = run(monkeypatch, tmp_path, search_synthetic, *words)
    methods = found["numbers"]["additive-5"]["methods"]
    assert set(methods) == {OURS, "asng per tier", "random"} and found["seeds"] == [1000, 1001]
    assert len(methods["random"]["truth by answers"]["p_importance_is_lower"]) == 3
    assert (tmp_path / "found-additive-5.png").exists()
    assert "| hypervolume |" in capsys.readouterr().out

    def refuse(problem: SearchProblem) -> None:
        raise AssertionError("searched again")

    done = {name: Contestant(refuse, one.settings, one.factor) for name, one in CONTESTANTS.items()}
    monkeypatch.setattr(search_runs, "CONTESTANTS", done)
    monkeypatch.setattr(search_runs, "judge", refuse)
    again = run(monkeypatch, tmp_path, search_synthetic, *words)
    assert again["numbers"] == found["numbers"]
    changed = {name: Contestant(refuse, {"other": 1}, one.factor) for name, one in CONTESTANTS.items()}
    monkeypatch.setattr(search_runs, "CONTESTANTS", changed)
    with pytest.raises(StaleArtifact, match="another settings"):
        run(monkeypatch, tmp_path, search_synthetic, *words)


def test_the_tabular_script_takes_any_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ops = np.array(list(itertools.product(range(3), repeat=4)))
    rng = np.random.default_rng(0)
    np.savez(
        tmp_path / "table.npz",
        allow_pickle=False,
        ops=ops,
        op_names=np.array(["a", "b", "c"]),
        quick=ops.sum(axis=1) + rng.normal(0, 0.1, len(ops)),
        final=ops.sum(axis=1).astype(float),
        ms=1.0 + ops @ [1.0, 2.0, 3.0, 4.0],
    )
    columns = "--signal quick --truth final --cost ms --noise 0.2".split()
    found = run(monkeypatch, tmp_path, search_tabular, "--table", str(tmp_path / "table.npz"), *columns)
    record = found["numbers"]["table"]
    assert record["identity"]["signal"] == "quick" and record["floor"] >= 0
    random = record["methods"]["random"]
    assert {"truth by answers", "truth by model", "signal by answers", "signal by model"} <= set(random)
    regret = random["signal by answers"]["regret"]
    assert regret[0] >= regret[-1] >= 0
