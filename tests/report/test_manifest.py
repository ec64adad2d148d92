from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from sample_run import latency_record, sample_manifest, sample_records

from pipeline.artifacts import read_json, write_json
from pipeline.errors import BudgetMissed, CorruptArtifact, RunFolderError
from pipeline.report.manifest import (
    MANIFEST,
    SCHEMA_FILE,
    answer_file,
    build_manifest,
    file_entry,
    manifest_schema,
    read_manifest,
    write_manifest,
)
from pipeline.types import Json

GOLDEN = Path(__file__).with_name("golden_manifest.json")


def put(record: Any, path: str, value: Any) -> None:
    """Set `tiers.0.budgets.latency_ms` and the like."""
    *parents, last = path.split(".")
    for part in parents:
        record = record[int(part) if isinstance(record, list) else part]
    record[int(last) if isinstance(record, list) else last] = value


def without_hashes(value: Any) -> Any:
    """What of a manifest does not hang on the version of the library that wrote the files."""
    if isinstance(value, dict):
        blank = {"sha256": "0" * 64, "bytes": 0}
        return {key: blank.get(key, without_hashes(inner)) for key, inner in value.items()}
    return [without_hashes(inner) for inner in value] if isinstance(value, list) else value


def test_schema_file_is_the_models_schema() -> None:
    assert read_json(SCHEMA_FILE) == json.loads(json.dumps(manifest_schema())), (
        "the models changed: write json.dumps(manifest_schema(), indent=2, ensure_ascii=False) to the file"
    )
    Draft202012Validator.check_schema(manifest_schema())


def test_golden_manifest_is_what_is_built(manifest: Json) -> None:
    assert without_hashes(manifest) == read_json(GOLDEN)


def test_golden_manifest_is_read(tmp_path: Path) -> None:
    write_json(tmp_path / MANIFEST, read_json(GOLDEN))
    assert read_manifest(tmp_path) == read_json(GOLDEN)


def test_manifest_survives_the_disk(tmp_path: Path, manifest: Json) -> None:
    assert write_manifest(tmp_path, manifest) == tmp_path / "manifest.json"
    assert read_manifest(tmp_path) == manifest


def test_keys_that_programs_rely_on(manifest: Json) -> None:
    assert {"schema", "run", "search", "tiers"} <= manifest.keys()
    assert {"method", "seed", "evaluations", "seconds"} <= manifest["search"].keys()
    tier = manifest["tiers"][0]
    assert tier["budgets"] == {"latency_ms": 0.15, "params": 500_000.0}
    assert tier["budgets"].keys() <= tier["measured"].keys()
    assert tier["use"]["latency_ms"] == pytest.approx(0.146 / 0.15)
    assert (tier["params"], tier["flops"]) == (62_410, 3_210_000)
    assert {"architecture", "test"} <= tier["accuracy"].keys()
    assert tier["architecture"]["choices"] == [1, 0, 2, 1]
    assert all({"path", "role", "sha256"} <= file.keys() for file in tier["files"])
    assert tier["limits"][1] == {"metric": "params", "stated": "50 %", "relative": True, "value": 500_000.0}
    assert manifest["created"] == "2024-05-06T07:08:09Z"


def test_a_reader_accepts_keys_it_does_not_know(run: Path) -> None:
    record = read_json(run / MANIFEST)
    record["later"] = 1
    record["tiers"][0]["later"] = {"x": 1}
    write_json(run / MANIFEST, record)
    assert read_manifest(run)["later"] == 1


def test_a_writer_refuses_keys_it_does_not_know(tmp_path: Path) -> None:
    records = sample_records(tmp_path)
    records["tiers"][1]["flop"] = 1
    with pytest.raises(CorruptArtifact, match=r"tiers\.1\.flop"):
        build_manifest(**records)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("tiers.0.budgets.latency_ms", -1.0),
        ("tiers.0.budgets.latency_ms", "0.6 ms"),
        ("tiers.0.accuracy.test", 98.1),
        ("tiers.0.files.0.sha256", "abc"),
        ("tiers.0.files.0.role", "pickle"),
        ("tiers.0.files.0.path", "../model.onnx"),
        ("tiers.0.files.0.path", "/model.onnx"),
        ("tiers.0.files.0.path", "a/../../model.onnx"),
        ("tiers.0.files.0.path", "a\\model.onnx"),
        ("tiers.0.params", 1.5),
        ("tiers.0.measured", {"params": 62_410, "flops": 3_210_000}),
        ("tiers.0.measured.params", 1),
        ("tiers.0.measured.latency_ms", 0.1),
        ("tiers.0.device", "other"),
        ("tiers.0.name", "M"),
        ("tiers.0.answer", "cpu-1thread/S/weights.safetensors"),
        ("tiers.0.files.1.latency.sha256", "0" * 64),
        ("tiers", []),
        ("search.seed", None),
        ("created", "yesterday"),
    ],
)
def test_what_cannot_be_trusted_is_refused(run: Path, path: str, value: Any) -> None:
    record = read_json(run / MANIFEST)
    put(record, path, value)
    write_json(run / MANIFEST, record)
    with pytest.raises(CorruptArtifact) as refused:
        read_manifest(run)
    message = str(refused.value)
    assert str(run / MANIFEST) in message
    assert path.split(".")[0] in message
    assert "\n" not in message and len(message) < 500


def test_a_missing_key_is_named(run: Path) -> None:
    record = read_json(run / MANIFEST)
    del record["tiers"][2]["files"][0]["sha256"]
    write_json(run / MANIFEST, record)
    with pytest.raises(CorruptArtifact, match=r"'tiers\.2\.files\.0'.*sha256"):
        read_manifest(run)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"schema": 2}', '{"schema": true}'])
def test_what_is_no_manifest_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(CorruptArtifact):
        read_manifest(tmp_path)


def test_another_schema_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text('{"schema": 2}')
    with pytest.raises(CorruptArtifact, match="'schema' is 2, this version of budgetline reads 1"):
        read_manifest(tmp_path)


def test_no_manifest(tmp_path: Path) -> None:
    """What to do depends on what there is."""
    with pytest.raises(RunFolderError, match="absent: no such folder; `budgetline list`"):
        read_manifest(tmp_path / "absent")
    with pytest.raises(RunFolderError, match="holds no finished run"):
        read_manifest(tmp_path)
    (tmp_path / "run.yaml").touch()
    with pytest.raises(RunFolderError, match="is not finished; go on with `budgetline run --out"):
        read_manifest(tmp_path)


def test_a_broken_manifest_can_be_made_again(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(CorruptArtifact, match=f"make it again with `budgetline report --out {tmp_path}`"):
        read_manifest(tmp_path)


def test_nan_is_refused(run: Path) -> None:
    record = read_json(run / MANIFEST)
    record["tiers"][0]["measured"]["latency_ms"] = math.nan
    (run / MANIFEST).write_text(json.dumps(record))
    with pytest.raises(CorruptArtifact, match="NaN"):
        read_manifest(run)


def test_a_link_out_of_the_folder_is_refused(run: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = tmp_path_factory.mktemp("outside") / "model.onnx"
    outside.write_bytes(b"x")
    link = run / "cpu-1thread/S/model.onnx"
    link.unlink()
    link.symlink_to(outside)
    with pytest.raises(CorruptArtifact, match=r"tiers\.0\.files\.0\.path.*leaves the run folder"):
        read_manifest(run)


def test_the_reference_cannot_leave_the_folder_either(run: Path) -> None:
    record = read_json(run / MANIFEST)
    record["costs"]["cpu-1thread"]["reference"] = {"path": "a/../x", "sha256": "0" * 64, "nominal_ms": 0.2}
    write_json(run / MANIFEST, record)
    with pytest.raises(CorruptArtifact, match="reference"):
        read_manifest(run)


def test_a_tier_over_its_budget_is_not_written(tmp_path: Path) -> None:
    records = sample_records(tmp_path)
    records["tiers"][0]["budgets"]["latency_ms"] = 0.1459
    with pytest.raises(BudgetMissed, match=r"cpu-1thread/S.*latency_ms.*0\.146.*0\.1459"):
        build_manifest(**records)


def test_a_figure_that_is_not_there_is_null(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"x")
    record = latency_record(0.2, "0" * 64)
    object.__setattr__(record, "drift", math.nan)
    assert file_entry(tmp_path, path, "onnx", latency=record)["latency"]["drift"] is None


def test_int8_files_attacks_and_several_devices_fit(tmp_path: Path) -> None:
    records = sample_records(tmp_path)
    tier = records["tiers"][0]
    path = tmp_path / "cpu-1thread/S/model.int8.onnx"
    path.write_bytes(b"int8")
    parity = {
        "max_abs_error": 0.2,
        "max_rel_error": 0.02,
        "top1_agreement": 0.98,
        "images": 100,
        "tolerance": 0.5,
        "batches": [1, 100],
    }
    tier["files"].append(file_entry(tmp_path, path, "onnx-batch1", precision="int8", parity=parity))
    tier["accuracy"]["attacks"] = [{"attack": "pgd", "epsilon": 2 / 255, "steps": 10, "accuracy": 0.41}]
    records["profiles"]["pi"] = records["profiles"]["cpu-1thread"]
    records["tiers"].append({**records["tiers"][1], "device": "pi"})
    manifest = build_manifest(**records)
    assert manifest["tiers"][0]["files"][-1]["precision"] == "int8"
    assert manifest["tiers"][0]["files"][-1]["parity"]["batches"] == [1, 100]
    assert manifest["tiers"][0]["accuracy"]["attacks"][0]["steps"] == 10
    assert [t["device"] for t in manifest["tiers"]] == ["cpu-1thread"] * 3 + ["pi"]


def test_answer_file_is_the_one_that_was_measured(manifest: Json) -> None:
    assert answer_file(manifest["tiers"][1])["latency"]["latency_ms"] == 0.281


def test_reading_needs_neither_torch_nor_onnx(run: Path) -> None:
    code = (
        "import sys, pathlib; from pipeline.report.manifest import read_manifest;"
        " from pipeline.report import select, verify; read_manifest(pathlib.Path(sys.argv[1]));"
        " print([m for m in ('torch', 'onnx', 'matplotlib', 'sklearn', 'onnxruntime') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(run)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_same_records_give_the_same_bytes(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write_manifest(tmp_path / folder, sample_manifest(tmp_path / folder))
    assert (tmp_path / "a" / MANIFEST).read_bytes() == (tmp_path / "b" / MANIFEST).read_bytes()
