from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from pipeline.deploy.graph import clean


def pooling_model(axes: list[int], keepdims: int) -> onnx.ModelProto:
    """Mean over constant `axes`, of images scaled through an Identity; a reshape where the axes are kept."""
    nodes = [
        helper.make_node(
            "Constant", [], ["raw"], value=numpy_helper.from_array(np.array(axes, np.int64), "")
        ),
        helper.make_node("Identity", ["scale"], ["again"]),
        helper.make_node("Mul", ["images", "again"], ["scaled"]),
        helper.make_node("ReduceMean", ["scaled", "raw"], ["mean"], keepdims=keepdims),
    ]
    nodes.append(
        helper.make_node("Reshape", ["mean", "shape"], ["logits"])
        if keepdims
        else helper.make_node("Neg", ["mean"], ["logits"])
    )
    graph = helper.make_graph(
        nodes,
        "main_graph",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, 4, 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", None])],
        [
            numpy_helper.from_array(np.array([-1, 3], np.int64), "shape"),
            numpy_helper.from_array(np.array([2.0], np.float32), "scale"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    model.graph.node[0].doc_string = 'File "/somewhere/secret.py"'
    return model


def answer(model: onnx.ModelProto) -> np.ndarray:
    images = np.random.default_rng(0).normal(size=(2, 3, 4, 4)).astype(np.float32)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"images": images})[0])


@pytest.mark.parametrize("axes", [[2, 3], [-1, -2]])
@pytest.mark.parametrize("keepdims", [0, 1])
def test_mean_over_the_image_becomes_global_pooling_and_computes_the_same(
    axes: list[int], keepdims: int
) -> None:
    model = pooling_model(axes, keepdims)
    before = answer(model)
    clean(model)
    onnx.checker.check_model(model, full_check=True)
    kinds = [node.op_type for node in model.graph.node]
    assert kinds == ["Mul", "GlobalAveragePool", "Flatten"] + ([] if keepdims else ["Neg"])
    assert [tensor.name for tensor in model.graph.initializer] == ["scale"]
    assert b"secret" not in model.SerializeToString()
    np.testing.assert_allclose(answer(model), before, rtol=1e-6)


def test_mean_over_other_axes_stays() -> None:
    model = pooling_model([1], keepdims=0)
    clean(model)
    assert "ReduceMean" in [node.op_type for node in model.graph.node]
