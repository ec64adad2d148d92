from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import rivals
from benchmarks.rivals import (
    BAND,
    Entrant,
    Gym,
    comparable_recipe,
    compare,
    comparison_table,
    comparison_targets,
    first_that_keep,
    random_members,
    train_all,
    uniform_members,
)
from pipeline.artifacts import RunFolder, sha256_json, write_json
from pipeline.config import parse
from pipeline.costs.counts import flops
from pipeline.derive import Finalist, Trial
from pipeline.progress import Silent
from pipeline.run import Run
from pipeline.spaces.mbconv import MBConvSettings, MBConvSpace
from pipeline.stages.records import search_path
from pipeline.train.recipe import Distil, Recipe
from pipeline.types import Arch, FloatArray, Limit, Tier

Json = dict[str, Any]
SPACE = MBConvSpace((1, 8, 8), 10, MBConvSettings(size="tiny"))
BUDGET = 1_000_000
TIER = Tier("cpu", "s", (Limit("latency_ms", 0.1, False, "0.1 ms"),))


def usage(archs: Sequence[Arch]) -> FloatArray:
    return np.array([flops(SPACE.layers(arch)) / BUDGET for arch in archs])


# --------------------------------------------------------------------------------------------------- choosing


def test_random_members_are_of_the_band_distinct_and_repeatable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rivals, "DRAWS", 20_000)
    found = list(random_members(SPACE, usage, np.random.default_rng(0)))
    assert len(set(found)) == len(found) > 10
    assert all(BAND <= use <= 1 for use in usage(found))
    again = random_members(SPACE, usage, np.random.default_rng(0))
    assert [next(again) for _ in range(3)] == found[:3]
    other = random_members(SPACE, usage, np.random.default_rng(1))
    assert [next(other) for _ in range(3)] != found[:3]


def test_a_band_that_nothing_is_in_ends_the_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rivals, "DRAWS", 4_000)
    members = random_members(SPACE, lambda archs: np.zeros(len(archs)), np.random.default_rng(0))
    assert list(members) == []


def test_uniform_members_come_nearest_to_the_budget_first() -> None:
    uses = usage(list(uniform_members(SPACE, usage)))
    assert len(uses) > 2 and (uses <= 1).all()
    assert (np.diff(uses) <= 0).all()
    every = usage(list(SPACE.uniform()))
    assert uses[0] == every[every <= 1].max()


def archs(count: int) -> list[Arch]:
    return [Arch("toy", (index,)) for index in range(count)]


def test_the_first_that_keep_the_budget_in_order() -> None:
    lots: list[int] = []

    def latencies_ms(lot: Sequence[Arch]) -> list[float]:
        lots.append(len(lot))
        return [0.9 if arch.choices[0] % 3 == 0 else 1.1 for arch in lot]

    kept = first_that_keep(archs(100), 3, latencies_ms, budget_ms=1.0)
    assert [(arch.choices[0], ms) for arch, ms in kept] == [(0, 0.9), (3, 0.9), (6, 0.9)]
    assert sum(lots) < 20


def test_a_network_at_its_budget_keeps_it() -> None:
    assert len(first_that_keep(archs(1), 1, lambda lot: [1.0], budget_ms=1.0)) == 1


def test_fewer_are_taken_where_there_are_no_more() -> None:
    asked: list[Arch] = []

    def source() -> Iterator[Arch]:
        for arch in archs(5):
            asked.append(arch)
            yield arch

    assert first_that_keep(source(), 3, lambda lot: [2.0] * len(lot), budget_ms=1.0) == []
    assert asked == archs(5)


def test_entrants_come_back_from_json() -> None:
    for entrant in (
        Entrant("random", 0.1, Arch("mbconv", (1, 2))),
        Entrant("MobileNetV2-like", 0.2, width=0.5),
    ):
        assert Entrant.from_json(entrant.to_json()) == entrant


def test_widths_that_round_to_one_network_share_its_training() -> None:
    one, alike, other = (Entrant("MobileNetV2-like", 0.1, width=width) for width in (1.0, 1.001, 1.5))
    assert one.key(SPACE) == alike.key(SPACE) != other.key(SPACE)


# --------------------------------------------------------------------------------------------------- training


def test_the_recipe_is_one_that_everybody_can_have() -> None:
    recipe = Recipe(epochs=7, start="supernet", distil=Distil(), lr=0.05)
    assert comparable_recipe(recipe, None) == Recipe(epochs=7, lr=0.05)
    assert comparable_recipe(recipe, 3).epochs == 3
    assert comparable_recipe(Recipe(), None) == Recipe()


@pytest.fixture
def run(tmp_path: Path) -> Run:
    wanted = {
        "data": {"name": "digits", "limit": 100},
        "profiles": ["params"],
        "space": {"name": "mbconv", "size": "tiny"},
        "retrain": {"epochs": 1, "batch_size": 16},
    }
    return Run(RunFolder(tmp_path / "run"), parse(wanted, "test"), Silent())


@pytest.fixture
def gym(run: Run, tmp_path: Path) -> Gym:
    return Gym(run, RunFolder(tmp_path / "work"), run.config.retrain)


def test_every_network_is_trained_once_and_remembered(
    gym: Gym, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = run.space.smallest
    entrants = {TIER: [Entrant("searched", 0.1, small), Entrant("uniform", 0.1, small)]}
    entrants[TIER].append(Entrant("MobileNetV2-like", 0.1, width=0.25))
    trained: list[str] = []
    train = Gym.train

    def watched(self: Gym, entrant: Entrant, seed: int, label: str) -> Json:
        trained.append(entrant.role)
        return train(self, entrant, seed, label)

    monkeypatch.setattr(Gym, "train", watched)
    monkeypatch.setattr("benchmarks.rivals.usable_cores", lambda: (0,))
    for _ in range(2):
        train_all(gym, entrants, [0])
    assert sorted(trained) == ["MobileNetV2-like", "uniform"]
    records = [gym.known(entrant, 0) for entrant in entrants[TIER]]
    assert records[0] == records[1] != records[2]
    assert all(record is not None and 0 < record["test"] <= 100 for record in records)
    assert gym.known(entrants[TIER][0], 1) is None


def test_the_searched_network_is_taken_from_the_run_only_under_the_same_recipe_and_seed(
    gym: Gym, run: Run, tmp_path: Path
) -> None:
    searched = Entrant("searched", 0.1, run.space.smallest)
    for name, record in (
        ("train", {"accuracy": 91.0, "seconds": 12.34}),
        ("export", {"accuracy": {"test": 0.9}}),
        ("measure", {"measured": {"params": 10, "flops": 20}}),
    ):
        gym.take_from_run(TIER, searched, seed=0)
        assert gym.known(searched, 0) is None, "the tier is not finished"
        run.folder.write_record(run.tier_path(TIER, f"{name}.json"), record, {})
    longer = Gym(run, gym.work, comparable_recipe(gym.recipe, 2))
    longer.take_from_run(TIER, searched, seed=0)
    gym.take_from_run(TIER, searched, seed=1)
    assert longer.known(searched, 0) is None and gym.known(searched, 1) is None
    gym.take_from_run(TIER, searched, seed=0)
    taken = gym.known(searched, 0)
    assert taken is not None
    assert (taken["architecture"], taken["test"], taken["from_run"]) == (91.0, 90.0, True)


# -------------------------------------------------------------------------------------------------- comparing


def member(role: str, architecture: float, test: float) -> Json:
    return {
        "role": role,
        "name": role,
        "use": 0.97,
        "params": 1000,
        "flops": 2000,
        "architecture": architecture,
        "test": test,
        "test_by_seed": [test],
    }


def test_the_first_seed_chooses_a_rivals_best(gym: Gym, run: Run) -> None:
    small, large = run.space.smallest, run.space.largest
    members = [Entrant("searched", 0.1, small), Entrant("random", 0.1, large), Entrant("random", 0.1, small)]
    for entrant, architecture in zip(members[1:], (60.0, 70.0), strict=True):
        record = {"architecture": architecture, "test": 100 - architecture}
        gym.work.write_record(gym.path(entrant, 0), record, gym._inputs(0))
    assert rivals.finalists(gym, members, 0) == [members[0], members[2]]


def test_margins_are_between_test_accuracies() -> None:
    members = [
        member("searched", 90.0, 89.0),
        member("random", 91.0, 88.0),
        member("random", 90.5, 92.0),
        member("uniform", 80.0, 89.5),
    ]
    result = compare(members, {"searched": members[0], "random": members[1], "uniform": members[3]})
    assert result["best"]["random"] is members[1]
    assert result["margins"] == {"random": 1.0, "uniform": -0.5, "MobileNetV2-like": None}
    assert result["intervals"] == dict.fromkeys(result["margins"])
    tiers = {"cpu/s": {"budget_ms": 0.1, "missing": {"MobileNetV2-like": "does not fit"}, **result}}
    assert {t.name: t.passed for t in comparison_targets(tiers)} == {
        "cpu/s: searched against random": True,
        "cpu/s: searched against uniform": False,
    }
    table = comparison_table(tiers)
    assert "| best of 2 random | 97.0 % |" in table and "| +1.00 |" in table and "| -0.50 |" in table
    assert "cpu/s: does not fit." in table and "| searched | " in table
    tiers["cpu/s"]["searched_origin"] = "uniform"
    assert "| searched, its uniform finalist | " in comparison_table(tiers)


def test_several_seeds_give_the_margin_an_interval() -> None:
    """Welch's by hand: standard errors 1/√3 each, four degrees of freedom, t = 2.776."""
    low, high = rivals.margin_interval([4.0, 5.0, 6.0], [1.0, 2.0, 3.0]) or (0.0, 0.0)
    assert (low, high) == pytest.approx((3 - 2.776 * (2 / 3) ** 0.5, 3 + 2.776 * (2 / 3) ** 0.5), abs=1e-3)
    assert rivals.margin_interval([4.0], [1.0, 2.0]) is None


def test_as_many_random_members_as_the_search_would_have_paid_for(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rivals, "usable_cores", lambda: [0, 1])
    other, inputs = replace(TIER, name="m"), {"x": sha256_json(1)}
    run.folder.write_record(search_path(run), {"seconds": 100.0}, inputs)
    for tier, derive_s, trained_s in ((TIER, 40.0, 120.0), (other, 200.0, 0.0)):
        arch = {"arch": run.space.smallest.to_json(), "seconds": derive_s, "trained_seconds": trained_s}
        run.folder.write_record(run.tier_path(tier, "arch.json"), arch, inputs)
        run.folder.write_record(run.tier_path(tier, "train.json"), {"seconds": 50.0, "epochs": 10}, inputs)
    run.__dict__["tiers"] = (TIER, other)
    assert rivals.paid_members(run, TIER, Recipe(epochs=10), 1) == 6, "trainings count as if on their own"
    assert rivals.paid_members(run, other, Recipe(epochs=10), 1) == 10
    assert rivals.paid_members(run, TIER, Recipe(epochs=5), 3) == 14
    assert rivals.paid_members(run, TIER, Recipe(epochs=1000), 1) == 3
    run.workers = 1
    assert rivals.paid_members(run, TIER, Recipe(epochs=10), 1) == 6, (
        "as the run trained, not as is asked now"
    )


def test_further_contenders_are_the_best_by_the_trials_and_keep_the_budget(run: Run) -> None:
    rng = np.random.default_rng(0)
    sizes = [len(slot.choices) for slot in run.space.slots]
    drawn = [Arch(run.space.name, tuple(int(rng.integers(n)) for n in sizes)) for _ in range(20)]
    archs = list(dict.fromkeys(map(run.space.canonical, drawn)))[:4]
    accuracies, shipped = (0.6, 0.9, 0.7, 0.8), (0.98, 0.98, 0.975, 1.01)
    trials = [
        Trial(Finalist(arch, 1.0, 0.98, "search"), 0.98, accuracy, use).to_json()
        for arch, accuracy, use in zip(archs, accuracies, shipped, strict=True)
    ]
    record = {"arch": archs[1].to_json(), "trials": trials}
    run.folder.write_record(run.tier_path(TIER, "arch.json"), record, {"x": sha256_json(1)})
    assert rivals.further_contenders(run, TIER, 1) == []
    [second] = rivals.further_contenders(run, TIER, 2)
    assert second.arch == archs[2] and second.role == "searched"
    assert second.latency_ms == pytest.approx(0.975 * TIER.budgets["latency_ms"])
    assert [e.arch for e in rivals.further_contenders(run, TIER, 9)] == [archs[2], archs[0]]


def test_where_the_searched_network_comes_from(run: Run) -> None:
    arch = run.space.smallest.to_json()
    other = run.space.largest.to_json()
    trials = [{"arch": other, "origin": "search"}, {"arch": arch, "origin": "uniform"}]
    record = {"arch": arch, "trials": trials}
    run.folder.write_record(run.tier_path(TIER, "arch.json"), record, {"x": sha256_json(1)})
    assert rivals.origin_of(run, TIER, arch) == "uniform" and rivals.origin_of(run, TIER, other) == "search"
    write_json(run.tier_path(TIER, "arch.json"), {"schema": 1, "inputs": {}, "arch": arch, "trials": []})
    assert rivals.origin_of(run, TIER, arch) is None
