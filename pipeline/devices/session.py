"""ONNX Runtime sessions that run on the execution provider asked for, or not at all.

Needs numpy and onnxruntime alone, so that it also runs on a device that has nothing else (Python >= 3.9).
"""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Union

from pipeline.errors import ProviderError

CPU = "CPUExecutionProvider"

PROVIDERS: dict[str, str] = {
    "cpu": CPU,
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "directml": "DmlExecutionProvider",
    "xnnpack": "XnnpackExecutionProvider",
    "qnn": "QNNExecutionProvider",
}
"""Short name → ONNX Runtime's name. Any other name that the installed runtime offers is taken in full."""

NVIDIA = (PROVIDERS["cuda"], PROVIDERS["tensorrt"])

_PACKAGES = {
    "CUDAExecutionProvider": "onnxruntime-gpu, an NVIDIA driver, and the CUDA and cuDNN it was built for",
    "TensorrtExecutionProvider": "onnxruntime-gpu, an NVIDIA driver, CUDA, cuDNN and TensorRT",
    "OpenVINOExecutionProvider": "onnxruntime-openvino",
    "DmlExecutionProvider": "onnxruntime-directml (Windows)",
    "CoreMLExecutionProvider": "onnxruntime on macOS",
    "QNNExecutionProvider": "onnxruntime-qnn",
}

_SILENT = 4  # ONNX Runtime's log severity "fatal": what goes wrong is raised, and told in one place


def tolerance_on_accelerators(largest_logit: float) -> float:
    """How far a float32 file's logits may be from the CPU's on another provider: accelerators multiply with
    shorter mantissas unless told otherwise (TF32 on NVIDIA's GPUs: 10 bits), and errors add up."""
    return 1e-3 + 1e-2 * largest_logit


OptionValue = Union[bool, int, float, str]  # noqa: UP007  (Python 3.9 evaluates it)


@dataclass(frozen=True)
class RuntimeSettings:
    """How a network is run on a device: everything besides the file that decides its latency.

    `threads` is a number of cores; `spinning` keeps idle threads busy waiting for work."""

    provider: str = CPU
    provider_options: Mapping[str, OptionValue] = field(default_factory=dict)
    threads: int = 1
    spinning: bool = True
    batch: int = 1
    precision: str = "fp32"

    def to_json(self) -> dict[str, Any]:
        return {**self.__dict__, "provider_options": dict(self.provider_options)}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> RuntimeSettings:
        return cls(**record)


def open_session(
    model: Path | bytes,
    *,
    provider: str = CPU,
    provider_options: Mapping[str, OptionValue] | None = None,
    threads: int = 1,
    spinning: bool = True,
) -> Any:
    """An `onnxruntime.InferenceSession` of which every node runs on `provider` (ONNX Runtime's full name).

    Raises ProviderError when that cannot be had: there is no falling back to the CPU."""
    import onnxruntime

    onnxruntime.set_default_logger_severity(_SILENT)
    if provider not in onnxruntime.get_available_providers():
        raise _unavailable(provider, "it is not part of the installed ONNX Runtime")
    if provider in NVIDIA:
        _preload_libraries()
    options = _session_options(provider, threads, spinning)
    chosen = (provider, {name: _text(value) for name, value in (provider_options or {}).items()})
    source = model if isinstance(model, bytes) else str(model)
    try:
        with _quiet():
            session = onnxruntime.InferenceSession(source, options, providers=[chosen], enable_fallback=0)
    except Exception as failure:
        if provider == CPU:
            what = "the model" if isinstance(model, bytes) else str(model)
            raise ProviderError(f"{what}: ONNX Runtime cannot open it: {_first_line(failure)}") from None
        raise _unavailable(provider, _reason(failure)) from None
    opened = session.get_providers()
    if not opened or opened[0] != provider:
        raise _unavailable(provider, f"the session runs on {', '.join(opened) or 'nothing'} instead")
    return session


def _session_options(provider: str, threads: int, spinning: bool) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = _SILENT
    options.add_session_config_entry("session.intra_op.allow_spinning", _text(spinning))
    options.add_session_config_entry("session.inter_op.allow_spinning", _text(spinning))
    if provider != CPU:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    return options


def _preload_libraries() -> None:
    """Find the CUDA libraries that torch or an nvidia package brought; the loader does not look there."""
    import onnxruntime

    if hasattr(onnxruntime, "preload_dlls"):
        with _quiet(), contextlib.suppress(Exception):
            onnxruntime.preload_dlls()


@contextlib.contextmanager
def _quiet() -> Any:
    """Swallow what onnxruntime's Python layer prints and warns while it opens; a failure is raised anyway."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _text(value: OptionValue) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)


def _reason(failure: Exception) -> str:
    """ONNX Runtime reports a provider that did not load as nodes that nobody but the CPU would take."""
    if "fallback to CPU EP has been explicitly disabled" in str(failure):
        return "it did not load its libraries or found no device, or it lacks an operator of the model"
    return _first_line(failure)


def _first_line(failure: Exception) -> str:
    """The first line without ONNX Runtime's error code and place in its source."""
    line = (str(failure).strip().splitlines() or [type(failure).__name__])[0]
    line = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", line)
    return re.sub(r"^\S+\.(?:cc|h):\d+ .*?\) (?=[A-Z])", "", line)[:200].rstrip(". ")


def _unavailable(provider: str, reason: str) -> ProviderError:
    import onnxruntime

    needed = _PACKAGES.get(provider, "an ONNX Runtime build that has it")
    return ProviderError(
        f"provider {provider} cannot be used: {reason}. It needs {needed}; this installation "
        f"({onnxruntime.__version__}) lists {', '.join(onnxruntime.get_available_providers())}; "
        "`budgetline doctor` says which of them really open"
    )
