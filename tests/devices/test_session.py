from __future__ import annotations

import ast
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from pipeline.devices import hardware, measure, session
from pipeline.devices.environment import probe_model
from pipeline.devices.session import CPU, PROVIDERS, RuntimeSettings, open_session
from pipeline.errors import ProviderError


def test_a_session_is_set_up_as_asked() -> None:
    opened = open_session(probe_model(), threads=1, spinning=False)
    options = opened.get_session_options()
    assert opened.get_providers() == [CPU]
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (1, 1)
    assert options.execution_mode == onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    image = np.ones((1, 3, 8, 8), dtype=np.float32)
    assert opened.run(None, {"image": image})[0][0, 0, 4, 4] == 27  # 3×3 ones over 3 channels of ones


def test_every_listed_provider_opens_or_is_refused_but_never_replaced(
    capfd: pytest.CaptureFixture[str],
) -> None:
    for provider in onnxruntime.get_available_providers():
        try:
            assert open_session(probe_model(), provider=provider).get_providers()[0] == provider
        except ProviderError as refused:
            assert provider in str(refused) and "doctor" in str(refused)
    assert capfd.readouterr().out == ""


def test_a_provider_that_is_not_there_is_refused_with_what_it_needs() -> None:
    absent = next(p for p in PROVIDERS.values() if p not in onnxruntime.get_available_providers())
    with pytest.raises(
        ProviderError, match=r"not part of the installed ONNX Runtime.*lists.*CPUExecutionProvider"
    ):
        open_session(probe_model(), provider=absent)


def test_a_session_on_another_provider_than_asked_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fallen:
        def get_providers(self) -> list[str]:
            return [CPU]

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", CPU])
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *args, **kwargs: Fallen())
    with pytest.raises(ProviderError, match="runs on CPUExecutionProvider instead"):
        open_session(probe_model(), provider="CUDAExecutionProvider")


def test_a_gpu_session_forbids_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    def refuse(model: bytes, options: onnxruntime.SessionOptions, **kwargs: object) -> None:
        seen.update(kwargs, entry=options.get_session_config_entry("session.disable_cpu_ep_fallback"))
        raise RuntimeError("stop")

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", CPU])
    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
    with pytest.raises(ProviderError, match="stop"):
        open_session(
            probe_model(),
            provider="CUDAExecutionProvider",
            provider_options={"device_id": 1, "tunable": True},
        )
    assert seen == {
        "providers": [("CUDAExecutionProvider", {"device_id": "1", "tunable": "1"})],
        "enable_fallback": 0,
        "entry": "1",
    }


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    path = tmp_path / "junk.onnx"
    path.write_bytes(b"junk")
    with pytest.raises(ProviderError, match=r"junk\.onnx: ONNX Runtime cannot open it: Load model"):
        open_session(path)


def test_settings_survive_json() -> None:
    settings = RuntimeSettings("CUDAExecutionProvider", {"device_id": 1}, 2, False, 4, "fp32")
    assert RuntimeSettings.from_json(settings.to_json()) == settings


@pytest.mark.parametrize("module", [session, measure, hardware])
def test_what_measures_needs_numpy_and_onnxruntime_alone(module) -> None:  # type: ignore[no-untyped-def]
    allowed = {"numpy", "onnxruntime", "pipeline", *sys.stdlib_module_names}
    inner = {"pipeline", "pipeline.errors", "pipeline.types"} | {
        f"pipeline.devices.{name}" for name in ("session", "measure", "hardware")
    }
    tree = ast.parse(Path(module.__file__).read_text(), feature_version=(3, 9))
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            assert name.split(".")[0] in allowed, name
            assert not name.startswith("pipeline") or name in inner, name
