"""benchmarks/several_devices.py: which runs are compared, and how."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import several_devices
from pipeline.config import parse, read_config
from pipeline.errors import ConfigError, StaleArtifact
from pipeline.progress import Silent
from pipeline.report.manifest import MANIFEST
from pipeline.run import open_run
from pipeline.types import Json


def manifest(device: str, evaluations: int, test: float) -> Json:
    tier = {
        "device": device,
        "name": "s",
        "budgets": {"latency_ms": 1.0},
        "use": {"latency_ms": 0.98},
        "accuracy": {"architecture": 0.9, "test": test},
        "architecture": {"description": "d"},
    }
    search = {"evaluations": evaluations, "seconds": 10.0, "seed": 0}
    return {"search": search, "stages": {"derive": 5.0}, "tiers": [tier]}


def test_a_run_for_every_device_and_one_for_all() -> None:
    config = read_config(several_devices.RUN)
    made = several_devices.variants(config)
    assert list(made) == ["together", "batch-1", "batch-4", "batch-32"]
    assert made["together"] is config
    alone = parse(made["batch-32"], "batch-32")
    assert [profile.name for profile in alone.profiles] == ["batch-32"]
    assert alone.search == parse(config, "all").search


def test_one_device_is_refused() -> None:
    config = read_config(several_devices.RUN)
    with pytest.raises(ConfigError, match="name several"):
        several_devices.variants({**config, "profiles": config["profiles"][:1]})


def test_loss_and_evaluations_are_judged_against_the_searches_alone() -> None:
    together = manifest("a", 100, 0.90)
    together["tiers"] += manifest("b", 100, 0.80)["tiers"]
    manifests = {"together": together, "a": manifest("a", 100, 0.91), "b": manifest("b", 200, 0.83)}
    tiers = several_devices.by_tier(manifests)
    assert [tier["tier"] for tier in tiers] == ["a/s", "b/s"]
    searches = {name: several_devices.search_numbers(m) for name, m in manifests.items()}
    over, evaluations, loss = several_devices.targets_of(searches, tiers)
    assert over.passed and evaluations.passed and evaluations.came == "0.3333"
    assert not loss.passed and loss.came == "2 points"
    assert "| b/s | 1.00 ms | 98.0 % | 98.0 % | 80.00 | 83.00 | -3.00 |" in several_devices.table_of(
        searches, tiers
    )


def test_a_finished_run_of_another_job_is_refused(tmp_path: Path) -> None:
    config: Json = {"data": "digits", "profiles": ["params"], "search": {"evaluations": 100}}
    run = open_run(tmp_path / "one", parse(config, "test"), Silent())
    run.folder.path("costs").mkdir()
    for name in ("costs/params.json", MANIFEST):
        run.folder.path(name).write_text("{}")
    with pytest.raises(StaleArtifact, match="another search"):
        several_devices.run_variant("one", {**config, "search": {"evaluations": 101}}, tmp_path)
