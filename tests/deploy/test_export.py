from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from small_network import OPSET, SHAPE, make_space, member
from torch import nn

from pipeline.artifacts import sha256_file
from pipeline.costs.counts import weight_bytes
from pipeline.deploy.export import export_onnx, export_skeleton
from pipeline.devices.session import open_session
from pipeline.errors import ExportError


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def test_file_is_clean_and_says_what_it_was_told(dynamic_file: Path) -> None:
    model = onnx.load(dynamic_file)
    onnx.checker.check_model(model, full_check=True)
    assert "BatchNormalization" not in operators(dynamic_file)
    assert {entry.key: entry.value for entry in model.metadata_props} == {"tier": "s", "run": "r"}
    assert [entry.name for entry in model.graph.input] == ["images"]
    assert [entry.name for entry in model.graph.output] == ["logits"]
    shape = model.graph.input[0].type.tensor_type.shape.dim
    assert shape[0].dim_param and [axis.dim_value for axis in shape[1:]] == list(SHAPE)
    content = dynamic_file.read_bytes()
    assert b".py" not in content and os.getcwd().encode() not in content


def test_static_batch_is_fixed(static_file: Path) -> None:
    shape = onnx.load(static_file).graph.input[0].type.tensor_type.shape.dim
    assert [axis.dim_value for axis in shape] == [2, *SHAPE]


def test_record_describes_the_file_and_the_network_is_left_alone(network: nn.Module, tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in network.state_dict().items()}
    network.train()
    record = export_skeleton(network, tmp_path / "a.onnx", image_shape=SHAPE, batch=1, opset=OPSET)
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    model = onnx.load(tmp_path / "a.onnx")
    assert record.sha256 == sha256_file(tmp_path / "a.onnx")
    assert record.bytes == (tmp_path / "a.onnx").stat().st_size
    assert (record.opset, record.ir_version) == (model.opset_import[0].version, model.ir_version)


def test_the_format_is_no_newer_than_the_opset_asks_for(dynamic_file: Path, static_file: Path) -> None:
    """IR 9 goes with opset 20, and ONNX Runtime 1.17 reads both; it refuses IR 10."""
    for file in (dynamic_file, static_file):
        model = onnx.load(file)
        assert (model.opset_import[0].version, model.ir_version) == (20, 9)
        assert not any(node.metadata_props for node in model.graph.node), "a field of IR 10"


def test_same_weights_give_the_same_bytes_in_another_process_and_folder(
    dynamic_file: Path, tmp_path: Path
) -> None:
    target = tmp_path / "again.onnx"
    script = (
        "import sys; from pathlib import Path; from small_network import *\n"
        "from pipeline.deploy.export import export_onnx\n"
        f"export_onnx(make_network(), Path({str(target)!r}), image_shape=SHAPE, batch=None, opset=OPSET, "
        "metadata={'run': 'r', 'tier': 's'})"
    )
    here = Path(__file__).resolve()
    paths = os.pathsep.join([str(here.parents[2]), str(here.parent)])
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, check=True, timeout=120)
    assert sha256_file(target) == sha256_file(dynamic_file)


def test_skeleton_has_the_operators_of_the_file_that_ships(
    network: nn.Module, dynamic_file: Path, static_file: Path, tmp_path: Path
) -> None:
    export_skeleton(network, tmp_path / "skeleton.onnx", image_shape=SHAPE, batch=2, opset=OPSET)
    assert operators(tmp_path / "skeleton.onnx") == operators(static_file) == operators(dynamic_file)
    assert set(operators(static_file)) == {"Conv", "Relu", "Add", "GlobalAveragePool", "Flatten", "Gemm"}


def test_skeleton_runs_at_the_speed_of_the_file_that_ships(
    network: nn.Module, static_file: Path, tmp_path: Path
) -> None:
    skeleton = tmp_path / "skeleton.onnx"
    export_skeleton(network, skeleton, image_shape=SHAPE, batch=2, opset=OPSET)
    sessions = [open_session(path) for path in (skeleton, static_file)]
    images = np.zeros((2, *SHAPE), np.float32)

    def block_ms(session: Any) -> float:
        times = []
        for _ in range(40):
            started = time.perf_counter()
            session.run(None, {"images": images})
            times.append(time.perf_counter() - started)
        return 1e3 * float(np.median(times))

    def apart() -> float:
        """Interleaved blocks; the quietest block of each stands for it."""
        blocks = np.array([[block_ms(session) for session in sessions] for _ in range(30)]).min(axis=0)
        return float(abs(blocks[0] / blocks[1] - 1))

    assert any(apart() < 0.05 for _ in range(3))


def test_file_holds_exactly_the_weights_that_are_counted(static_file: Path) -> None:
    held = sum(onnx.numpy_helper.to_array(t).nbytes for t in onnx.load(static_file).graph.initializer)
    assert held == weight_bytes(make_space().layers(member(make_space())))


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.conv(images) if images.sum() > 0 else images


def test_what_cannot_be_exported_is_one_line_and_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="cannot be written as ONNX") as caught:
        export_onnx(Branching(), tmp_path / "a.onnx", image_shape=SHAPE, batch=1, opset=OPSET, metadata={})
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_unsupported_opset_names_the_range(network: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="opset 9 was asked for; this installation writes 18 to"):
        export_onnx(network, tmp_path / "a.onnx", image_shape=SHAPE, batch=1, opset=9, metadata={})
