"""benchmarks/search_one_shot.py: both sides are given the same, nothing is looked at but what was searched,
and how they are compared."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import yaml

from benchmarks import search_one_shot as bench
from benchmarks.search_one_shot import ASNG, TOGETHER, Course, Known
from benchmarks.throughput import ToyEvaluator
from pipeline.artifacts import RunFolder
from pipeline.config import read_config
from pipeline.errors import ConfigError
from pipeline.progress import Silent
from pipeline.types import Arch, FloatArray, Json

CONFIG: Json = {
    "data": {"name": "digits", "limit": 300},
    "profiles": [
        {
            "name": "counted",
            "provider": "none",
            "tiers": [
                {"name": "s", "limits": {"flops": "30 %"}},
                {"name": "l", "limits": {"flops": "80 %"}},
            ],
        }
    ],
    "space": {"name": "mbconv", "size": "tiny"},
    "evaluator": {"name": "one-shot", "batch_size": 8, "evaluation_images": 20, "thorough_images": 20},
    "search": {"warm_up": 2, "evaluations": 24, "fit_samples": 2},
    "retrain": {"epochs": 1, "batch_size": 32},
}


def seed_of(**changed: object) -> Json:
    numbers: Json = {
        "seed": 0,
        "seconds": 120.0,
        "found_after": 7,
        "found_seconds": 80.0,
        "seconds_alone": [60.0, 60.0],
        "tiers": [
            {"tier": "s", TOGETHER: 90.0, "alone": 91.0, "as_good_after": 30, "as_good_seconds": 90.0},
            {"tier": "l", TOGETHER: 93.0, "alone": 92.0, "as_good_after": None, "as_good_seconds": 110.0},
        ],
        "excess": {TOGETHER: {"8": 0.02, "16": 0.01}, ASNG: {"8": 0.3, "16": None, "48": 0.02}},
        "ranks": None,
    }
    return {**copy.deepcopy(numbers), **changed}


# ------------------------------------------------------------------------------------------------- searches


def course(losses: Sequence[float], usage: Sequence[Sequence[float]]) -> Course:
    archs = tuple(Arch("toy", (n,)) for n in range(len(losses)))
    return Course(archs, np.array(losses), np.array(usage))


COURSE = course([0.9, 0.2, 0.5, 0.4], [[0.5, 0.1], [1.2, 0.6], [0.9, 0.5], [1.0, 0.9]])


def test_a_course_looks_at_what_keeps_the_tier_s_budget() -> None:
    assert [COURSE.best(0), COURSE.best(0, 3), COURSE.best(0, 1), COURSE.best(1)] == [0.4, 0.5, 0.9, 0.2]
    assert COURSE.best(0, 0) == np.inf
    assert [arch.choices for arch in COURSE.leaders(0, 2)] == [(3,), (2,)]
    assert COURSE.first_as_good(0, 0.5) == 3 and COURSE.first_as_good(0, 0.3) is None
    assert COURSE.first_as_good(1, 0.5) == 2


def test_an_excess_is_above_the_best_of_all_arms_at_equal_evaluations() -> None:
    """Searches per tier have had half of the evaluations each, of two tiers."""
    per_tier = [course([0.8, 0.3, 0.1], [[0.5, 0.5]] * 3), course([0.6, 0.7, 0.5], [[0.5, 0.5]] * 3)]
    found = bench.excess({TOGETHER: [COURSE], ASNG: per_tier}, num_tiers=2, evaluations=4)
    floors = (0.1, 0.2)
    assert found[TOGETHER]["4"] == pytest.approx((0.4 - floors[0] + 0.2 - floors[1]) / 2)
    assert found[ASNG]["2"] == pytest.approx((0.8 - floors[0] + 0.6 - floors[1]) / 2)
    assert found[ASNG]["4"] == pytest.approx((0.3 - floors[0] + 0.6 - floors[1]) / 2)
    assert set(found[ASNG]) == {"1", "2", "4", "24"} and set(found[TOGETHER]) == {"1", "2", "4"}
    assert found[ASNG]["1"] is None, "a quarter of four leaves none for a tier"


def test_what_is_known_is_not_asked_again_and_always_on_the_same_images() -> None:
    asked: list[tuple[int, int]] = []

    class Noting(ToyEvaluator):
        def losses(self, archs: Sequence[Arch], *, step: int, thorough: bool = False) -> FloatArray:
            asked.extend((arch.choices[0], step) for arch in archs)
            return super().losses(archs, step=step)

    known = Known(Noting((3, 2), seed=0), step=7)
    one, other = Arch("toy", (0, 0, 0)), Arch("toy", (1, 0, 0))
    first = known.losses([one, other, one], step=0)
    again = known.losses([other], step=5)
    assert asked == [(0, 7), (1, 7)]
    assert first[1] == again[0] and first[0] == first[2] != first[1]


# -------------------------------------------------------------------------------------------------- judging


def test_seconds_of_a_search_that_never_came_are_of_all_its_evaluations() -> None:
    search = {"fit_seconds": 50.0, "seconds_per_evaluation": 0.5}
    assert bench.seconds_of(search, 20, 240) == 60 and bench.seconds_of(search, None, 240) == 170


def test_gain_is_a_mean_over_tiers_and_time_against_one_that_is_as_good() -> None:
    assert bench.gain(seed_of()) == pytest.approx(0)
    assert bench.wall_ratio(seed_of()) == pytest.approx(1.2)
    assert [target.passed for target in bench.targets_of([seed_of()])] == [True, True, True]
    shown = bench.table_of([seed_of()])
    assert (
        "| s | 90.00 | 91.00 | -1.00 | 30 | 90 |" in shown
        and "| l | 93.00 | 92.00 | +1.00 | > all |" in shown
    )
    assert "| asng per tier | 0.3000 | – | 0.0200 |" in shown
    assert (
        "it took 1.20 times as long, and until it had what it ends with, after 7 evaluations: 0.80." in shown
    )


def test_what_misses_its_target() -> None:
    slow = seed_of(seconds=140.0)
    worse = seed_of(tiers=[{**tier, "alone": 99.0} for tier in seed_of()["tiers"]])
    lacking = seed_of(tiers=[seed_of()["tiers"][0], {**seed_of()["tiers"][1], "alone": None}])
    unsure = seed_of(ranks={"thorough": {"rho": 0.3, "interval": (0, 1)}})
    for number, seed in enumerate([slow, worse, lacking, unsure]):
        passed = [target.passed for target in bench.targets_of([seed])]
        assert not passed[number], number
    assert bench.gain(lacking) == -1, "of the tiers that both have"
    nothing = seed_of(tiers=[{**tier, TOGETHER: None} for tier in seed_of()["tiers"]])
    assert [target.passed for target in bench.targets_of([nothing])] == [True, False, False]
    assert bench.table_of([nothing])


def test_tiers_of_a_seed_count_as_one() -> None:
    low, high = bench.mean_interval([0.0, 1.0, 2.0]) or (0, 0)
    assert (low, high) == pytest.approx((1 - 4.303 / 3**0.5, 1 + 4.303 / 3**0.5), abs=1e-3)
    assert bench.mean_interval([1.0]) is None


# --------------------------------------------------------------------------------------------------- script


@pytest.mark.parametrize("named", [bench.RUN, None], ids=["the job", "the test's"])
def test_both_sides_get_the_same(named: Path | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations in all, steps, paths in a step, seed."""
    config = CONFIG if named is None else read_config(named) | {"data": CONFIG["data"]}
    seed = bench.open_seed(config, 3, RunFolder(tmp_path), Silent())
    made: list[tuple[tuple[str, ...], str, int, int, int, int]] = []

    def noted(self: bench.Seed, name: str, tiers: tuple[object, ...], method: str, evaluations: int) -> Json:
        problem = self._problem(tiers, ToyEvaluator((1, 1), 0), evaluations, 5, {})  # type: ignore[arg-type]
        names = tuple(tier.name for tier in problem.tiers)
        made.append((names, method, evaluations, problem.warm_up, problem.fit_samples, problem.seed))
        return {"tiers": [{"arch": None} for _ in tiers]}

    monkeypatch.setattr(bench.Seed, "_searched", noted)
    seed.together()
    for tier in seed.tiers:
        seed.alone(tier)
    (names, method, evaluations, *same), *alone = made
    assert method == "importance" and names == tuple(tier.name for tier in seed.tiers)
    assert [one[0] for one in alone] == [(name,) for name in names]
    assert sum(one[2] for one in alone) == evaluations == seed.run.config.search.evaluations
    assert all(one[1] == "asng" and list(one[3:]) == same for one in alone)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"profiles": [{**CONFIG["profiles"][0], "tiers": CONFIG["profiles"][0]["tiers"][:1]}]},
            "several tiers",
        ),
        ({"search": {"warm_up": 2}}, "state search.fit_samples"),
        ({"search": {"fit_samples": 2, "train_in_search": True}}, "none after the warm-up"),
    ],
)
def test_what_cannot_be_compared_is_refused(changed: Json, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        bench.open_seed({**CONFIG, **changed}, 0, RunFolder(tmp_path), Silent())


def test_a_seed_from_end_to_end_and_again_from_what_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(yaml.safe_dump(CONFIG))
    record, table = tmp_path / "record.json", tmp_path / "none.csv"
    arguments = [
        "--run",
        job,
        "--work",
        tmp_path / "work",
        "--json",
        record,
        "--seeds",
        "0",
        "--table",
        table,
    ]
    monkeypatch.setattr(sys, "argv", ["search_one_shot", *map(str, arguments)])
    monkeypatch.setattr(bench, "start_tuned", lambda name: None)
    bench.main()
    numbers = json.loads(record.read_text())["numbers"]["seeds"][0]
    assert [tier["tier"] for tier in numbers["tiers"]] == ["s", "l"]
    for tier in numbers["tiers"]:
        assert all(usage is None or usage <= 1 for usage in tier["usage"])
        assert tier[TOGETHER] is None or 0 < tier[TOGETHER] <= 100
    assert numbers["seconds"] > 0 and set(numbers["excess"]) == set(bench.ARMS)
    assert 0 < numbers["found_after"] <= 24 and 0 < numbers["found_seconds"] <= numbers["seconds"] + 0.01

    def nothing(*asked: object, **options: object) -> None:
        raise AssertionError("all of it is kept")

    monkeypatch.setattr(bench.Gym, "train", nothing)
    monkeypatch.setattr(bench, "fresh_evaluator", nothing)
    bench.main()
    assert json.loads(record.read_text())["numbers"]["seeds"][0] == numbers
