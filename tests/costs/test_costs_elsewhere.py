"""Costs on a device that is not this machine: from kits, and with a margin where nothing can be timed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from board import BOARD, carried_out

from pipeline.costs.bench import Bench
from pipeline.costs.table import (
    MARGIN_MAPES,
    CautiousCosts,
    LatencyModel,
    SpaceCosts,
    build_cost_table,
    export_for_timing,
)
from pipeline.devices.kit import Elsewhere, import_results
from pipeline.devices.profile import DeviceProfile
from pipeline.errors import AwaitingDevice, MeasurementError
from pipeline.progress import Silent
from pipeline.spaces.mbconv import MBConvSettings, MBConvSpace
from pipeline.types import Arch, LatencyRecord

SPACE = MBConvSpace((1, 8, 8), 3, MBConvSettings(size="tiny", operations=("k3e1",)))
ARCHS = tuple(dict.fromkeys(SPACE.uniform()))[:12]
NETWORKS = 8


def board() -> DeviceProfile:
    tiers = [{"name": "s", "limits": {"latency": "1 ms"}}]
    return DeviceProfile.model_validate({"name": "board", "measured": "elsewhere", "tiers": tiers})


def known_ms(path: Path) -> float:
    """0.01 ms, and a nanosecond per weight."""
    weights = onnx.load(str(path)).graph.initializer
    return 0.01 + 1e-6 * sum(int(np.prod(weight.dims)) for weight in weights)


def build(cache_dir: Path, device: Elsewhere) -> SpaceCosts:
    table, _ = build_cost_table(
        SPACE,
        board(),
        cache_dir=cache_dir,
        measure=device,
        environment=device.environment,
        networks=NETWORKS,
        seed=0,
        progress=Silent(),
    )
    return table


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that knows the board."""
    cache_dir = tmp_path_factory.mktemp("costs")
    device = Elsewhere(board(), cache_dir, cache_dir / "kit.zip")
    with pytest.raises(AwaitingDevice, match=f"{NETWORKS} networks wait to be timed on 'board': copy"):
        build(cache_dir, device)
    import_results(carried_out(cache_dir / "kit.zip", cache_dir / "there", known_ms), cache_dir, board())
    return cache_dir


@pytest.fixture(scope="module")
def table(cache_dir: Path) -> SpaceCosts:
    return build(cache_dir, Elsewhere(board(), cache_dir, cache_dir / "kit.zip"))


def test_the_table_is_fitted_to_what_came_back(
    table: SpaceCosts, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = table.latency
    assert model is not None and len(model.archs) == NETWORKS
    assert model.reference_ms == dict(zip(model.archs, model.measured_ms, strict=True))[model.reference]
    monkeypatch.setattr(Elsewhere, "__call__", None)
    again = build(cache_dir, Elsewhere(board(), cache_dir, cache_dir / "again.zip"))
    assert again.latency == model, "from the cache, without asking anyone"


def test_files_that_ship_make_the_journey_and_are_judged_by_the_reference(
    table: SpaceCosts, cache_dir: Path, tmp_path: Path
) -> None:
    assert table.latency is not None
    device = Elsewhere(board(), cache_dir, tmp_path / "kit.zip")
    assert device.environment == BOARD
    bench = Bench(
        SPACE,
        board(),
        table.latency,
        cache_dir=cache_dir,
        environment=device.environment,
        measure=device,
        progress=Silent(),
    )
    shipped = tmp_path / "model.onnx"
    export_for_timing(SPACE, ARCHS[3], shipped, board(), seed=5)
    with pytest.raises(AwaitingDevice, match="1 network waits"):
        bench.time_files([shipped])
    slower = carried_out(tmp_path / "kit.zip", tmp_path / "slow", lambda path: 1.2 * known_ms(path))
    import_results(slower, cache_dir)
    [record] = bench.time_files([shipped])
    assert record.drift == pytest.approx(1.2)
    assert record.latency_ms == pytest.approx(known_ms(shipped)), "corrected for the slow hour"
    disturbed = carried_out(tmp_path / "kit.zip", tmp_path / "busy", lambda path: 1.7 * known_ms(path))
    with pytest.raises(MeasurementError, match=r"was 1\.70 times slower than when it was calibrated"):
        import_results(disturbed, cache_dir)
    assert bench.time_files([shipped]) == [record], "what was known stays"


def record_of(ms: float) -> LatencyRecord:
    return LatencyRecord(ms, ms, ms, 0.0, 9, 3, 0, ms, 1.0, "0" * 64)


def test_what_finished_networks_took_is_kept(table: SpaceCosts, tmp_path: Path) -> None:
    assert table.latency is not None
    given: dict[str, Any] = {
        "environment": BOARD,
        "measure": None,
        "progress": Silent(),
        "cache_dir": tmp_path,
    }
    bench = Bench(SPACE, board(), table.latency, **given)
    assert bench.kept_ms() == {}
    for arch, ms in ((ARCHS[0], 0.2), (ARCHS[1], 0.4), (ARCHS[0], 0.3)):
        bench.keep(arch, record_of(ms))
    (bench.folder / "bad-kept.json").write_text("{")
    assert Bench(SPACE, board(), table.latency, **given).kept_ms() == {ARCHS[0]: 0.3, ARCHS[1]: 0.4}


# ------------------------------------------------------------------------------------------------- the margin


@pytest.fixture(scope="module")
def imperfect() -> SpaceCosts:
    """A table whose predictor errs by some per cent."""
    rng = np.random.default_rng(0)
    exact = [0.01 + 1e-6 * sum(layer.macs for layer in SPACE.layers(arch)) for arch in ARCHS]
    measured = [ms * float(rng.uniform(0.94, 1.06)) for ms in exact]
    return SpaceCosts(SPACE, LatencyModel.fit(SPACE, ARCHS, measured, 16, ARCHS[4], 0.25))


def test_a_prediction_is_raised_by_a_margin_and_counts_are_not(imperfect: SpaceCosts) -> None:
    cautious = CautiousCosts(imperfect, {})
    assert imperfect.latency is not None
    assert cautious.margin == MARGIN_MAPES * imperfect.latency.held_out.mape > 0
    plain, raised = imperfect.of(ARCHS), cautious.of(ARCHS)
    np.testing.assert_array_equal(raised[:, :3], plain[:, :3])
    np.testing.assert_allclose(raised[:, 3], plain[:, 3] * (1 + cautious.margin))
    assert cautious.metrics == imperfect.metrics and cautious.additive is None
    np.testing.assert_array_equal(imperfect.of(ARCHS), plain, "the table's own rows are left alone")


def test_the_margin_covers_nearly_all_errors_on_networks_that_were_left_out(imperfect: SpaceCosts) -> None:
    model = imperfect.latency
    assert model is not None
    short = 0
    for left in range(len(ARCHS)):
        keep = [i for i in range(len(ARCHS)) if i != left]
        fitted = LatencyModel.fit(
            SPACE, [ARCHS[i] for i in keep], [model.measured_ms[i] for i in keep], 16, ARCHS[keep[0]], 0.25
        )
        table = SpaceCosts(SPACE, fitted)
        short += CautiousCosts(table, {}).of([ARCHS[left]])[0, 3] < model.measured_ms[left]
    assert short <= 1


def test_what_was_found_replaces_the_prediction_and_widens_the_margin(imperfect: SpaceCosts) -> None:
    predicted = imperfect.of(ARCHS)[:, 3]
    found: dict[Arch, float] = {ARCHS[2]: 1.3 * predicted[2], ARCHS[3]: 0.9 * predicted[3]}
    cautious = CautiousCosts(imperfect, found)
    assert cautious.margin == pytest.approx(0.3)
    costs = cautious.of(ARCHS)[:, 3]
    assert costs[2] == found[ARCHS[2]] and costs[3] == found[ARCHS[3]]
    np.testing.assert_allclose(costs[5], 1.3 * predicted[5])
    assert CautiousCosts(imperfect, {ARCHS[2]: 9 * predicted[2]}).margin == 0.5
