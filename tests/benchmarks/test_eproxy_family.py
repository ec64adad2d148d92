"""benchmarks/eproxy_family.py: the two runs that are compared, and how."""

from __future__ import annotations

from benchmarks import eproxy_family
from pipeline.config import parse, read_config
from pipeline.types import Json


def manifest(search_s: float, uses: tuple[float, ...], tests: tuple[float, ...]) -> Json:
    return {
        "search": {"seed": 0},
        "stages": {"profile": 99.0, "search": search_s, "retrain": 60.0},
        "tiers": [
            {
                "device": "cpu",
                "name": name,
                "budgets": {"latency_ms": 1.0},
                "use": {"latency_ms": use},
                "accuracy": {"test": test},
                "architecture": {"description": "d"},
            }
            for name, use, test in zip("sl", uses, tests, strict=True)
        ],
    }


def test_both_runs_are_whole_jobs_with_five_tiers() -> None:
    config = read_config(eproxy_family.RUN)
    runs = [parse({**config, "evaluator": name}, name) for name in ("eproxy", "one-shot")]
    assert [run.evaluator.name for run in runs] == ["eproxy", "one-shot"]
    assert all(run.method.name == "importance" and len(run.profiles[0].tiers) == 5 for run in runs)


def test_a_slow_search_and_a_broken_budget_are_told() -> None:
    manifests = {
        "eproxy": manifest(700.0, (0.98, 0.97), (0.90, 0.91)),
        "one-shot": manifest(300.0, (0.98, 1.01), (0.91, 0.93)),
    }
    seconds = {name: eproxy_family.seconds_of(m) for name, m in manifests.items()}
    assert seconds["eproxy"] == {"search": 700.0, "retrain": 60.0, "all": 760.0}
    tiers = eproxy_family.by_tier(manifests)
    over, search = eproxy_family.targets_of(seconds, tiers)
    assert not over.passed and "cpu/l one-shot" in over.came
    assert not search.passed and search.came.startswith("11.67")
    table = eproxy_family.table_of(seconds, tiers)
    assert "| cpu/s | 1.00 ms | 98.0 % | 98.0 % | 90.00 | 91.00 | -1.00 |" in table
    assert "-1.50 points on average" in table
