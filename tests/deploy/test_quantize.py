from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, numpy_helper
from small_network import OPSET, SHAPE, make_network
from torch import nn

from pipeline.deploy.export import export_onnx
from pipeline.deploy.parity import check_logits, onnx_accuracy
from pipeline.deploy.quantize import (
    FLOAT16_GATE,
    Int8Record,
    fix_batch,
    probe,
    quantise_int8,
    to_float16,
)
from pipeline.devices.session import PROVIDERS, RuntimeSettings, open_session
from pipeline.errors import ExportError, ProviderError

AccuracyOf = Callable[[Path], float]


def images(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, *SHAPE)).astype(np.float32)


def logits(path: Path, batch: np.ndarray) -> np.ndarray:
    return np.asarray(open_session(path).run(None, {"images": batch})[0])


def logits_as_written(path: Path, batch: np.ndarray) -> np.ndarray:
    """By what the graph says, in float: a processor without VNNI adds products of 8 bits with saturation."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"images": batch})[0])


def agreement_with(path: Path) -> AccuracyOf:
    """Accuracy where the right answers are those of this file."""
    batch = images(200, seed=1)
    right = logits(path, batch).argmax(axis=1)
    return lambda file: onnx_accuracy(file, [(batch, right)])


def likeness_to(path: Path) -> AccuracyOf:
    """1 for a file with the same logits, 0 where they are off by as much as they differ between images."""
    batch = images(100, seed=1)
    wanted = logits(path, batch)
    return lambda file: max(
        0.0, 1 - float(np.abs(logits(file, batch) - wanted).mean() / wanted.std(axis=0).mean())
    )


def even_network() -> nn.Module:
    """The small network with a bias under which every class is some images' answer."""
    network = make_network().eval()
    with torch.no_grad():
        network.classifier.bias -= network(torch.from_numpy(images(200, seed=0))).mean(0)
    return network


def export(network: nn.Module, path: Path) -> Path:
    metadata = {"tier": "s", "run": "r"}
    export_onnx(network, path, image_shape=SHAPE, batch=None, opset=OPSET, metadata=metadata)
    return path


@pytest.fixture(scope="module")
def float_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(even_network(), tmp_path_factory.mktemp("float") / "model.onnx")


@pytest.fixture(scope="module")
def int8(float_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Int8Record]:
    path = tmp_path_factory.mktemp("int8") / "model.int8.onnx"
    record = quantise_int8(
        float_file,
        path,
        [images(32, seed=2), images(16, seed=3)],
        accuracy_of=agreement_with(float_file),
        max_accuracy_drop=100,
    )
    return path, record


# ------------------------------------------------------------------------------------------------------- int8


def test_all_layers_are_quantised_with_a_scale_per_output_channel(
    int8: tuple[Path, Int8Record], float_file: Path
) -> None:
    path, record = int8
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    held = {tensor.name: tensor for tensor in model.graph.initializer}
    made_by = {node.output[0]: node for node in model.graph.node}
    layers = [node for node in model.graph.node if node.op_type in ("Conv", "Gemm")]
    assert (
        len(layers)
        == record.layers
        == sum(node.op_type in ("Conv", "Gemm") for node in onnx.load(float_file).graph.node)
    )
    for layer in layers:
        weights = made_by[layer.input[1]]
        assert weights.op_type == "DequantizeLinear" and held[weights.input[0]].data_type == TensorProto.INT8
        assert made_by[layer.input[0]].op_type == "DequantizeLinear"
        if layer.op_type == "Conv":
            assert list(held[weights.input[1]].dims) == [held[weights.input[0]].dims[0]]
    assert record.kept_float == () and (record.weight_bits, record.activations) == (8, "uint8")
    assert record.within and record.rounds == 1 and record.calibration_images == 48


def test_a_consumer_sees_the_same_inputs_outputs_and_metadata(
    int8: tuple[Path, Int8Record], float_file: Path
) -> None:
    path, record = int8
    plain, quantised = open_session(float_file), open_session(path)
    for mine, theirs in zip(
        [*plain.get_inputs(), *plain.get_outputs()],
        [*quantised.get_inputs(), *quantised.get_outputs()],
        strict=True,
    ):
        assert (mine.name, mine.type, mine.shape) == (theirs.name, theirs.type, theirs.shape)
    properties = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert properties == {"tier": "s", "run": "r", "precision": "int8"}
    assert [entry.domain for entry in onnx.load(path).opset_import] == [""]
    assert record.bytes == path.stat().st_size < 0.6 * float_file.stat().st_size


def test_its_logits_are_near_and_its_figures_are_its_own(
    int8: tuple[Path, Int8Record], float_file: Path
) -> None:
    path, record = int8
    batch = images(50, seed=4)
    wanted = logits(float_file, batch)
    found = logits_as_written(path, batch)
    assert 0 < np.abs(found - wanted).max() < 0.5 * np.abs(wanted).max()
    assert (found.argmax(axis=1) == wanted.argmax(axis=1)).mean() > 0.5
    assert record.accuracy == agreement_with(float_file)(path)
    assert record.float_accuracy == 1 and record.drop == pytest.approx(100 * (1 - record.accuracy))


def test_the_same_images_give_the_same_bytes(
    int8: tuple[Path, Int8Record], float_file: Path, tmp_path: Path
) -> None:
    again = quantise_int8(
        float_file,
        tmp_path / "again.onnx",
        [images(32, seed=2), images(16, seed=3)],
        accuracy_of=lambda file: 1.0,
        max_accuracy_drop=0,
    )
    assert again.sha256 == int8[1].sha256


def test_activations_are_symmetric_where_that_is_asked_for(float_file: Path, tmp_path: Path) -> None:
    record = quantise_int8(
        float_file,
        tmp_path / "symmetric.onnx",
        [images(16, seed=2)],
        accuracy_of=lambda file: 1.0,
        max_accuracy_drop=0,
        symmetric=True,
    )
    model = onnx.load(tmp_path / "symmetric.onnx")
    zeros = {node.input[2] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    points = [tensor for tensor in model.graph.initializer if tensor.name in zeros]
    assert record.activations == "int8" and points
    assert all(
        tensor.data_type == TensorProto.INT8 and not numpy_helper.to_array(tensor).any() for tensor in points
    )


@pytest.fixture(scope="module")
def uneven_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same function as the small network, but between two of its layers one channel is a thousand times
    as large as the others, which a scale per tensor cannot hold."""
    network = even_network()
    units = [m for m in network.modules() if isinstance(m, nn.Sequential) and isinstance(m[0], nn.Conv2d)]
    pairs = [(before, after) for before, after in itertools.pairwise(units) if after[0].groups > 1]
    expand, spatial = pairs[-1]
    with torch.no_grad():
        expand[1].weight[0] *= 1000
        expand[1].bias[0] = expand[1].bias[0].abs() * 1000
        spatial[0].weight[0] /= 1000
    return export(network, tmp_path_factory.mktemp("uneven") / "uneven.onnx")


def test_layers_that_lose_too_much_stay_float_and_are_named(uneven_file: Path, tmp_path: Path) -> None:
    accuracy_of, batches = likeness_to(uneven_file), [images(64, seed=2)]
    whole = quantise_int8(
        uneven_file, tmp_path / "whole.onnx", batches, accuracy_of=accuracy_of, max_accuracy_drop=100
    )
    mixed = quantise_int8(
        uneven_file, tmp_path / "mixed.onnx", batches, accuracy_of=accuracy_of, max_accuracy_drop=40
    )
    assert whole.kept_float == () and whole.drop > 60
    assert mixed.within and mixed.drop <= 40 and mixed.rounds > 2
    assert 2 <= len(mixed.kept_float) < mixed.layers
    model = onnx.load(tmp_path / "mixed.onnx")
    made_by = {node.output[0]: node for node in model.graph.node}
    left = {n.name for n in model.graph.node if n.op_type in ("Conv", "Gemm") and n.input[1] not in made_by}
    assert left == set(mixed.kept_float)


def test_a_drop_that_cannot_be_kept_is_said_and_the_most_accurate_file_is_written(
    float_file: Path, tmp_path: Path
) -> None:
    seen: list[float] = []

    def accuracy_of(file: Path) -> float:
        """The float file is perfect, what is tried is worse and worse but for the third."""
        seen.append(1.0 if not seen else (0.1, 0.2, 0.5, 0.4, 0.3)[len(seen) - 1])
        return seen[-1]

    record = quantise_int8(
        float_file,
        tmp_path / "bad.onnx",
        [images(16, seed=2)],
        accuracy_of=accuracy_of,
        max_accuracy_drop=1,
    )
    assert not record.within and record.accuracy == 0.5 and record.rounds == 5 and len(seen) == 6
    assert record.weight_bits == 7 and record.kept_float, "the third is mixed, with the better width"
    operators = Counter(node.op_type for node in onnx.load(tmp_path / "bad.onnx").graph.node)
    assert operators["Conv"] and operators["QuantizeLinear"]


def test_what_is_no_model_is_an_export_error_of_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(b"no model")
    with pytest.raises(ExportError, match=r"a\.onnx: cannot be written in lower precision") as caught:
        to_float16(tmp_path / "a.onnx", tmp_path / "b.onnx")
    assert "\n" not in str(caught.value) and not (tmp_path / "b.onnx").exists()


# ----------------------------------------------------------------------------------------------------- batch


def test_one_image_at_a_time_gives_the_same_logits(int8: tuple[Path, Int8Record], tmp_path: Path) -> None:
    fix_batch(int8[0], tmp_path / "one.onnx", 1)
    batch = images(6, seed=5)
    assert open_session(tmp_path / "one.onnx").get_inputs()[0].shape == [1, *SHAPE]
    one_by_one = np.concatenate([logits(tmp_path / "one.onnx", batch[i : i + 1]) for i in range(6)])
    np.testing.assert_allclose(one_by_one, logits(int8[0], batch), atol=1e-5)


# --------------------------------------------------------------------------------------------------- float16


def test_float16_holds_weights_of_two_bytes_and_keeps_its_interface(
    dynamic_file: Path, tmp_path: Path
) -> None:
    record = to_float16(dynamic_file, tmp_path / "half.onnx")
    model = onnx.load(tmp_path / "half.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert {tensor.data_type for tensor in model.graph.initializer} == {TensorProto.FLOAT16}
    kinds = [node.op_type for node in model.graph.node]
    assert kinds[0] == kinds[-1] == "Cast" and kinds.count("Cast") == 2
    entry = open_session(tmp_path / "half.onnx").get_inputs()[0]
    assert (entry.name, entry.type) == ("images", "tensor(float)")
    properties = {entry.key: entry.value for entry in model.metadata_props}
    assert properties == {"tier": "s", "run": "r", "precision": "fp16"}
    assert record.bytes < 0.7 * dynamic_file.stat().st_size
    batch = images(64, seed=6)
    found = check_logits(tmp_path / "half.onnx", [(batch, logits(dynamic_file, batch))], FLOAT16_GATE)
    assert 0 < found.max_abs_error < 0.02, "rounded, and by no more than float16 rounds"


def test_what_float16_cannot_hold_does_not_pass_its_gate(tmp_path: Path) -> None:
    """Weights beyond 65504 are cut off, which the logits tell."""
    network = make_network()
    with torch.no_grad():
        network.classifier.weight.mul_(1e6)
    to_float16(export(network, tmp_path / "large.onnx"), tmp_path / "half.onnx")
    batch = images(8, seed=6)
    wanted = logits(tmp_path / "large.onnx", batch)
    with pytest.raises(ExportError, match="logits are off by up to"):
        check_logits(tmp_path / "half.onnx", [(batch, wanted)], FLOAT16_GATE)


# ------------------------------------------------------------------------------------------------- providers


def test_the_probes_run_on_a_cpu() -> None:
    for model in (probe("int8"), probe("int8", symmetric=True), probe("fp16")):
        session = open_session(model)
        assert np.isfinite(session.run(None, {"images": images(1, 0).repeat(3, axis=1)})[0]).all()


@pytest.mark.parametrize("name", ["cuda", "tensorrt"])
def test_float16_runs_and_agrees_on_a_gpu(name: str, dynamic_file: Path, tmp_path: Path) -> None:
    """TensorRT wants to be told that its builder may use float16."""
    options = {"trt_fp16_enable": True} if name == "tensorrt" else {}
    runtime = RuntimeSettings(provider=PROVIDERS[name], provider_options=options)
    try:
        open_session(probe("fp16"), provider=runtime.provider, provider_options=options)
    except ProviderError as missing:
        pytest.skip(str(missing))
    to_float16(dynamic_file, tmp_path / "half.onnx")
    batch = images(32, seed=6)
    wanted = logits(dynamic_file, batch)
    record = check_logits(tmp_path / "half.onnx", [(batch, wanted)], FLOAT16_GATE, runtime)
    assert record.max_abs_error > 0
