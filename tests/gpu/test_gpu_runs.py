"""Whole small runs with a GPU: trained there, and, where ONNX Runtime has it, timed there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_run import TINY, Cli

from pipeline.report.manifest import read_manifest


def described(folder: Path, **changes: Any) -> Path:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({**TINY, **changes}))
    return path


@pytest.mark.parametrize("workers", [1, 2])
def test_a_family_trained_on_a_gpu(cli: Cli, tmp_path: Path, gpu: str, workers: int) -> None:
    root = tmp_path / "run"
    outcome = cli("run", described(tmp_path, device=gpu), "--out", root, "--workers", workers)
    assert outcome.code == 0, outcome
    tiers = read_manifest(root)["tiers"]
    assert [tier["name"] for tier in tiers] == ["s", "l"]
    assert all(tier["accuracy"]["test"] > 0 for tier in tiers)
    checked = cli("verify", root)
    assert checked.code == 0, checked


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_family_timed_on_a_gpu(cli: Cli, tmp_path: Path, gpu: str, provider: str, precision: str) -> None:
    tiers = [{"name": "m", "limits": {"latency": "85 %"}}]
    profile = {"name": "gpu", "provider": provider, "precision": precision, "tiers": tiers}
    root = tmp_path / "run"
    search = {**TINY["search"], "calibration": 8}
    run = described(tmp_path, device=gpu, profiles=[profile], search=search)
    outcome = cli("run", run, "--out", root)
    assert outcome.code == 0, outcome
    [tier] = read_manifest(root)["tiers"]
    assert tier["measured"]["latency_ms"] <= tier["budgets"]["latency_ms"]
    checked = cli("verify", root)
    assert checked.code == 0, checked


def test_a_gpu_that_is_not_there_is_refused(cli: Cli, tmp_path: Path, gpu: str) -> None:
    beyond = torch.cuda.device_count()
    outcome = cli("run", described(tmp_path, device=f"cuda:{beyond}"), "--out", tmp_path / "run")
    assert outcome.code == 2 and f"device: cuda:{beyond} was asked for" in outcome.err
