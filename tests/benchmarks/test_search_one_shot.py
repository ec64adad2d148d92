"""benchmarks/search_one_shot.py: equal evaluations on both sides, and how they are compared."""

from __future__ import annotations

import pytest

from benchmarks import search_one_shot as bench
from pipeline.config import parse, read_config
from pipeline.errors import ConfigError
from pipeline.types import Json


def manifest(tiers: dict[str, float], seconds: float) -> Json:
    return {
        "search": {"seed": 0, "seconds": seconds, "evaluations": 10},
        "tiers": [
            {"name": name, "budgets": {"flops": 1.0}, "accuracy": {"test": test}}
            for name, test in tiers.items()
        ],
    }


SEED = bench.compared(
    {
        "together": manifest({"s": 0.90, "m": 0.93}, 12.0),
        "s": manifest({"s": 0.91}, 8.0),
        "m": manifest({"m": 0.92}, 12.0),
    }
)


def test_both_sides_get_the_same_evaluations_and_seed() -> None:
    config = read_config(bench.RUN)
    made = bench.variants(config, seed=3)
    parsed = {name: parse(each, name) for name, each in made.items()}
    together = parsed.pop("together")
    assert sum(one.search.evaluations for one in parsed.values()) == together.search.evaluations
    assert {one.seed for one in parsed.values()} == {together.seed} == {3}
    assert [one.profiles[0].tiers[0].name for one in parsed.values()] == list(parsed)
    assert {one.method.name for one in parsed.values()} == {"asng"} and together.method.name == "importance"


def test_one_tier_is_refused() -> None:
    config = read_config(bench.RUN)
    (profile,) = config["profiles"]
    with pytest.raises(ConfigError, match="several tiers"):
        bench.variants({**config, "profiles": [{**profile, "tiers": profile["tiers"][:1]}]}, 0)


def test_gain_is_per_tier_and_time_against_the_mean_search_alone() -> None:
    assert bench.gains([SEED]) == pytest.approx([-1, 1])
    assert bench.wall_ratio(SEED) == pytest.approx(1.2)
    assert [t.passed for t in bench.targets_of([SEED])] == [True, True]
    assert "| s | 90.00 | 91.00 | -1.00 |" in bench.table_of([SEED])


def test_a_slow_or_worse_search_for_all_misses() -> None:
    slow = {**SEED, "seconds": {"together": 20.0, "s": 10.0, "m": 10.0}}
    worse = {**SEED, "tiers": [{**tier, "alone": 99.0} for tier in SEED["tiers"]]}
    assert not bench.targets_of([slow])[0].passed
    assert not bench.targets_of([worse])[1].passed
