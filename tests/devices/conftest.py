"""Small convolutional networks as ONNX files, written without torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper, save

MakeNetwork = Callable[..., Path]


@pytest.fixture
def make_network(tmp_path: Path) -> MakeNetwork:
    """Write a chain of 3×3 convolutions; a `batch` or `rest` (image channels) in letters is a free axis."""

    def make(
        name: str,
        channels: int = 8,
        blocks: int = 1,
        size: int = 16,
        batch: int | str = 1,
        rest: int | str = 3,
    ) -> Path:
        rng = np.random.default_rng(blocks)
        widths = [3] + [channels] * blocks
        nodes, weights, last = [], [], "image"
        for i in range(blocks):
            kernel = rng.normal(size=(channels, widths[i], 3, 3)).astype(np.float32)
            weights.append(numpy_helper.from_array(kernel / 100, f"w{i}"))
            nodes.append(helper.make_node("Conv", [last, f"w{i}"], [f"c{i}"], pads=[1, 1, 1, 1]))
            nodes.append(helper.make_node("Relu", [f"c{i}"], [f"r{i}"]))
            last = f"r{i}"
        nodes.append(helper.make_node("GlobalAveragePool", [last], ["output"]))
        image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [batch, rest, size, size])
        output = helper.make_tensor_value_info("output", TensorProto.FLOAT, [batch, channels, 1, 1])
        graph = helper.make_graph(nodes, name, [image], [output], weights)
        path = tmp_path / f"{name}.onnx"
        save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
        return path

    return make
