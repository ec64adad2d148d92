from __future__ import annotations

from pathlib import Path

import pytest
from small_network import OPSET, SHAPE, make_network
from torch import nn

from pipeline.deploy.export import export_onnx


@pytest.fixture(scope="session")
def network() -> nn.Module:
    return make_network()


@pytest.fixture(scope="session")
def dynamic_file(network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "dynamic.onnx"
    export_onnx(network, path, image_shape=SHAPE, batch=None, opset=OPSET, metadata={"tier": "s", "run": "r"})
    return path


@pytest.fixture(scope="session")
def static_file(network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "static.onnx"
    export_onnx(network, path, image_shape=SHAPE, batch=2, opset=OPSET, metadata={})
    return path
