from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from pipeline.devices import measure as protocol
from pipeline.devices.hardware import _numbers, quiet_cores, usable_cores
from pipeline.devices.measure import Measurement, Visit, collect, measure, summarise
from pipeline.devices.session import RuntimeSettings
from pipeline.errors import ExportError, MeasurementError, ProfileError, ProviderError
from pipeline.types import LatencyRecord

SETTINGS = RuntimeSettings()
LOOSE = 10.0  # these tests must pass on a busy machine; repeatability is a benchmark's matter


class Ideal:
    """A network of known latency on a machine whose clock and disturbances are given."""

    sha256 = "0"
    first_run_ms = 9.0
    path = Path("ideal.onnx")

    def __init__(self, latency_ms: float, slowdown: Iterator[float]) -> None:
        self.latency_ms = latency_ms
        self.slowdown = slowdown

    def block(self) -> np.ndarray:
        return np.full(5, self.latency_ms * next(self.slowdown))


def constant(value: float) -> Iterator[float]:
    while True:
        yield value


def collected(network: Ideal, reference: Ideal, rounds: int = 5) -> Measurement:
    return collect([network], reference, rounds=rounds, rng=np.random.default_rng(0))  # type: ignore[list-item, arg-type]


def test_a_slower_clock_cancels_against_the_reference() -> None:
    found = collected(Ideal(0.2, constant(1.3)), Ideal(0.5, constant(1.3)))
    record = summarise(
        Ideal(0.2, constant(1)),  # type: ignore[arg-type]
        found.visits[0],
        found.kept(0),
        level_ms=found.level_ms,
        nominal_ms=0.5,
    )
    assert record["latency_ms"] == pytest.approx(0.2)
    assert record["drift"] == pytest.approx(1.3)
    assert record["p50_ms"] == pytest.approx(0.26)
    assert (record["rounds"], record["discarded_rounds"], record["runs"]) == (5, 0, 25)
    assert record["spread"] == pytest.approx(0)


def test_disturbed_rounds_are_discarded_and_repeated() -> None:
    blocks = iter([1, 1, 1, 1.2, 1.2, 1.2] + [1.0] * 40)  # two blocks of the reference per round
    found = collected(Ideal(0.2, constant(1.0)), Ideal(0.5, blocks))
    assert len(found.kept(0)) == 5
    assert len(found.visits[0]) == 7


def test_one_disturbed_visit_between_quiet_references_is_outvoted() -> None:
    slowdown = iter([1.0, 4.0, 1.0, 1.0, 1.0])
    found = collected(Ideal(0.2, slowdown), Ideal(0.5, constant(1.0)))
    record = summarise(
        Ideal(0.2, constant(1)),  # type: ignore[arg-type]
        found.visits[0],
        found.kept(0),
        level_ms=found.level_ms,
        nominal_ms=0.5,
    )
    assert record["latency_ms"] == pytest.approx(0.2)


def test_a_machine_that_never_rests_is_given_up_with_a_message() -> None:
    def restless() -> Iterator[float]:
        while True:
            yield from (1.0, 1.5)

    network = Ideal(0.2, constant(1.0))
    found = collected(network, Ideal(0.5, restless()))
    assert len(found.visits[0]) == 5 * protocol.ROUNDS_LIMIT
    with pytest.raises(MeasurementError, match=r"ideal\.onnx on core 3: 0 of 20 rounds.*moved by 50%"):
        protocol._require_quiet([network], found, 0.1, (3,))  # type: ignore[list-item]


def test_a_network_that_does_not_repeat_is_refused_naming_the_spread() -> None:
    visits = [Visit(np.full(5, ms), 1.0, 1.0) for ms in (1.0, 1.0, 1.2, 1.4, 1.4)]
    with pytest.raises(MeasurementError, match="spread by 33%, allowed is 10%"):
        protocol._require_quiet(
            [Ideal(1.0, constant(1))],  # type: ignore[list-item]
            Measurement([visits], [1.0, 1.0]),
            0.1,
            (0,),
        )


def measured(models: list[Path], reference: Path, **options: Any) -> list[LatencyRecord]:
    """Really measured, however loosely; skips on a machine where too few rounds are left undisturbed."""
    try:
        return measure(models, reference, SETTINGS, rounds=4, max_spread=LOOSE, **options)
    except MeasurementError as disturbed:
        pytest.skip(f"the machine is too busy to measure: {disturbed}")


def test_records_of_real_files(make_network: Callable[..., Path]) -> None:
    small = make_network("small")
    large = make_network("large", channels=64, blocks=3, size=32)
    seen: list[tuple[int, str]] = []
    labels: list[tuple[str, int]] = []

    class Recording:
        @contextmanager
        def track(self, label: str, total: int, done: int = 0) -> Iterator[Callable[[int, str], None]]:
            labels.append((label, total))
            yield lambda steps, note: seen.append((steps, note))

        def say(self, message: str) -> None: ...

    before = usable_cores()
    first, second = measured([small, large], large, progress=Recording())
    assert usable_cores() == before  # the child was pinned, not this process
    assert second.latency_ms > 3 * first.latency_ms > 0
    assert first.sha256 == hashlib.sha256(small.read_bytes()).hexdigest()
    assert first.p50_ms <= first.p95_ms and first.rounds >= 3 and first.drift == 1.0
    assert labels == [("measure", 10)] and sum(steps for steps, _ in seen) >= 10
    context = first.context
    assert context["onnxruntime"] == onnxruntime.__version__
    assert context["provider"] == "CPUExecutionProvider" and context["threads"] == 1
    assert context["warmup"]["runs"] >= protocol.WARMUP_RUNS
    assert context["reference"]["sha256"] == second.sha256
    if hasattr(os, "sched_setaffinity"):
        assert len(context["cores"]) == 1


def test_a_nominal_reference_scales_latency_and_tells_the_drift(make_network: Callable[..., Path]) -> None:
    model = make_network("model", channels=32, blocks=2)
    (record,) = measured([model], model, reference_nominal_ms=100.0)
    assert record.latency_ms == pytest.approx(100, rel=0.3)  # the reference itself
    assert record.drift == pytest.approx(record.context["reference"]["now_ms"] / 100)
    assert record.p50_ms < 50


def test_a_free_batch_axis_takes_the_settings_batch(make_network: Callable[..., Path]) -> None:
    free = make_network("free", batch="N")
    rng = np.random.default_rng(0)
    network = protocol.Network(free, RuntimeSettings(batch=3), rng)
    network.warm_up()
    assert network.first_run_ms > 0 and len(network.block()) >= protocol.BLOCK_RUNS
    with pytest.raises(ProfileError, match="fixed to batch 1, but 'batch' is 3"):
        protocol.Network(make_network("fixed"), RuntimeSettings(batch=3), rng)
    with pytest.raises(ExportError, match="only the batch may be free"):
        protocol.Network(make_network("odd", batch="N", rest="C"), SETTINGS, rng)


def test_faults_in_the_child_come_back_as_our_errors(
    tmp_path: Path, make_network: Callable[..., Path]
) -> None:
    junk = tmp_path / "junk.onnx"
    junk.write_bytes(b"junk")
    with pytest.raises(ProviderError, match=r"junk\.onnx"):
        measure([junk], None, SETTINGS)
    with pytest.raises(MeasurementError, match="cannot be read"):
        measure([tmp_path / "absent.onnx"], None, SETTINGS)
    with pytest.raises(ProfileError, match="'threads' is 999"):
        measure([make_network("a")], None, RuntimeSettings(threads=999))


def test_a_child_that_dies_is_reported_with_its_last_words(
    make_network: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho first >&2\necho no numpy here >&2\nexit 7\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    with pytest.raises(MeasurementError, match=r"process ended \(exit 7\): no numpy here"):
        measure([make_network("a")], None, SETTINGS)


def test_nothing_to_measure() -> None:
    assert measure([], None, SETTINGS) == []


def test_the_child_is_not_tuned_by_its_parents_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "0")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    environment = protocol._child_environment()
    assert "MALLOC_MMAP_MAX_" not in environment and "OMP_NUM_THREADS" not in environment
    assert environment["PYTHONPATH"].split(os.pathsep)[1:] == ["elsewhere"]


def test_the_child_ends_with_its_parent_and_starts_quickly(make_network: Callable[..., Path]) -> None:
    heavy = "{'torch', 'pydantic', 'yaml', 'scipy', 'onnx'}"
    code = f"import sys, pipeline.devices.worker; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=protocol._child_environment())
    child = subprocess.Popen(
        [sys.executable, "-m", "pipeline.devices.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=protocol._child_environment(),
    )
    assert child.stdin is not None and child.stdout is not None
    models = ", ".join([f'"{make_network("a")}"'] * 50)  # ten seconds of work at least
    request = (
        f'{{"models": [{models}], "reference": null, "settings": {{}}, "rounds": 9, "seed": 0, '
        '"reference_nominal_ms": null, "max_spread": 1}\n'
    )
    child.stdin.write(request.encode())
    child.stdin.flush()
    child.stdout.readline()
    began = time.monotonic()
    child.stdin.close()
    assert child.wait(timeout=5) == 1
    assert time.monotonic() - began < 5
    child.stdout.close()


def test_quiet_cores_are_cores_of_this_process() -> None:
    cores = usable_cores()
    assert set(quiet_cores(1)) <= set(cores) and len(quiet_cores(1)) == 1
    assert quiet_cores(len(cores)) == cores


def test_ranges_of_cores() -> None:
    assert _numbers("0,4-6") == [0, 4, 5, 6]
    assert _numbers("") == []
