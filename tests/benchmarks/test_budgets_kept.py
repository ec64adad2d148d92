"""benchmarks/budgets.py: what counts as kept, and the job it runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import budgets
from pipeline.config import parse, read_config


def tier(seed: int, name: str, use: float, kept: bool = True) -> dict[str, object]:
    return {"seed": seed, "tier": name, "budget_ms": 1.0, "use": use, "kept_again": kept}


def test_a_tier_over_its_budget_is_named() -> None:
    targets = budgets.targets_of([tier(0, "cpu/s", 0.99), tier(1, "cpu/s", 1.001)])
    assert [t.passed for t in targets] == [False, True, True, True]
    assert targets[0].came == "seed 1 cpu/s"


def test_what_measures_too_slow_again_is_named() -> None:
    targets = budgets.targets_of([tier(0, "cpu/s", 0.99, kept=False), tier(0, "cpu/m", 0.99)])
    assert not targets[1].passed and targets[1].came == "seed 0 cpu/s"


def test_unused_budget_fails_by_mean_and_by_least() -> None:
    targets = budgets.targets_of([tier(0, "cpu/s", 0.91), tier(0, "cpu/m", 0.99)])
    assert [t.passed for t in targets] == [True, True, False, False]


def test_table_has_a_row_per_tier_and_a_column_per_seed() -> None:
    rows = budgets.table_of([tier(0, "cpu/s", 0.98), tier(1, "cpu/s", 0.97, kept=False)]).splitlines()
    assert rows[2] == "| cpu/s | 1.00 ms | 98.0 % | 97.0 % | 1 of 2 |"


def test_job_has_two_profiles_of_five_tiers_that_limit_latency() -> None:
    config = parse(read_config(budgets.RUN), "budgets.yaml")
    assert [[list(tier.limits) for tier in profile.tiers] for profile in config.profiles] == [
        [["latency"]] * 5
    ] * 2


def test_cache_of_a_run_has_the_data_and_no_measurements(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = tmp_path / "usual"
    (usual / "costs").mkdir(parents=True)
    (usual / "FashionMNIST").mkdir()
    monkeypatch.setenv("BUDGETLINE_CACHE", str(usual))
    fresh = budgets.fresh_cache(tmp_path / "fresh")
    assert [entry.name for entry in fresh.iterdir()] == ["FashionMNIST"]
    assert budgets.fresh_cache(fresh) == fresh
