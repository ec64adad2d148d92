"""Whole runs, small, whose profile asks for int8: which file is the answer, and who understands it."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import yaml
from board import carried_out, manifest_in
from tiny_run import TINY, Cli

from pipeline import deploy
from pipeline import run as run_module
from pipeline.artifacts import sha256_file
from pipeline.costs.memory import footprint
from pipeline.devices import on_device
from pipeline.devices.kit import pack_family
from pipeline.devices.session import RuntimeSettings, open_session
from pipeline.errors import MeasurementError
from pipeline.report.manifest import answer_file, read_manifest
from pipeline.stages import lower_precision
from pipeline.stages import measure as measure_module
from pipeline.types import Json, LatencyRecord
from pipeline.units import format_value

FLOAT, INT8 = "cpu/m/model.batch1.onnx", "cpu/m/model.int8.batch1.onnx"


def known_ms(path: Path) -> float:
    """0.01 ms, and a nanosecond per weight; as in `test_flow`, since cost tables are remembered."""
    weights = onnx.load(str(path)).graph.initializer
    return 0.01 + 1e-6 * sum(int(np.prod(weight.dims)) for weight in weights)


class Stopwatch:
    """A device on which latencies are known: files that ship take `factor` times that in float32, and `int8`
    times that in int8."""

    def __init__(self) -> None:
        self.factor, self.int8 = 1.0, 0.5
        self.together: list[list[str]] = []

    def __call__(
        self, models: Sequence[Path], reference: Path, settings: RuntimeSettings, **options: Any
    ) -> list[LatencyRecord]:
        self.together.append([path.name for path in models])
        context = {**settings.to_json(), "reference": {"now_ms": known_ms(reference)}}
        return [self._record(path, context) for path in models]

    def _record(self, path: Path, context: Json) -> LatencyRecord:
        shipped = path.name.startswith("model")
        ms = known_ms(path) * (1 if not shipped else self.int8 if "int8" in path.name else self.factor)
        return LatencyRecord(ms, ms, 1.1 * ms, 0.01, 50, 5, 0, 2 * ms, 1.0, sha256_file(path), context)


@pytest.fixture
def stopwatch(monkeypatch: pytest.MonkeyPatch) -> Stopwatch:
    watch = Stopwatch()
    monkeypatch.setattr(run_module, "measure", watch)
    return watch


def describe(folder: Path, **profile: Any) -> Path:
    tiers = [{"name": "m", "limits": {"latency": "50 %", "memory": "90 %"}}]
    int8 = {"precision": "int8", "int8": {"calibration_images": 32}}
    asked = {"name": "cpu", **({} if "precision" in profile else int8), "tiers": tiers, **profile}
    values = {**TINY, "profiles": [asked], "data": {"name": "digits", "limit": 150}}
    values["search"] = {**TINY["search"], "calibration": 8}
    path = folder / "int8.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def original(cli: Cli, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run whose int8 file is the answer."""
    root = tmp_path_factory.mktemp("int8") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "measure", Stopwatch())
        outcome = cli("run", describe(root.parent), "--out", root)
    assert outcome.code == 0, outcome
    yield root


@pytest.fixture
def root(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / original.name))


def tier_of(root: Path) -> Json:
    [tier] = read_manifest(root)["tiers"]
    found: Json = tier
    return found


def file_at(tier: Json, path: str) -> Json:
    found: Json = next(file for file in tier["files"] if file["path"] == path)
    return found


# -------------------------------------------------------------------------------------------- int8 is faster


def test_both_files_and_both_figures_are_there_and_the_faster_is_the_answer(original: Path) -> None:
    tier = tier_of(original)
    assert tier["answer"] == INT8
    told = tier["precision"]
    assert (told["asked"], told["answer"]) == ("int8", "int8") and told["calibration_images"] == 32
    assert told["speed_up"] == pytest.approx(2, rel=0.1) and told["reason"].startswith("int8 is faster than")
    assert told["accuracy_drop"]["architecture"] <= told["allowed_drop"] == 1.0
    names = {(file["role"], file["precision"]) for file in tier["files"] if file["path"].endswith(".onnx")}
    assert names == {(role, p) for role in ("onnx", "onnx-batch1") for p in ("fp32", "int8")}
    for path, precision in ((FLOAT, "fp32"), (INT8, "int8")):
        file = file_at(tier, path)
        assert file["latency"]["context"]["precision"] == file["precision"] == precision
        accuracy = file_at(tier, path.replace(".batch1", ""))["accuracy"]
        assert all(0 <= accuracy[split] <= 1 for split in ("architecture", "test"))
    drop = told["accuracy_drop"]
    for split in ("architecture", "test"):
        plain, int8 = (file_at(tier, f"cpu/m/model{p}.onnx")["accuracy"][split] for p in ("", ".int8"))
        assert drop[split] == pytest.approx(100 * (plain - int8))
        assert tier["accuracy"][split] == int8, "the tier's accuracy is its answer's"


def test_what_was_measured_is_the_answers_and_keeps_every_budget(original: Path) -> None:
    tier = tier_of(original)
    assert tier["measured"]["latency_ms"] == answer_file(tier)["latency"]["latency_ms"]
    found = footprint(original / INT8, 1)
    assert tier["measured"]["weight_bytes"] == found.weight_bytes
    assert tier["measured"]["memory_bytes"] == found.memory_bytes
    assert all(tier["measured"][metric] <= limit for metric, limit in tier["budgets"].items())
    assert set(tier["budgets"]) == {"latency_ms", "memory_bytes"}
    assert tier["predicted"]["memory_bytes"] == footprint(original / FLOAT, 1).memory_bytes


def test_consumers_understand_it(cli: Cli, original: Path) -> None:
    checked = cli("verify", original, "--no-remeasure", "--json")
    results = json.loads(checked.out)
    assert checked.code == 0 and {r["check"] for r in results if r["ok"]} >= {
        f"logits {INT8}",
        f"file {INT8}",
    }
    chosen = cli("select", original, "--memory-bytes", "1 MiB", "--latency-ms", "1")
    assert chosen.out.strip() == str(original / INT8)
    assert " int8 " in cli("list", original).out
    page = (original / "report.html").read_text()
    assert "<h3>Precision</h3>" in page and tier_of(original)["precision"]["reason"] in page
    assert "model.int8.batch1.onnx" in page


def test_int8_logits_are_held_to_their_own(cli: Cli, root: Path) -> None:
    """Another int8 file under the same name, with the hash that goes with it."""
    model = onnx.load(root / INT8)
    bias = next(t for t in model.graph.initializer if t.name == "classifier.bias_quantized")
    bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + 100_000, bias.name))
    onnx.save(model, root / INT8)
    manifest = json.loads((root / "manifest.json").read_text())
    file = file_at(manifest["tiers"][0], INT8)
    file["sha256"] = file["latency"]["sha256"] = sha256_file(root / INT8)
    (root / "manifest.json").write_text(json.dumps(manifest))
    outcome = cli("verify", root, "--no-remeasure", "--json")
    wrong = [result["check"] for result in json.loads(outcome.out) if result["ok"] is False]
    assert outcome.code == 1 and wrong == [f"logits {INT8}"]


def test_a_kit_checks_int8_files_on_a_device(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disturbed(*given: Any, **asked: Any) -> list[Json]:
        raise MeasurementError("not timed here")

    pack_family(tmp_path / "check.zip", original, read_manifest(original))
    with zipfile.ZipFile(tmp_path / "check.zip") as archive:
        archive.extractall(tmp_path / "board")
    [folder] = (tmp_path / "board").iterdir()
    monkeypatch.setattr(on_device, "time_models", disturbed)
    monkeypatch.setattr(on_device, "Patience", partial(on_device.Patience, attempts=1))
    on_device.main(str(folder), [])
    checks = json.loads((folder / "results.json").read_text())["checks"]
    logits = {check["check"]: check["ok"] for check in checks if check["check"].startswith("logits")}
    assert len(logits) == 4 and all(logits.values()) and f"logits family/{INT8}" in logits


# ----------------------------------------------------------------------------------------------- or it is not


def test_where_int8_is_slower_the_float_file_is_the_answer_and_the_manifest_says_so(
    cli: Cli, root: Path, stopwatch: Stopwatch
) -> None:
    stopwatch.int8 = 1.4
    (root / "cpu" / "m" / "measure.json").unlink()
    assert cli("run", "--out", root).code == 0
    assert stopwatch.together[0] == [Path(FLOAT).name, Path(INT8).name], "in the same rounds"
    tier = tier_of(root)
    assert tier["answer"] == FLOAT and tier["measured"]["latency_ms"] == known_ms(root / FLOAT)
    assert tier["precision"]["answer"] == "fp32" and tier["precision"]["reason"].startswith("int8 is slower")
    assert file_at(tier, INT8)["latency"]["latency_ms"] == pytest.approx(1.4 * known_ms(root / INT8))
    assert tier["measured"]["weight_bytes"] == footprint(root / FLOAT, 1).weight_bytes
    assert cli("verify", root, "--no-remeasure").code == 0
    assert cli("select", root, "--params", "1 M").out.strip() == str(root / FLOAT)
    assert tier["precision"]["reason"] in (root / "report.html").read_text()


def test_where_int8_loses_too_much_the_float_file_is_the_answer(
    cli: Cli, root: Path, stopwatch: Stopwatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    def accuracy(run: object, file: Path, runtime: object) -> float:
        return 0.9 if file.name == "model.onnx" else 0.6

    monkeypatch.setattr(lower_precision, "_architecture_accuracy", accuracy)
    for name in ("export.json", "measure.json"):
        (root / "cpu" / "m" / name).unlink()
    assert cli("run", "--out", root).code == 0
    tier = tier_of(root)
    assert tier["answer"] == FLOAT and tier["precision"]["answer"] == "fp32"
    assert tier["precision"]["reason"].startswith("int8 loses 30.00 points of accuracy on the architecture")
    assert tier["precision"]["accuracy_drop"]["architecture"] == pytest.approx(30)
    assert (root / INT8).exists() and file_at(tier, INT8)["latency"] is not None


def test_budgets_hold_for_the_answer_alone(cli: Cli, root: Path, stopwatch: Stopwatch) -> None:
    record = root / "cpu" / "m" / "measure.json"
    record.unlink()
    stopwatch.factor = 3.0
    assert cli("run", "--out", root).code == 0
    tier = tier_of(root)
    assert tier["answer"] == INT8 and "which misses its budget of latency_ms" in tier["precision"]["reason"]
    assert file_at(tier, FLOAT)["latency"]["latency_ms"] > tier["budgets"]["latency_ms"]
    record.unlink()
    stopwatch.int8 = 3.0
    outcome = cli("run", "--out", root)
    assert outcome.code == 2 and "BudgetMissed: tier cpu/m: latency_ms is" in outcome.err, outcome


def test_other_settings_of_int8_are_not_taken_for_the_ones_there_are(cli: Cli, root: Path) -> None:
    path = root / "run.yaml"
    asked = yaml.safe_load(path.read_text())
    asked["profiles"][0]["int8"] = {"calibration_images": 64}
    path.write_text(yaml.safe_dump(asked))
    outcome = cli("run", "--out", root)
    assert outcome.code == 2 and "\nStaleArtifact: " in outcome.err, outcome


# ----------------------------------------------------------------------------------------- a device elsewhere


def test_a_device_elsewhere_times_both_files_and_the_search_stays_in_float32(
    cli: Cli, tmp_path: Path
) -> None:
    described, root = describe(tmp_path, name="board8", measured="elsewhere"), tmp_path / "run"

    def latency_of(path: Path) -> float:
        """Int8 files hold their weights as int8."""
        kinds = {tensor.data_type for tensor in onnx.load(str(path)).graph.initializer}
        return known_ms(path) * (0.5 if onnx.TensorProto.INT8 in kinds else 1.0)

    for models in (8, 2):
        assert cli("run", described, "--out", root).code == 2
        kit = root / "kits" / "board8.zip"
        assert len(manifest_in(kit)["jobs"][0]["models"]) == models
        assert manifest_in(kit)["runtime"]["precision"] == "fp32"
        shutil.rmtree(tmp_path / "there", ignore_errors=True)
        assert cli("kit", "import", carried_out(kit, tmp_path / "there", latency_of)).code == 0
    assert cli("run", "--out", root).code == 0
    tier = tier_of(root)
    assert tier["answer"] == "board8/m/model.int8.batch1.onnx"
    assert tier["precision"]["speed_up"] == pytest.approx(2, rel=0.1)
    assert cli("verify", root).code == 0


def test_float16_is_searched_timed_and_shipped_on_a_gpu_elsewhere(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No GPU is needed here: its times are known, and what float16 loses is worked out on this CPU."""
    tiers = [{"name": "m", "limits": {"latency": "50 %"}}]
    gpu = {"provider": "cuda", "precision": "fp16", "measured": "elsewhere", "tiers": tiers}
    described, root = describe(tmp_path, name="gpu", **gpu), tmp_path / "run"
    kinds: list[set[int]] = []

    def latency_of(path: Path) -> float:
        kinds.append({tensor.data_type for tensor in onnx.load(str(path)).graph.initializer})
        return known_ms(path) * (1.0 if onnx.TensorProto.FLOAT16 in kinds[-1] else 2.0)

    for _ in range(2):
        waiting = cli("run", described, "--out", root)
        assert waiting.code == 2 and "AwaitingDevice: " in waiting.err, waiting
        there = tmp_path / "there"
        shutil.rmtree(there, ignore_errors=True)
        results = carried_out(root / "kits" / "gpu.zip", there, latency_of)
        ran = {**json.loads(results.read_text()), "providers": ["CUDAExecutionProvider"]}
        results.write_text(json.dumps(ran))
        assert cli("kit", "import", results).code == 0
    assert all(kind == {onnx.TensorProto.FLOAT16} for kind in kinds[:9]), "reference and what it calibrates"
    outcome = cli("run", "--out", root)
    assert outcome.code == 0, outcome
    tier = tier_of(root)
    assert tier["answer"] == "gpu/m/model.fp16.batch1.onnx" and tier["precision"]["answer"] == "fp16"
    assert tier["measured"]["latency_ms"] <= tier["budgets"]["latency_ms"]
    assert tier["predicted"]["latency_ms"] == pytest.approx(tier["measured"]["latency_ms"], rel=0.25)
    assert tier["precision"]["speed_up"] == pytest.approx(2) and tier["precision"]["allowed_drop"] is None
    parity = file_at(tier, tier["answer"])["parity"]
    assert 0 < parity["max_abs_error"] < parity["tolerance"] == 0.1
    assert tier["measured"]["weight_bytes"] == footprint(root / tier["answer"], 1).weight_bytes
    checked = cli("verify", root)
    assert checked.code == 0, checked

    record_path, limit_ms = root / "gpu" / "m" / "measure.json", tier["budgets"]["latency_ms"]
    timed = json.loads(record_path.read_text())
    half, full = timed["lower"]["latency"], timed["latency"]

    def a_little_over(*asked: Any) -> list[dict[str, LatencyRecord]]:
        told = {"fp16": (half, 1.01 * limit_ms), "fp32": (full, 2.0 * limit_ms)}
        return [{form: LatencyRecord(**{**old, "latency_ms": ms}) for form, (old, ms) in told.items()}]

    record_path.unlink()
    with monkeypatch.context() as patched:
        patched.setattr(measure_module, "_time_shipped", a_little_over)
        outcome = cli("run", "--out", root)
    came = format_value("latency_ms", 1.01 * limit_ms)
    assert outcome.code == 2 and f"BudgetMissed: tier gpu/m: latency_ms is {came}, " in outcome.err, outcome
    assert f"else remove the folder {root / 'gpu' / 'm'}" in outcome.err, "it is the network that is at fault"

    strict = replace(deploy.FLOAT16_GATE, max_abs_error=1e-9)
    monkeypatch.setattr(deploy, "FLOAT16_GATE", strict)
    (root / "gpu" / "m" / "export.json").unlink()
    outcome = cli("run", "--out", root)
    assert outcome.code == 2 and "BudgetMissed: tier gpu/m: latency_ms is" in outcome.err, outcome
    assert "it was chosen in fp16, but fp16: " in outcome.err and "label_smoothing" in outcome.err
    lower = json.loads((root / "gpu" / "m" / "export.json").read_text())["lower"]
    assert all(
        file["parity"]["tolerance"] >= file["parity"]["max_abs_error"] for file in lower["files"].values()
    )


def test_the_answers_interface_is_the_float_files(original: Path) -> None:
    plain, int8 = (open_session(original / path).get_inputs()[0] for path in (FLOAT, INT8))
    assert (plain.name, plain.type, plain.shape) == (int8.name, int8.type, int8.shape)
