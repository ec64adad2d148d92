"""What this machine and this installation really are: the record of a run, and the checks of `doctor`."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distributions, version
from typing import Literal

from pipeline.devices.hardware import cpu_model, gpu_models, load_average, usable_cores
from pipeline.devices.session import CPU, open_session
from pipeline.errors import ProviderError
from pipeline.types import Json

Status = Literal["ok", "warn", "fail"]

PACKAGES = ("torch", "torchvision", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu", "numpy", "fvcore")

MALLOC = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "500000000",
}
"""Settings of glibc, read when a process starts, that keep freed memory for the next training step."""


@dataclass(frozen=True, slots=True)
class Check:
    """One finding of `doctor`; `remedy` is what to do, empty where nothing needs doing."""

    name: str
    status: Status
    message: str
    remedy: str = ""


def package_versions(names: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Installed versions by distribution name, read without importing anything; absent ones are left out."""
    found: dict[str, str] = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def describe_environment() -> Json:
    """The machine and the installation, for records and the manifest."""
    return {
        "python": platform.python_version(),
        "os": platform.platform(),
        "cpu": cpu_model(),
        "cores": list(usable_cores()),
        "gpu": list(gpu_models()),
        "packages": package_versions(),
        "load": load_average(),
    }


def timing_environment() -> Json:
    """What of this machine decides a latency, beside the profile: a measurement is good only where it is
    equal. Where GPUs of several kinds are there, it also hangs on which of them are visible."""
    gpus, visible = list(gpu_models()), os.environ.get("CUDA_VISIBLE_DEVICES")
    if len(set(gpus)) > 1 and visible is not None:
        gpus.append(f"of which visible: {visible}")
    return {"cpu": cpu_model(), "gpu": gpus, "runtime": package_versions(sorted(_RUNTIMES))}


def is_this_machine(recorded: Mapping[str, object]) -> bool:
    """Whether `describe_environment` was recorded here, as far as processor, cores, system and ONNX Runtime
    tell."""
    here = describe_environment()
    packages = recorded.get("packages")
    runtimes = {name: found for name, found in here["packages"].items() if name.startswith("onnxruntime")}
    return all(recorded.get(key) == here[key] for key in ("os", "cpu", "cores", "gpu")) and (
        isinstance(packages, Mapping) and all(packages.get(name) == found for name, found in runtimes.items())
    )


# ----------------------------------------------------------------------------------------------------- doctor


def doctor() -> list[Check]:
    """Everything that can be found out in a few seconds; nothing is changed."""
    packages = package_versions()
    return [
        check_python(sys.version_info[:2]),
        check_runtime_clash(
            {str(d.metadata["Name"]).lower() for d in distributions() if d.metadata["Name"]} & _RUNTIMES
        ),
        check_torch_pair(packages.get("torch"), packages.get("torchvision")),
        *check_providers(),
        check_cores(len(usable_cores()), os.cpu_count() or 1),
        check_malloc(os.environ, platform.libc_ver()[0]),
    ]


def check_python(found: tuple[int, ...]) -> Check:
    text = ".".join(map(str, found))
    if found >= (3, 11):
        return Check("python", "ok", text)
    return Check("python", "fail", f"{text}, but 3.11 or newer is needed", "install Python 3.11 or newer")


_RUNTIMES = {
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-directml",
    "onnxruntime-openvino",
    "onnxruntime-qnn",
}


def check_runtime_clash(installed: set[str]) -> Check:
    """The builds of ONNX Runtime share one folder: the one installed last overwrites the others."""
    names = sorted(installed)
    if not names:
        return Check(
            "onnxruntime", "fail", "is not installed", "pip install onnxruntime (or onnxruntime-gpu)"
        )
    if len(names) > 1:
        return Check(
            "onnxruntime",
            "fail",
            f"{' and '.join(names)} are installed together and overwrite each other",
            f"pip uninstall -y {' '.join(names)}, then install the one you want",
        )
    return Check("onnxruntime", "ok", f"{names[0]} {version(names[0])}")


def check_torch_pair(torch: str | None, torchvision: str | None) -> Check:
    """torch 2.N belongs to torchvision 0.(N + 15), and both to one build (`+cpu`, `+cu130`, …)."""
    remedy = "install a torch and torchvision of one release and one build (constraints.txt has a pair)"
    if torch is None or torchvision is None:
        missing = " and ".join(n for n, v in (("torch", torch), ("torchvision", torchvision)) if v is None)
        return Check(
            "torch",
            "warn",
            f"{missing} not installed: measuring and verifying work, searching does not",
            remedy,
        )
    text = f"torch {torch}, torchvision {torchvision}"
    release = re.match(r"2\.(\d+)", torch), re.match(r"0\.(\d+)", torchvision)
    if release[0] and release[1] and int(release[0][1]) + 15 != int(release[1][1]):
        return Check("torch", "fail", f"{text} are not of one release", remedy)
    if torch.partition("+")[2] != torchvision.partition("+")[2]:
        return Check("torch", "warn", f"{text} seem to be of different builds", remedy)
    return Check("torch", "ok", text)


def check_providers() -> list[Check]:
    """One check per provider that ONNX Runtime lists, by opening a small network on it and nothing else."""
    try:
        import onnxruntime

        model = probe_model()
    except ImportError as missing:
        return [Check("providers", "fail", f"cannot be tried: {missing}", "install onnx and onnxruntime")]
    return [_check_provider(name, model) for name in onnxruntime.get_available_providers()]


def _check_provider(name: str, model: bytes) -> Check:
    try:
        open_session(model, provider=name)
    except ProviderError as failure:
        status: Status = "fail" if name == CPU else "warn"
        return Check(name, status, str(failure), f"profiles with provider {name} cannot be used here")
    return Check(name, "ok", "opens")


def probe_model() -> bytes:
    """A convolution and an activation on an 8×8 image: what every provider that is any use can run."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    weights = numpy_helper.from_array(np.ones((4, 3, 3, 3), dtype=np.float32), "weights")
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["image", "weights"], ["features"], pads=[1, 1, 1, 1]),
            helper.make_node("Relu", ["features"], ["output"]),
        ],
        "probe",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [1, 4, 8, 8])],
        [weights],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())


def check_cores(usable: int, present: int) -> Check:
    text = f"{usable} of {present} cores may be used"
    if usable < present:
        return Check("cores", "warn", text, "a profile with 'threads: null' takes only these")
    return Check("cores", "ok", text)


def check_malloc(environment: Mapping[str, str], libc: str) -> Check:
    """Training small networks on a CPU spends much time on handing memory to the system and back."""
    if libc != "glibc":
        return Check("malloc", "ok", "not glibc: nothing to set")
    if all(name in environment for name in MALLOC):
        return Check("malloc", "ok", "keeps freed memory for training")
    settings = " ".join(f"{name}={value}" for name, value in MALLOC.items())
    return Check(
        "malloc",
        "warn",
        "hands memory back after every training step, which costs time on a CPU",
        f"set {settings}",
    )
