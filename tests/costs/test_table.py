from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from pipeline.artifacts import sha256_file
from pipeline.costs.counts import summarise
from pipeline.costs.latency import HeldOutError
from pipeline.costs.table import SpaceCosts, build_cost_table, export_for_timing
from pipeline.devices.profile import DeviceProfile
from pipeline.devices.session import RuntimeSettings
from pipeline.errors import ConfigError, CorruptArtifact, StaleArtifact
from pipeline.progress import Silent
from pipeline.spaces.mbconv import MBConvSettings, MBConvSpace
from pipeline.types import Arch, Json, LatencyRecord

NETWORKS = 8
MACHINE: Json = {"cpu": "test", "onnxruntime": "1"}


def profile(**changes: Any) -> DeviceProfile:
    tiers = [{"name": "s", "limits": {"params": "20 k"}}]
    return DeviceProfile.model_validate({"name": "here", "tiers": tiers, **changes})


class FakeMeasure:
    """A device whose latency is a microsecond per kilobyte of file, and 10 us on top."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(
        self,
        models: Sequence[Path],
        reference: Path | None,
        settings: RuntimeSettings,
        *,
        rounds: int,
        seed: int,
        reference_nominal_ms: float | None = None,
        max_spread: float = 0.1,
        progress: object = None,
    ) -> list[LatencyRecord]:
        self.calls += 1
        assert reference in models and settings.batch == 2
        context = {"reference": {"now_ms": self.latency(reference)}}
        return [
            LatencyRecord(
                self.latency(path), 1, 1, 0, 1, rounds, 0, 1, 1, sha256=sha256_file(path), context=context
            )
            for path in models
        ]

    @staticmethod
    def latency(path: Path | None) -> float:
        assert path is not None
        weights = onnx.load(path).graph.initializer
        return 0.01 + 1e-6 * sum(onnx.numpy_helper.to_array(tensor).nbytes for tensor in weights)


@pytest.fixture(scope="module")
def space() -> MBConvSpace:
    return MBConvSpace((1, 8, 8), 4, MBConvSettings(size="tiny"))


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("costs")


def build(
    space: MBConvSpace, cache_dir: Path, measure: FakeMeasure, **changes: Any
) -> tuple[SpaceCosts, Json]:
    given: dict[str, Any] = {
        "profile": profile(batch=2),
        "networks": NETWORKS,
        "environment": MACHINE,
        "seed": 0,
        **changes,
    }
    device = given.pop("profile")
    return build_cost_table(space, device, cache_dir=cache_dir, measure=measure, progress=Silent(), **given)


@pytest.fixture(scope="module")
def built(space: MBConvSpace, cache_dir: Path) -> tuple[SpaceCosts, Json]:
    return build(space, cache_dir, FakeMeasure())


def members(space: MBConvSpace, n: int) -> list[Arch]:
    rng = np.random.default_rng(0)
    return [Arch(space.name, tuple(int(rng.integers(len(s.choices))) for s in space.slots)) for _ in range(n)]


def test_columns_are_the_counts_and_the_predicted_latency(
    space: MBConvSpace, built: tuple[SpaceCosts, Json]
) -> None:
    table, _ = built
    archs = members(space, 20)
    costs = table.of(archs)
    assert table.metrics == ("params", "flops", "weight_bytes", "latency_ms")
    assert costs.shape == (20, 4)
    assert costs[:, :3].tolist() == [list(map(float, summarise(space.layers(arch)))) for arch in archs]
    assert table.latency is not None
    predicted = table.latency.predictor.predict([space.layers(arch) for arch in archs])
    np.testing.assert_allclose(costs[:, 3], predicted, rtol=1e-12)
    np.testing.assert_array_equal(table.of(archs[::-1]), costs[::-1])
    assert table.of([]).shape == (0, 4)
    assert table.additive is None


def test_record_says_how_it_was_measured(space: MBConvSpace, built: tuple[SpaceCosts, Json]) -> None:
    _, record = built
    json.dumps(record, allow_nan=False)
    latency = record["latency"]
    assert record["from_cache"] is False
    assert (
        len(latency["networks"]) == latency["held_out"]["networks"] == len(record["measurements"]) == NETWORKS
    )
    assert record["identity"]["environment"] == MACHINE
    reference = Arch.from_json(latency["reference"])
    assert [list(reference.choices), latency["reference"]["latency_ms"]] in latency["networks"]
    assert record["seconds"] > 0


def test_reference_can_be_written_again_and_torch_is_left_alone(
    space: MBConvSpace, built: tuple[SpaceCosts, Json], tmp_path: Path
) -> None:
    table, record = built
    assert table.latency is not None
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    export_for_timing(space, table.latency.reference, tmp_path / "r.onnx", profile(batch=2), seed=0)
    assert torch.equal(before, torch.random.get_rng_state())
    assert sha256_file(tmp_path / "r.onnx") in {measured["sha256"] for measured in record["measurements"]}


def test_the_same_again_comes_from_the_cache(
    space: MBConvSpace, cache_dir: Path, built: tuple[SpaceCosts, Json]
) -> None:
    measure = FakeMeasure()
    table, record = build(space, cache_dir, measure)
    assert measure.calls == 0
    assert record == {**built[1], "from_cache": True}
    archs = members(space, 5)
    np.testing.assert_array_equal(table.of(archs), built[0].of(archs))


def test_another_machine_or_a_broken_entry_is_measured_again(
    space: MBConvSpace, tmp_path: Path, built: tuple[SpaceCosts, Json]
) -> None:
    measure = FakeMeasure()
    build(space, tmp_path, measure, networks=3)
    build(space, tmp_path, measure, networks=3, environment={"cpu": "another"})
    assert measure.calls == 2
    for entry in tmp_path.iterdir():
        entry.write_text(entry.read_text()[:200])
    build(space, tmp_path, measure, networks=3)
    assert measure.calls == 3


def test_without_a_device_only_counts_are_known(space: MBConvSpace, tmp_path: Path) -> None:
    measure = FakeMeasure()
    table, record = build(space, tmp_path, measure, profile=profile(provider="none"))
    assert table.metrics == ("params", "flops", "weight_bytes")
    assert table.of(members(space, 3)).shape == (3, 3)
    assert record["latency"] is None and measure.calls == 0


def test_more_measurements_refit_against_the_same_reference(
    space: MBConvSpace, built: tuple[SpaceCosts, Json]
) -> None:
    model = built[0].latency
    assert model is not None
    archs = [arch for arch in members(space, 10) if arch not in model.archs]
    wanted = 2 * model.predictor.predict([space.layers(arch) for arch in archs])
    refitted = model.with_measurements(space, archs, wanted.tolist())
    after = refitted.predictor.predict([space.layers(arch) for arch in archs])
    assert HeldOutError.of(after, wanted).mape < 0.5
    assert (refitted.reference, refitted.reference_ms) == (model.reference, model.reference_ms)
    assert len(refitted.archs) == len(model.archs) + len(set(archs))


def test_json_round_trip_and_its_refusals(space: MBConvSpace, built: tuple[SpaceCosts, Json]) -> None:
    table, _ = built
    record = json.loads(json.dumps(table.to_json()))
    again = SpaceCosts.from_json(record, space)
    archs = members(space, 5)
    np.testing.assert_array_equal(again.of(archs), table.of(archs))
    assert again.latency == table.latency
    with pytest.raises(StaleArtifact, match="another space"):
        SpaceCosts.from_json(record, MBConvSpace((1, 8, 8), 5, MBConvSettings(size="tiny")))
    del record["latency"]["reference"]
    with pytest.raises(CorruptArtifact, match="incomplete"):
        SpaceCosts.from_json(record, space)


def test_a_part_is_worked_out_once(space: MBConvSpace, monkeypatch: pytest.MonkeyPatch) -> None:
    costs, archs = SpaceCosts(space, None), members(space, 5)
    before = costs.of(archs)

    def again(part: int, choices: tuple[int, ...]) -> None:
        raise AssertionError(f"part {part} with {choices} was known")

    monkeypatch.setattr(space, "part_layers", again)
    np.testing.assert_array_equal(costs.of(archs), before)


def test_foreign_architectures_are_refused(built: tuple[SpaceCosts, Json]) -> None:
    table, space = built[0], built[0].space
    last = len(space.slots[-1].choices)
    for stranger in (
        Arch("another", (0, 0)),
        Arch("another", space.smallest.choices),
        Arch(space.name, space.smallest.choices[:-1]),
        Arch(space.name, (*space.smallest.choices[:-1], last)),
        Arch(space.name, (-1, *space.smallest.choices[1:])),
    ):
        with pytest.raises(ConfigError):
            table.of([space.smallest, stranger])


def test_predicted_latency_is_summed_over_the_parts(
    space: MBConvSpace, built: tuple[SpaceCosts, Json]
) -> None:
    archs = members(space, 10)
    model = built[0].latency
    assert model is not None
    wanted = model.predictor.predict([space.layers(arch) for arch in archs])
    np.testing.assert_allclose(built[0].of(archs)[:, -1], wanted, rtol=1e-12)
    assert built[0].of([]).shape == (0, 4)
