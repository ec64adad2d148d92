"""An exported file beside what its space says of it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx

from pipeline.costs.counts import FLOAT_BYTES, weight_bytes
from pipeline.spaces.base import SearchSpace, Traced
from pipeline.types import Arch

KINDS = {
    "Conv": "conv",
    "Gemm": "linear",
    "Relu": "activation",
    "BatchNormalization": "norm",
    **dict.fromkeys(("Add", "Sub"), "add"),
    **dict.fromkeys(("AveragePool", "MaxPool", "GlobalAveragePool"), "pool"),
    **dict.fromkeys(("Concat", "Slice"), "other"),
    "Flatten": "view",
}


def check_file(path: Path, space: SearchSpace, arch: Arch) -> None:
    """Its operators are those of `trace`, its numbers those of `layers`."""
    assert isinstance(space, Traced)
    graph, layers = onnx.load(path).graph, space.layers(arch)
    folded = sum(layer.kind == "norm" and layer.normalised for layer in layers)
    told = Counter(step.kind for step in space.trace(arch)) - Counter({"input": 1, "norm": folded})
    assert Counter(KINDS[node.op_type] for node in graph.node) == told
    numbers = [onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer]
    floats = sum(array.size for array in numbers if array.dtype == np.float32)
    assert FLOAT_BYTES * floats == weight_bytes(layers)
