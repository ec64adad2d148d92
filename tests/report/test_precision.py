"""What the manifest and the report say of a precision that a profile asked for."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
from sample_run import latency_record, linear_onnx, sample_records

from pipeline.artifacts import read_json, sha256_file, write_json
from pipeline.errors import CorruptArtifact
from pipeline.report.html import render_report
from pipeline.report.manifest import MANIFEST, answer_file, build_manifest, file_entry, read_manifest
from pipeline.report.select import select
from pipeline.types import Json

REASON = "int8 is slower than float32 (0.80 times its speed)"


@pytest.fixture
def records(tmp_path: Path) -> Json:
    """A run whose first tier has int8 files too, as slow as its answer says."""
    import numpy as np

    given: Json = sample_records(tmp_path)
    tier = given["tiers"][0]
    folder = tmp_path / tier["device"] / tier["name"]
    for name, role in (("model.int8.onnx", "onnx"), ("model.int8.batch1.onnx", "onnx-batch1")):
        (folder / name).write_bytes(linear_onnx(np.ones((4, 3), np.float32), "batch"))
        timed = latency_record(0.1825, sha256_file(folder / name)) if role == "onnx-batch1" else None
        accuracy = {"architecture": 0.9021, "test": 0.8970}
        entry = file_entry(
            tmp_path,
            folder / name,
            role,
            precision="int8",
            latency=timed,
            accuracy=accuracy,  # type: ignore[arg-type]
        )
        tier["files"].append(entry)
    given["profiles"][tier["device"]]["precision"] = "int8"
    tier["precision"] = {
        "asked": "int8",
        "answer": "fp32",
        "reason": REASON,
        "speed_up": 0.8,
        "accuracy_drop": {"architecture": 0.5, "test": 0.6},
        "allowed_drop": 1.0,
        "layers": 12,
        "kept_float": ["node_Conv_3"],
        "calibration_images": 512,
    }
    return given


def test_both_files_and_both_figures_are_in_the_report(records: Json) -> None:
    page = render_report(build_manifest(**records))
    assert "<h3>Precision</h3>" in page and REASON in page
    assert "0.182 ms" in page and "90.21 %" in page and "1 of 12" in page and "0.80" in page


def test_without_one_nothing_is_said(tmp_path: Path) -> None:
    assert "<h3>Precision</h3>" not in render_report(build_manifest(**sample_records(tmp_path)))


def test_int8_as_the_answer_is_what_is_selected(records: Json) -> None:
    tier = records["tiers"][0]
    tier["precision"] |= {"answer": "int8", "reason": "int8 is faster", "speed_up": 1.6}
    int8 = tier["files"][-1]
    int8["latency"]["latency_ms"] = tier["measured"]["latency_ms"] = 0.09
    tier["answer"] = int8["path"]
    manifest = build_manifest(**records)
    chosen = select(manifest, {"latency_ms": 0.1})
    assert chosen is not None and answer_file(chosen)["precision"] == "int8"


def test_an_answer_of_another_precision_than_it_is_said_to_be_is_refused(records: Json) -> None:
    records["tiers"][0]["precision"]["answer"] = "int8"
    with pytest.raises(CorruptArtifact, match=r"'tiers\.0\.precision\.answer': is not the precision of"):
        build_manifest(**records)


def test_a_manifest_from_before_there_were_precisions_is_read_and_shown(run: Path) -> None:
    old = copy.deepcopy(read_json(run / MANIFEST))
    for tier in old["tiers"]:
        del tier["precision"]
    write_json(run / MANIFEST, old)
    assert read_manifest(run) == old
    assert "<h3>Precision</h3>" not in render_report(old)
