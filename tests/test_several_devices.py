"""Several devices in one search: one supernet, one family per device, one manifest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from tiny_run import TINY, Cli

from pipeline.artifacts import sha256_file
from pipeline.report.manifest import read_manifest
from pipeline.run import Run
from pipeline.stages import retrain
from pipeline.types import Json

PROFILES = [
    {"name": "phone", "provider": "none", "tiers": [{"name": "only", "limits": {"params": "40 %"}}]},
    {
        "name": "board",
        "provider": "none",
        "tiers": [
            {"name": "s", "limits": {"flops": "30 %"}},
            {"name": "l", "limits": {"params": "40 %"}},
        ],
    },
]
KEYS = ["phone/only", "board/s", "board/l"]


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("described") / "devices.yaml"
    path.write_text(yaml.safe_dump({**TINY, "profiles": PROFILES}))
    return path


def test_one_search_serves_the_tiers_of_all_devices(cli: Cli, described: Path, tmp_path: Path) -> None:
    root = tmp_path / "devices"
    outcome = cli("run", described, "--out", root)
    assert outcome.code == 0, outcome
    manifest = read_manifest(root)
    assert [f"{tier['device']}/{tier['name']}" for tier in manifest["tiers"]] == KEYS
    assert set(manifest["profiles"]) == set(manifest["costs"]) == {"phone", "board"}
    assert manifest["search"]["evaluations"] == TINY["search"]["evaluations"]
    for tier in manifest["tiers"]:
        assert all(tier["measured"][metric] <= limit for metric, limit in tier["budgets"].items())
    lines = [json.loads(line) for line in (root / "search" / "trace.jsonl").read_text().splitlines()]
    assert [tier["tier"] for tier in lines[-1]["tiers"]] == KEYS
    assert cli("verify", root).code == 0
    assert cli("select", root, "--device", "board", "--params", "1M").out.strip().startswith(str(root))


def test_a_network_that_tiers_share_is_trained_once(
    cli: Cli, described: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, trained = tmp_path / "devices", []
    retrain_one = retrain.retrain_one

    def watched(run: Run, job: Json) -> Json:
        trained.append(job["tier"])
        return retrain_one(run, job)

    monkeypatch.setitem(retrain.JOBS, "retrain", watched)
    for words in (["profile", described], ["search"], ["derive"]):
        assert cli(*words, "--out", root).code == 0
    shared = (root / "board" / "l" / "arch.json").read_bytes()
    (root / "phone" / "only" / "arch.json").write_bytes(shared)
    assert cli("retrain", "--out", root).code == 0
    assert len(trained) == 2 and "board/s" in trained
    twins = [root / name / "weights.safetensors" for name in ("phone/only", "board/l")]
    assert sha256_file(twins[0]) == sha256_file(twins[1])
    records = [json.loads((twin.parent / "train.json").read_text()) for twin in twins]
    (root / "phone" / "only" / "train.json").unlink()
    lost, whole = twins[1], twins[1].read_bytes()
    lost.unlink()
    assert cli("retrain", "--out", root).code == 0 and trained[2:] == ["phone/only"], "nobody to take it from"
    lost.write_bytes(whole)
    assert sorted("adopted" in record for record in records) == [False, True]
    assert records[0]["seconds"] == records[1]["seconds"] > 0
    assert records[0]["sha256"] == records[1]["sha256"] and records[0]["accuracy"] == records[1]["accuracy"]
