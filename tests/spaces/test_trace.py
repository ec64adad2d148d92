from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from pipeline.costs.table import untrained
from pipeline.deploy.export import export_skeleton
from pipeline.spaces.base import SearchSpace
from pipeline.spaces.cell import CellSettings, CellSpace
from pipeline.spaces.mbconv import MBConvSettings, MBConvSpace
from pipeline.spaces.nb201 import CONV1, CONV3, NONE, POOL, SKIP, NB201Settings, NB201Space
from pipeline.spaces.trace import Trace, Value, deployed
from pipeline.types import Arch, Layer

# --------------------------------------------------------------------------------------- written down by hand


@pytest.fixture
def trace() -> Trace:
    return Trace((4, 6, 6))


def kinds(trace: Trace) -> list[str]:
    return [layer.kind for layer in deployed(trace.steps)]


def two_convolutions(trace: Trace) -> tuple[Value, Value]:
    return trace.convolve(trace.image, 4, 3), trace.convolve(trace.image, 4)


def test_values_and_numbers_by_hand(trace: Trace) -> None:
    strided = trace.convolve(trace.image, 8, 3, stride=2)
    depthwise = trace.convolve(strided, 8, 5, groups=8, norm=False)
    shifted = trace.shift(depthwise)
    trace.classify(trace.concatenate([shifted, shifted]), 3)
    assert strided == Value(1, 8, 3) and shifted == Value(4, 8, 2)
    assert [step.numbers for step in trace.steps] == [4 * 36, 8 * 9, 8 * 9, 8 * 6, 8 * 4, 16 * 4, 16, 16, 3]
    assert [step.reads for step in trace.steps] == [(), (0,), (1,), (2,), (3,), (4, 4), (5,), (6,), (7,)]
    assert deployed(trace.steps) == (
        Layer("conv", 4, 8, 6, 3, 3, parameters=9 * 4 * 8 + 16, normalised=True),
        Layer("conv", 8, 8, 3, 3, 5, groups=8, parameters=25 * 8),
        Layer("pool", 16, 16, 2, 1),
        Layer("linear", 16, 3, parameters=51),
    )


def test_odd_sizes_are_rounded_up() -> None:
    trace = Trace((1, 5, 5))
    assert trace.convolve(trace.image, 2, stride=2).size == trace.pool(trace.image, "average", 2).size == 3


def test_what_has_no_weights_is_worked_out_once(trace: Trace) -> None:
    x, y = two_convolutions(trace)
    assert trace.rectify(x) == trace.rectify(x) != trace.rectify(y)
    assert trace.add(x, y) == trace.add(x, y) != trace.zero(x)
    assert trace.pool(x, "max", 1) == trace.pool(x, "max", 1) != trace.pool(x, "average", 1)
    assert trace.pool(x, "max", 2) != trace.pool(x, "max", 1)
    assert trace.shift(x) == trace.shift(x) and trace.concatenate([x, y]) == trace.concatenate([x, y])
    assert trace.convolve(x, 4) != trace.convolve(x, 4) and trace.normalise(x) != trace.normalise(x)


def test_joining_one_value_is_no_operator(trace: Trace) -> None:
    assert trace.concatenate([trace.image]) == trace.join([trace.image]) == trace.image
    assert len(trace.steps) == 1


def test_a_rectifier_goes_into_what_nobody_else_reads(trace: Trace) -> None:
    x, y = two_convolutions(trace)
    trace.rectify(x)
    assert kinds(trace) == ["conv", "conv"]
    trace.rectify(trace.pool(y, "max", 1))
    trace.rectify(trace.normalise(trace.image))
    assert kinds(trace) == ["conv", "conv", "pool", "activation", "norm"]
    trace.pool(x, "max", 1)
    assert kinds(trace) == ["conv", "conv", "activation", "pool", "activation", "norm", "pool"]


def test_a_batch_norm_is_folded_where_it_is_alone_on_a_convolution(trace: Trace) -> None:
    x = trace.convolve(trace.image, 4, norm=False)
    trace.rectify(trace.normalise(x))
    conv, norm = deployed(trace.steps)
    assert (conv.kind, norm.kind, norm.normalised, norm.parameters) == ("conv", "norm", True, 8)
    trace.pool(x, "max", 1)
    assert [(layer.kind, layer.normalised) for layer in deployed(trace.steps)] == [
        ("conv", False),
        ("norm", False),
        ("pool", False),
    ]


def test_a_sum_goes_into_one_convolution_and_takes_its_rectifier_along(trace: Trace) -> None:
    x, y = two_convolutions(trace)
    both = trace.add(x, y)
    assert kinds(trace) == ["conv", "conv", "fused_add"]
    trace.rectify(trace.add(both, trace.convolve(trace.image, 4)))
    assert kinds(trace) == ["conv", "conv", "fused_add", "conv", "fused_add"]
    trace.add(both, trace.image)
    assert kinds(trace)[-1] == "add"


def test_a_second_sum_finds_its_convolution_taken(trace: Trace) -> None:
    x = trace.convolve(trace.image, 4)
    trace.add(trace.add(x, trace.image), trace.pool(trace.image, "max", 1))
    assert kinds(trace) == ["conv", "fused_add", "pool", "add"]


def test_a_sum_stays_where_its_convolutions_are_rectified_or_read_again(trace: Trace) -> None:
    x, y = two_convolutions(trace)
    trace.add(trace.rectify(x), trace.image)
    trace.zero(y)
    assert kinds(trace) == ["conv", "conv", "add", "add"]


# --------------------------------------------------------------------------- ONNX Runtime's optimised graphs


SPACES: dict[str, SearchSpace] = {
    "nb201": NB201Space((3, 8, 8), 5, NB201Settings(cells=1)),
    "cell": CellSpace((3, 8, 8), 5, CellSettings(layers=3, nodes=3)),
    "cell, enas": CellSpace((3, 8, 8), 5, CellSettings(variant="enas", layers=3, nodes=4)),
    "mbconv": MBConvSpace((3, 8, 8), 5, MBConvSettings(size="tiny", operations=("k3e1", "f3e1", "f3e3"))),
}
"""Of 16 channels and multiples, which fill the runtime's blocks: it fuses less where they do not."""

ALIKE = Arch("nb201", (SKIP, POOL, POOL, CONV3, CONV3, SKIP))
"""Nodes 0 and 1 are one value, pooled and rectified once for both."""

SUMS = Arch("nb201", (CONV3, CONV1, CONV1, POOL, CONV3, CONV1))
"""Sums that a rectifier reads alone, and one that several edges read."""

UNFUSED = Arch("nb201", (NONE, POOL, NONE, SKIP, NONE, POOL))


def some_networks(space: SearchSpace) -> list[Arch]:
    rng = np.random.default_rng(5)
    rows = [tuple(int(rng.integers(len(slot.choices))) for slot in space.slots) for _ in range(4)]
    drawn = [space.canonical(Arch(space.name, row)) for row in rows]
    return [space.largest, *([ALIKE, SUMS, UNFUSED] if space.name == "nb201" else []), *drawn]


def optimised(path: Path, without: list[str]) -> onnx.GraphProto:
    """The graph that the runtime executes on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4  # else it warns that the graph is for this machine
    options.optimized_model_filepath = str(path.with_suffix(".optimised.onnx"))
    onnxruntime.InferenceSession(
        path, options, providers=["CPUExecutionProvider"], disabled_optimizers=without
    )
    return onnx.load(options.optimized_model_filepath).graph


def operators_of(graph: onnx.GraphProto) -> Counter[str]:
    """By the names of layers. Where there are blocked layouts, a batch norm is run as a convolution and takes
    the rectifier after it in; elsewhere it does not, which is left out here, as is that it is one."""
    maker = {name: node.op_type for node in graph.node for name in node.output}
    found = Counter(
        node.op_type
        for node in graph.node
        if not (node.op_type == "Relu" and maker[node.input[0]] == "BatchNormalization")
    )
    convolutions = [node for node in graph.node if node.op_type in ("Conv", "FusedConv")]
    return +Counter(
        conv=len(convolutions) + found["BatchNormalization"],
        fused_add=sum(len(node.input) == 4 for node in convolutions),
        add=found["Add"] + found["Sub"] + found["Sum"],
        activation=found["Relu"],
        pool=found["AveragePool"] + found["MaxPool"] + found["GlobalAveragePool"],
        linear=found["Gemm"],
    )


@pytest.mark.parametrize("name", SPACES)
def test_the_runtime_fuses_what_layers_say(name: str, tmp_path: Path) -> None:
    """With blocked layouts, where the processor has them, and without."""
    space, seen = SPACES[name], Counter[str]()
    for number, arch in enumerate(some_networks(space)):
        path = tmp_path / f"{number}.onnx"
        network = untrained(space, arch, seed=0)
        export_skeleton(network, path, image_shape=space.image_shape, batch=1, opset=20)
        told = Counter(
            "conv" if layer.kind == "norm" else layer.kind
            for layer in space.layers(arch)
            if not (layer.kind == "norm" and layer.normalised)
        )
        for without in ([], ["NchwcTransformer"]):
            assert operators_of(optimised(path, without)) == told, (space.describe(arch), without)
        seen += told
    assert seen["add"] and seen["fused_add"], "networks with both kinds of sums"
