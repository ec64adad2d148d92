"""A stopwatch that remembers untrained networks by content, and times files that ship every time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.costs import bench as bench_module
from pipeline.costs.bench import SHIPPED_PROCESSES, Bench
from pipeline.costs.table import LatencyModel
from pipeline.devices.measure import ATTEMPTS, PAUSE_S, Patience
from pipeline.devices.profile import DeviceProfile
from pipeline.devices.session import RuntimeSettings
from pipeline.errors import MeasurementError
from pipeline.progress import Silent
from pipeline.spaces.mbconv import MBConvSettings, MBConvSpace
from pipeline.types import Arch, LatencyRecord

SPACE = MBConvSpace((1, 8, 8), 3, MBConvSettings(size="tiny", operations=("k3e1",)))
ARCHS = list(SPACE.uniform())[:3]
ENVIRONMENT = {"cpu": "this one"}


def profile(**changed: Any) -> DeviceProfile:
    tiers = [{"name": "s", "limits": {"latency": "1 ms"}}]
    return DeviceProfile.model_validate({"name": "here", "tiers": tiers, **changed})


class Stopwatch:
    """Answers with the number of the call and the place in it; keeps what it was asked. `drifts` are how many
    times as slow as it was the machine is, call by call."""

    def __init__(self, *drifts: float) -> None:
        self.calls: list[dict[str, Any]] = []
        self.drifts = list(drifts)

    def __call__(
        self, models: Sequence[Path], reference: Path | None, settings: RuntimeSettings, **options: Any
    ) -> list[LatencyRecord]:
        content = [path.read_bytes() for path in models]
        assert reference is not None
        self.calls.append(
            {"models": content, "reference": reference.read_bytes(), "settings": settings, **options}
        )
        values = [len(self.calls) + place / 10 for place in range(len(models))]
        drift = self.drifts.pop(0) if self.drifts else 1.0
        return [LatencyRecord(ms, ms, ms, 0.0, 9, 3, 0, ms, drift, "0" * 64) for ms in values]


@pytest.fixture(scope="module")
def model() -> LatencyModel:
    archs = list(SPACE.uniform())[:12]
    costs = [1e-3 * sum(layer.macs for layer in SPACE.layers(arch)) for arch in archs]
    return LatencyModel.fit(SPACE, archs, costs, 16, archs[4], 0.25)


@pytest.fixture(autouse=True)
def quick_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that name what is in them, in place of ONNX."""

    def quick(space: MBConvSpace, arch: Arch, path: Path, profile: DeviceProfile, *, seed: int) -> None:
        path.write_text(f"quick {arch.key} {profile.batch} {seed}")

    def shipped(network: Any, path: Path, *, batch: int | None, **rest: Any) -> None:
        path.write_text(f"shipped {sum(p.numel() for p in network.parameters())} {batch}")

    monkeypatch.setattr(bench_module, "export_for_timing", quick)
    monkeypatch.setattr(bench_module, "export_onnx", shipped)


def make(
    folder: Path, watch: Stopwatch, model: LatencyModel, device: DeviceProfile | None = None, **changed: Any
) -> Bench:
    options = {"cache_dir": folder, "environment": ENVIRONMENT, "progress": Silent(), **changed}
    return Bench(SPACE, device or profile(), model, measure=watch, **options)


def latencies(records: Sequence[LatencyRecord]) -> list[float]:
    return [record.latency_ms for record in records]


def test_networks_are_timed_together_against_the_reference(tmp_path: Path, model: LatencyModel) -> None:
    watch = Stopwatch()
    assert latencies(make(tmp_path, watch, model).time(ARCHS)) == [1.0, 1.1, 1.2]
    [call] = watch.calls
    assert call["models"] == [f"quick {arch.key} 1 0".encode() for arch in ARCHS]
    assert call["reference"] == f"quick {model.reference.key} 1 0".encode()
    assert call["reference_nominal_ms"] == 0.25
    assert call["settings"] == profile().runtime()


def test_a_network_is_timed_once_in_its_life(tmp_path: Path, model: LatencyModel) -> None:
    watch = Stopwatch()
    first = make(tmp_path, watch, model).time(ARCHS[:2])
    again = make(tmp_path, watch, model).time([ARCHS[1], ARCHS[2], ARCHS[0], ARCHS[2]])
    assert again == [first[1], again[1], first[0], again[1]]
    assert [call["models"] for call in watch.calls][1] == [f"quick {ARCHS[2].key} 1 0".encode()]
    assert make(tmp_path, watch, model).time([]) == [] and len(watch.calls) == 2


def test_the_form_that_ships_is_timed_apart(tmp_path: Path, model: LatencyModel) -> None:
    watch = Stopwatch()
    bench = make(tmp_path, watch, model)
    quick = bench.time(ARCHS[:1])[0]
    shipped = bench.time_as_shipped(ARCHS[:1])[0]
    params = sum(p.numel() for p in SPACE.build(ARCHS[0]).parameters())
    assert watch.calls[1]["models"] == [f"shipped {params} 1".encode()]
    assert bench.time(ARCHS[:1]) == [quick] and quick != shipped
    assert len(watch.calls) == 1 + SHIPPED_PROCESSES
    together = bench.time_as_shipped(ARCHS[:2])
    assert together[0] == shipped and len(watch.calls) == 1 + 2 * SHIPPED_PROCESSES
    assert [len(call["models"]) for call in watch.calls] == [1] * len(watch.calls), "one is remembered"


def test_a_device_that_takes_several_images_gets_the_file_for_any_batch(
    tmp_path: Path, model: LatencyModel
) -> None:
    watch = Stopwatch()
    make(tmp_path, watch, model, profile(batch=8)).time_as_shipped(ARCHS[:1])
    assert watch.calls[0]["models"][0].endswith(b" None")


def test_files_are_timed_every_time(tmp_path: Path, model: LatencyModel) -> None:
    watch, file = Stopwatch(), tmp_path / "model.onnx"
    file.write_text("what ships")
    bench = make(tmp_path, watch, model)
    assert latencies(bench.time_files([file])) + latencies(bench.time_files([file])) == [1.0, 2.0]
    assert [call["models"] for call in watch.calls] == [[b"what ships"]] * 2


def test_of_several_processes_the_middle_one_counts(tmp_path: Path, model: LatencyModel) -> None:
    watch, file = Stopwatch(), tmp_path / "model.onnx"
    file.write_text("what ships")
    [found] = make(tmp_path, watch, model).time_files([file], processes=3)
    assert found.latency_ms == 2.0 and found.context["processes_ms"] == [1.0, 2.0, 3.0]
    assert [call["seed"] for call in watch.calls] == [0, 1, 2]


@pytest.mark.parametrize("text", ["", "{", '{"latency_ms": 1.0}', "[]"])
def test_a_damaged_memory_is_measured_again(tmp_path: Path, model: LatencyModel, text: str) -> None:
    watch = Stopwatch()
    make(tmp_path, watch, model).time(ARCHS[:1])
    [entry] = tmp_path.rglob("*.json")
    entry.write_text(text)
    assert latencies(make(tmp_path, watch, model).time(ARCHS[:1])) == [2.0]
    assert latencies(make(tmp_path, watch, model).time(ARCHS[:1])) == [2.0]


def test_what_decides_a_latency_decides_what_is_remembered(tmp_path: Path, model: LatencyModel) -> None:
    slower = LatencyModel(
        model.predictor, model.archs, model.measured_ms, model.held_out, model.reference, 0.3
    )
    made = [
        make(tmp_path, Stopwatch(), model),
        make(tmp_path, Stopwatch(), slower),
        make(tmp_path, Stopwatch(), model, profile(threads=2)),
        make(tmp_path, Stopwatch(), model, profile(opset=21)),
        make(tmp_path, Stopwatch(), model, environment={"cpu": "another"}),
    ]
    assert len({bench.folder for bench in made}) == len(made)
    renamed = make(tmp_path, Stopwatch(), model, profile(name="there", description="the same device"))
    assert renamed.folder == made[0].folder


def test_a_busy_machine_is_waited_for(tmp_path: Path, model: LatencyModel) -> None:
    watch, slept = Stopwatch(1.3, 1.11, 1.05), list[float]()
    records = make(tmp_path, watch, model, patience=Patience(sleep=slept.append)).time(ARCHS[:2])
    assert latencies(records) == [3.0, 3.1] and slept == [PAUSE_S] * 2
    assert make(tmp_path, watch, model).time(ARCHS[:2]) == records, "only what counts is remembered"


def test_a_machine_that_stays_slow_is_no_judge(tmp_path: Path, model: LatencyModel) -> None:
    watch, slept = Stopwatch(*[1.6] * 9), list[float]()
    with pytest.raises(MeasurementError, match=r"profile 'here': the reference network takes 1\.60 times"):
        make(tmp_path, watch, model, patience=Patience(sleep=slept.append)).time(ARCHS[:1])
    assert (len(watch.calls), len(slept)) == (ATTEMPTS, ATTEMPTS - 1)
    assert not list(tmp_path.rglob("*.json"))


def test_a_clock_that_moved_for_good_is_corrected_for(tmp_path: Path, model: LatencyModel) -> None:
    watch, slept = Stopwatch(*[1.3] * 9), list[float]()
    records = make(tmp_path, watch, model, patience=Patience(sleep=slept.append)).time(ARCHS[:1])
    assert len(watch.calls) == ATTEMPTS and records[0].drift == 1.3


def test_a_clock_that_moved_is_waited_for_once(tmp_path: Path, model: LatencyModel) -> None:
    slow, quick = [1.3] * (ATTEMPTS + 1), [1.0]
    watch, slept = Stopwatch(*slow, *quick, *slow), list[float]()
    patience = Patience(sleep=slept.append)
    calls = []
    for arch in (*ARCHS[:3], ARCHS[0]):
        folder = tmp_path / str(len(calls))
        make(folder, watch, model, patience=patience).time([arch])
        calls.append(len(watch.calls))
    waited = ATTEMPTS - 1
    assert np.diff([0, *calls]).tolist() == [ATTEMPTS, 1, 1, ATTEMPTS]
    assert len(slept) == 2 * waited, "and again once it had been as fast as it was"


def test_a_clock_that_comes_and_goes_is_not_waited_for_for_ever(tmp_path: Path, model: LatencyModel) -> None:
    watch, slept = Stopwatch(*[1.3, 1.0] * 9, 1.7, 1.0), list[float]()
    patience = Patience(sleep=slept.append, clock_s=3 * PAUSE_S)
    for number in range(12):  # three times it is waited for and comes back, then taken as it is
        make(tmp_path / str(number), watch, model, patience=patience).time(ARCHS[:1])
    assert len(slept) == 3 and len(watch.calls) == 15
    for number in range(12, 16):
        make(tmp_path / str(number), watch, model, patience=patience).time(ARCHS[:1])
    assert len(slept) == 4, "what would be refused is waited for all the same"


def test_more_than_a_moved_clock_is_waited_for(tmp_path: Path, model: LatencyModel) -> None:
    watch, slept = Stopwatch(*[1.3] * ATTEMPTS, 1.7, 1.3), list[float]()
    patience = Patience(sleep=slept.append)
    for arch in ARCHS[:2]:
        make(tmp_path, watch, model, patience=patience).time([arch])
    assert len(watch.calls) == ATTEMPTS + 2 and len(slept) == ATTEMPTS


def test_nobody_waits_for_a_device_elsewhere(tmp_path: Path, model: LatencyModel) -> None:
    watch, slept = Stopwatch(*[1.3] * 9), list[float]()
    there = profile(measured="elsewhere")
    make(tmp_path, watch, model, there, patience=Patience(sleep=slept.append)).time(ARCHS[:1])
    assert len(watch.calls) == 1 and not slept


def test_a_machine_that_became_faster_is_taken(tmp_path: Path, model: LatencyModel) -> None:
    assert latencies(make(tmp_path, Stopwatch(0.7), model).time(ARCHS[:1])) == [1.0]


def test_an_interrupted_measurement_leaves_nothing_behind(tmp_path: Path, model: LatencyModel) -> None:
    def interrupted(*models: Any, **options: Any) -> list[LatencyRecord]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, interrupted, model).time(ARCHS)  # type: ignore[arg-type]
    assert not list(tmp_path.rglob("*.json"))
