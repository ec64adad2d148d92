from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sample_run import latency_record, linear_onnx

from pipeline.artifacts import read_json, sha256_file, write_json
from pipeline.devices.environment import describe_environment
from pipeline.devices.hardware import cpu_model
from pipeline.devices.measure import ATTEMPTS, Patience
from pipeline.devices.session import RuntimeSettings, open_session
from pipeline.errors import ConfigError, ProviderError, RunFolderError
from pipeline.report.manifest import MANIFEST
from pipeline.report.verify import CheckResult, failed, verify
from pipeline.types import LatencyRecord


class Clock:
    """A `measure` that answers with given latencies and keeps what it was asked."""

    def __init__(self, *latencies_ms: float, drift: float = 1.0) -> None:
        self.latencies_ms, self.drift = latencies_ms, drift
        self.asked: list[tuple[list[str], Path | None, RuntimeSettings, float | None]] = []

    def __call__(
        self,
        models: Sequence[Path],
        reference: Path | None,
        settings: RuntimeSettings,
        /,
        *,
        reference_nominal_ms: float | None = None,
    ) -> list[LatencyRecord]:
        self.asked.append(([path.parent.name for path in models], reference, settings, reference_nominal_ms))
        records = [
            latency_record(ms, sha256_file(path)) for ms, path in zip(self.latencies_ms, models, strict=True)
        ]
        for record in records:
            object.__setattr__(record, "drift", self.drift)
        return records


def in_time() -> Clock:
    return Clock(0.14, 0.29, 0.6)


def edit(run: Path, change: Any) -> None:
    record = read_json(run / MANIFEST)
    change(record)
    write_json(run / MANIFEST, record)


def failures(results: list[CheckResult]) -> list[tuple[str, str]]:
    return [(result.tier, result.check) for result in failed(results)]


def test_a_sound_run_passes_every_check(run: Path) -> None:
    clock = in_time()
    results = verify(run, measure=clock)
    assert [result for result in results if result.ok is not True] == []
    # per tier: 4 files, 2 graphs, 2 times logits, params, latency
    assert len(results) == 1 + 3 * (4 + 2 + 2 + 1 + 1)
    assert clock.asked == [(["S", "M", "L"], None, RuntimeSettings(), None)]


def test_a_changed_file_is_found_and_not_run(run: Path) -> None:
    model = run / "cpu-1thread/M/model.batch1.onnx"
    model.write_bytes(model.read_bytes() + b" ")
    opened: list[Path] = []

    def watched(path: Path, **options: Any) -> Any:
        opened.append(path)
        return open_session(path, **options)

    clock = Clock(0.14, 0.6)
    results = verify(run, measure=clock, open_session=watched)
    assert failures(results) == [
        ("cpu-1thread/M", "file cpu-1thread/M/model.batch1.onnx"),
        ("cpu-1thread/M", "budget latency_ms, measured here"),
    ]
    assert model not in opened and len(opened) == 5
    assert clock.asked[0][0] == ["S", "L"]
    assert "not the recorded one" in failed(results)[1].came


def test_a_missing_file_is_found(run: Path) -> None:
    (run / "cpu-1thread/L/weights.safetensors").unlink()
    missing = failed(verify(run, measure=in_time()))
    assert [(m.check, m.came) for m in missing] == [("file cpu-1thread/L/weights.safetensors", "not there")]


def replace_model(run: Path, content: bytes) -> None:
    """Another network under the name of tier S's dynamic file, its hash recorded as if it were right."""
    path = run / "cpu-1thread/S/model.onnx"
    path.write_bytes(content)

    def change(record: Any) -> None:
        record["tiers"][0]["files"][0]["sha256"] = sha256_file(path)

    edit(run, change)


def test_wrong_logits_are_found(run: Path) -> None:
    weights_FC = np.random.default_rng(99).normal(size=(4, 3)).astype(np.float32)
    replace_model(run, linear_onnx(weights_FC, "batch"))
    wrong = failed(verify(run, remeasure=False))
    assert [result.check for result in wrong] == ["logits cpu-1thread/S/model.onnx"]
    assert wrong[0].wanted == "logits within 0.0001" and wrong[0].came.startswith("off by")


def test_a_file_that_is_no_network_is_found(run: Path) -> None:
    replace_model(run, b"no network")
    checks = [result.check for result in failed(verify(run, remeasure=False))]
    assert checks == ["graph cpu-1thread/S/model.onnx", "logits cpu-1thread/S/model.onnx"]


def test_the_files_own_tolerance_counts(run: Path) -> None:
    def shift(path: Path, **options: Any) -> Any:
        session = open_session(path, **options)

        class Shifted:
            get_inputs = session.get_inputs

            def run(self, names: Any, feeds: Any) -> Any:
                return [session.run(names, feeds)[0] + np.float32(0.01)]

        return Shifted()

    assert len(failed(verify(run, remeasure=False, open_session=shift))) == 6

    def allow(record: Any) -> None:
        for tier in record["tiers"]:
            for file in tier["files"][:2]:
                file["parity"]["tolerance"] = 0.02

    edit(run, allow)
    assert failed(verify(run, remeasure=False, open_session=shift)) == []


@pytest.mark.parametrize(("off", "wrong"), [(0.004, 0), (1.0, 6)])
def test_float32_is_less_exact_on_an_accelerator(run: Path, off: float, wrong: int) -> None:
    """NVIDIA's GPUs multiply in TF32 unless told otherwise: 0.4 % off is sound there, and nothing here."""

    def scaled(path: Path, **options: Any) -> Any:
        session = open_session(path)

        class Scaled:
            get_inputs = session.get_inputs

            def run(self, names: Any, feeds: Any) -> Any:
                return [session.run(names, feeds)[0] * np.float32(1 + off)]

        return Scaled()

    assert len(failed(verify(run, remeasure=False, open_session=scaled))) == 6
    edit(run, lambda record: record["profiles"]["cpu-1thread"].update(provider="CUDAExecutionProvider"))
    assert len(failed(verify(run, remeasure=False, open_session=scaled))) == wrong


def test_without_samples_logits_are_not_checked(run: Path) -> None:
    edit(run, lambda record: record["tiers"][0]["files"].pop())
    results = [
        r for r in verify(run, remeasure=False) if r.tier == "cpu-1thread/S" and r.check.startswith("logits")
    ]
    assert [result.ok for result in results] == [None, None]
    assert failed(results) == []


def test_a_budget_missed_here_is_found(run: Path) -> None:
    missed = failed(verify(run, measure=Clock(0.14, 0.301, 0.6)))
    assert [(m.tier, m.wanted) for m in missed] == [("cpu-1thread/M", "≤ 0.300 ms")]
    assert missed[0].came.startswith("0.301 ms")


def test_a_miss_smaller_than_the_digits_shown_is_told_in_full(run: Path) -> None:
    missed = failed(verify(run, measure=Clock(0.14, 0.30001, 0.6)))
    assert missed[0].wanted == "≤ 0.3" and missed[0].came.startswith("0.30001")


def test_a_recorded_budget_that_is_not_kept_is_found(run: Path) -> None:
    def shrink(record: Any) -> None:
        record["tiers"][2]["budgets"]["params"] = 400_000

    edit(run, shrink)
    missed = failed(verify(run, remeasure=False))
    assert [(m.tier, m.check, m.wanted, m.came) for m in missed] == [
        ("cpu-1thread/L", "budget params", "≤ 400 k", "411 k")
    ]


def with_reference(run: Path) -> Path:
    reference = run / "costs/reference.onnx"
    reference.parent.mkdir()
    reference.write_bytes(b"reference")

    def change(record: Any) -> None:
        record["costs"]["cpu-1thread"]["reference"] = {
            "path": "costs/reference.onnx",
            "sha256": sha256_file(reference),
            "nominal_ms": 0.2,
        }

    edit(run, change)
    return reference


def made_here(run: Path, timed_on: str) -> None:
    """The manifest on this machine, its latencies on a processor of this name."""

    def change(record: Any) -> None:
        record["environment"] = describe_environment()
        for latency in (file["latency"] for tier in record["tiers"] for file in tier["files"]):
            if latency is not None:
                latency["context"]["cpu"] = timed_on

    edit(run, change)


def test_the_recorded_reference_corrects_a_slow_moment(run: Path) -> None:
    reference = with_reference(run)
    clock = Clock(
        0.14, 0.29, 0.59, drift=1.06
    )  # 0.59 x 1.06 > 0.6: the moment's clock is not the network's fault
    assert failed(verify(run, measure=clock)) == []
    assert clock.asked[0][1] == reference.resolve() and clock.asked[0][3] == 0.2


def test_the_reference_does_not_excuse_a_slower_machine(run: Path) -> None:
    with_reference(run)
    missed = failed(verify(run, measure=Clock(0.14, 0.29, 0.59, drift=1.5)))
    assert [result.tier for result in missed] == [f"cpu-1thread/{name}" for name in "SML"]
    assert missed[0].came.startswith("0.210 ms") and "1.50 times" in missed[0].came


def test_a_slow_hour_of_the_run_s_own_machine_is_waited_for_and_corrected(run: Path) -> None:
    with_reference(run)
    made_here(run, cpu_model())
    slept: list[float] = []
    clock = Clock(0.14, 0.29, 0.59, drift=1.4)
    results = verify(run, measure=clock, patience=Patience(sleep=slept.append))
    assert failed(results) == [] and len(clock.asked) == ATTEMPTS == len(slept) + 1
    [note] = [
        result.came for result in results if result.tier == "cpu-1thread/S" and "measured" in result.check
    ]
    assert note.startswith("0.140 ms") and "corrected, since the reference takes 1.40 times" in note
    too_slow = Clock(0.14, 0.29, 0.59, drift=1.6)
    assert len(failed(verify(run, measure=too_slow, patience=Patience(attempts=1)))) == 3


def test_a_device_of_another_processor_is_not_this_machine(run: Path) -> None:
    """Where the manifest was written here, but not the device's latencies: on a cluster's node, or before the
    folder came here. A slower machine is not excused then."""
    with_reference(run)
    made_here(run, "another one")
    clock = Clock(0.14, 0.29, 0.59, drift=1.4)
    refuse = Patience(sleep=lambda seconds: pytest.fail("waited"))
    assert len(failed(verify(run, measure=clock, patience=refuse))) == 3


def test_another_machine_is_not_waited_for(run: Path) -> None:
    with_reference(run)
    clock = Clock(0.14, 0.29, 0.59, drift=1.5)
    verify(run, measure=clock, patience=Patience(sleep=lambda seconds: pytest.fail("waited")))
    assert len(clock.asked) == 1


def test_a_changed_reference_is_left_out(run: Path) -> None:
    with_reference(run).write_bytes(b"another")
    clock = in_time()
    verify(run, measure=clock)
    assert clock.asked[0][1] is None and clock.asked[0][3] is None


def test_a_provider_that_is_not_here_fails_its_checks(run: Path) -> None:
    def refuse(*args: Any, **options: Any) -> Any:
        raise ProviderError("no such provider here")

    results = failed(verify(run, measure=refuse, open_session=refuse))
    assert len(results) == 3 * 2 + 3
    assert all("no such provider here" in result.came for result in results)


def test_every_core_and_no_device(run: Path) -> None:
    def change(record: Any) -> None:
        record["profiles"]["cpu-1thread"] |= {"provider": "none", "threads": None}

    edit(run, change)
    clock = in_time()
    assert failed(verify(run, measure=clock)) == []
    assert clock.asked[0][2].provider == "CPUExecutionProvider" and clock.asked[0][2].threads >= 1


def test_one_device_of_several(run: Path) -> None:
    def change(record: Any) -> None:
        record["profiles"]["pi"] = record["profiles"]["cpu-1thread"] | {"threads": 4}
        record["tiers"][1]["device"] = "pi"

    edit(run, change)
    clock = Clock(0.29)
    results = verify(run, device="pi", measure=clock)
    assert {result.tier for result in results} == {"", "pi/M"}
    assert clock.asked[0][2].threads == 4
    with pytest.raises(ConfigError, match="'gpu'"):
        verify(run, device="gpu")


def test_a_manifest_that_cannot_be_trusted_is_the_only_result(run: Path) -> None:
    edit(run, lambda record: record.pop("tiers"))
    results = verify(run)
    assert [(result.check, result.ok) for result in results] == [("schema", False)]
    assert "tiers" in results[0].came


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError):
        verify(tmp_path / "nothing")
