"""The memory that a process really has, and what of it is a network's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from pipeline.devices.hardware import resident_bytes
from pipeline.devices.measure import Network, measure
from pipeline.devices.session import RuntimeSettings
from pipeline.errors import MeasurementError

MEBIBYTE = 2**20

pytestmark = pytest.mark.skipif(resident_bytes() is None, reason="this system does not tell resident memory")


def resident() -> int:
    found = resident_bytes()
    assert found is not None
    return found


def matrix_product(path: Path, mebibytes: int) -> Path:
    """Images of 1 KiB through a matrix of that size."""
    weights = np.ones((256, mebibytes * 1024), np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["images", "w"], ["logits"])],
        "product",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 256])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, weights.shape[1]])],
        [numpy_helper.from_array(weights, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    path.write_bytes(model.SerializeToString())
    return path


def test_it_grows_with_what_is_kept_and_shrinks_with_what_is_given_back() -> None:
    before = resident()
    kept = np.ones(32 * MEBIBYTE, np.uint8)
    grown = resident()
    assert 30 * MEBIBYTE < grown - before < 40 * MEBIBYTE
    del kept
    assert resident() < before + 4 * MEBIBYTE


def test_a_network_s_share_holds_its_weights(tmp_path: Path) -> None:
    rng, settings = np.random.default_rng(0), RuntimeSettings()
    small, large = (
        Network(matrix_product(tmp_path / f"{size}.onnx", size), settings, rng) for size in (1, 16)
    )
    for network in (small, large):
        assert network.resident_bytes is None
        network.warm_up()
    assert small.resident_bytes is not None and large.resident_bytes is not None
    assert large.resident_bytes > 16 * MEBIBYTE


def test_it_is_in_a_record_s_context(tmp_path: Path) -> None:
    path = matrix_product(tmp_path / "a.onnx", 2)
    try:
        [record] = measure([path], None, RuntimeSettings(), rounds=1, max_spread=1e9)
    except MeasurementError as busy:
        pytest.skip(str(busy))
    assert record.context["resident_bytes"] > MEBIBYTE
