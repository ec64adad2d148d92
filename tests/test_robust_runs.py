"""Robustness of every tier, whichever method found it: in its record, the manifest and the report; and a
run of `e2rnas`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_run import DEVICE, TIERS, TINY, Cli

from pipeline.config import RunConfig, parse
from pipeline.report.manifest import read_manifest

E2RNAS: dict[str, Any] = {
    **{key: value for key, value in TINY.items() if key != "evaluator"},
    "space": {"name": "nb201", "cells": 1, "channels": 2},
    "method": {"name": "e2rnas", "candidates": 4, "learning_rate": 0.05, "cost_samples": 40},
    "search": {"warm_up": 3, "evaluations": 40},
    "derive": {"trial_epochs": 0, "samples": 20, "rescored": 4, "best": 1},
}


def record_of(root: Path, tier: str, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((root / DEVICE / tier / f"{name}.json").read_text())
    return found


def rewrite(root: Path, **sections: Any) -> None:
    """Change what the run was asked for, by hand, and have it exported again."""
    path = root / "run.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **sections}))
    for tier in TIERS:
        (root / DEVICE / tier / "export.json").unlink()


# ------------------------------------------------------------------------------------------------ every tier


def test_every_tier_says_what_it_withstands(finished: Path) -> None:
    manifest = read_manifest(finished)
    for tier in manifest["tiers"]:
        attacks = tier["accuracy"]["attacks"]
        assert [(x["attack"], x["steps"]) for x in attacks] == [("fgsm", 1), ("pgd", 10)]
        assert attacks == record_of(finished, tier["name"], "export")["accuracy"]["attacks"]
        for found in attacks:
            assert found["epsilon"] == pytest.approx(2 / 255)
            assert found["images"] == 40 and found["accuracy"] <= found["clean"]
    page = (finished / "report.html").read_text()
    assert "<h3>Robustness</h3>" in page and page.count("2/255") == 2 * len(TIERS)


def test_attacks_are_as_asked_for_or_not_at_all(cli: Cli, copied: Path) -> None:
    """By default on 1,000 test images, or all there are."""
    rewrite(copied, robustness={"epsilons": [1, 16], "attacks": ["fgsm"]})
    assert cli("export", "--out", copied).code == 0
    test_images = read_manifest(copied)["data"]["splits"]["test"]
    for tier in TIERS:
        accuracy = record_of(copied, tier, "export")["accuracy"]
        found = accuracy["attacks"]
        assert [round(255 * x["epsilon"], 6) for x in found] == [1, 16]
        assert all(x["images"] == test_images < 1000 for x in found)
        assert all(x["clean"] == pytest.approx(accuracy["test"]) for x in found)
        assert found[1]["accuracy"] <= found[0]["accuracy"]
    rewrite(copied, robustness={"images": 0})
    for words in (["export"], ["report"]):
        outcome = cli(*words, "--out", copied)
        assert outcome.code == 0, outcome
    assert all(tier["accuracy"]["attacks"] == [] for tier in read_manifest(copied)["tiers"])
    assert "<h3>Robustness</h3>" not in (copied / "report.html").read_text()


def test_other_attacks_make_a_record_stale(cli: Cli, copied: Path) -> None:
    path = copied / "run.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "robustness": {"epsilons": [3]}}))
    outcome = cli("export", "--out", copied)
    assert outcome.code == 2 and "export.json: was made from another robustness" in outcome.err


def test_a_manifest_from_before_there_were_attacks_is_still_read_and_made(cli: Cli, copied: Path) -> None:
    for tier in TIERS:
        path = copied / DEVICE / tier / "export.json"
        record = json.loads(path.read_text())
        del record["accuracy"]["attacks"]
        path.write_text(json.dumps(record))
    assert cli("report", "--out", copied).code == 0
    manifest = json.loads((copied / "manifest.json").read_text())
    for tier in manifest["tiers"]:
        assert tier["accuracy"].pop("attacks") == []
    (copied / "manifest.json").write_text(json.dumps(manifest))
    assert "attacks" not in read_manifest(copied)["tiers"][0]["accuracy"]
    assert cli("verify", copied, "--no-remeasure").code == 0


# ---------------------------------------------------------------------------------------------------- e2rnas


def parsed(**values: Any) -> RunConfig:
    device = {"name": "here", "tiers": [{"name": "s", "limits": {"params": "30 %"}}]}
    return parse({"profiles": [device], "space": "nb201", "method": "e2rnas", **values}, "run.yaml")


def test_e2rnas_brings_weights_that_train_on_adversarial_images() -> None:
    config = parsed()
    evaluator = config.evaluator.to_json()
    assert (evaluator["name"], evaluator["epsilon"]) == ("relaxed-adversarial", 2.0)
    assert config.space.to_json()["mixed_norm"] == "pools"
    assert parsed(evaluator="relaxed").evaluator.name == "relaxed", "but may be told otherwise"
    stated = parsed(evaluator={"name": "relaxed-adversarial", "epsilon": 8, "order": "second"})
    assert parse(yaml.safe_load(yaml.safe_dump(stated.to_json())), "run.yaml") == stated


def test_a_search_of_e2rnas_leads_to_architectures_within_every_budget(cli: Cli, tmp_path: Path) -> None:
    root = tmp_path / "out"
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(E2RNAS))
    for words in (["profile", tmp_path / "run.yaml"], ["search"], ["derive"]):
        outcome = cli(*words, "--out", root)
        assert outcome.code == 0, outcome
    trace = [json.loads(line) for line in (root / "search/trace.jsonl").read_text().splitlines()]
    told = [own for line in trace[3:] for own in line["tiers"]]
    floors = {own["tier"]: own["size_floor"] for own in told}
    assert 0 < floors[f"{DEVICE}/s"] < floors[f"{DEVICE}/l"] < 1
    for own in told:
        above = max(own["size"], own["size_chosen"]) > own["size_floor"]
        assert (own["objective_weights"][-1] > 0) == above
    assert json.loads((root / "search/result.json").read_text())["method"] == "e2rnas"
    costs = json.loads((root / "costs" / f"{DEVICE}.json").read_text())
    limits = {tier["name"]: dict(x[:2] for x in tier["limits"]) for tier in costs["tiers"]}
    for name in TIERS:
        predicted = record_of(root, name, "arch")["predicted"]
        assert all(predicted[metric] <= limit for metric, limit in limits[name].items())
