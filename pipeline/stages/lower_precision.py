"""Int8 and float16 beside a tier's float32 files: made, held against them, and judged on the architecture
split."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.artifacts import sha256_file
from pipeline.devices.profile import DeviceProfile
from pipeline.devices.session import NVIDIA, RuntimeSettings
from pipeline.report.manifest import ONNX_ROLES
from pipeline.run import Run
from pipeline.stages.records import onnx_path
from pipeline.types import Json, Tier

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pipeline.deploy import ParityRecord


def make_lower_precision(run: Run, tier: Tier, network: nn.Module, batches: Sequence[Any]) -> Json:
    """Write the tier's files in the precision that its profile asks for: what they lose on `batches` of
    images, and under `refusal` why they may not be its answer, if so."""
    from pipeline.deploy import NO_GATE, check_parity, fix_batch

    profile = run.profile(tier.device)
    precision, runtime = profile.precision, assessing_runtime(profile)
    run.progress.say(f"{precision} for {tier.key}")
    paths = {role: onnx_path(run, tier, role, precision) for role in ONNX_ROLES}
    made = (quantise if precision == "int8" else _halve)(run, profile, onnx_path(run, tier), paths["onnx"])
    fix_batch(paths["onnx"], paths["onnx-batch1"], 1)
    parity = {role: check_parity(network, path, batches, NO_GATE, runtime) for role, path in paths.items()}
    return {
        "precision": precision,
        "files": {role: _file_entry(path, parity[role], precision) for role, path in paths.items()},
        "accuracy": {"architecture": made["accuracy"]},
        "float32_architecture": made["float_accuracy"],
        "allowed_drop": profile.int8.max_accuracy_drop if precision == "int8" else None,
        "made": made,
        "refusal": _refusal(profile, made, parity["onnx"]),
    }


def quantise(run: Run, profile: DeviceProfile, source: Path, target: Path) -> Json:
    """Write the int8 form of a finished float32 file, calibrated on the weights split and judged on the
    architecture split; an `Int8Record` as JSON."""
    from pipeline.data.batches import fixed_batch
    from pipeline.deploy import quantise_int8

    images, _ = fixed_batch(run.task, "weights", profile.int8.calibration_images, seed=run.config.seed)
    return quantise_int8(
        source,
        target,
        [images[start : start + 64].contiguous().numpy() for start in range(0, len(images), 64)],
        accuracy_of=lambda file: _architecture_accuracy(run, file, assessing_runtime(profile)),
        max_accuracy_drop=profile.int8.max_accuracy_drop,
        symmetric=profile.provider in NVIDIA,
    ).to_json()


def _halve(run: Run, profile: DeviceProfile, source: Path, target: Path) -> Json:
    """Write the float16 form of a finished float32 file."""
    from pipeline.deploy import to_float16

    made = to_float16(source, target).to_json()
    runtime = assessing_runtime(profile)
    return {
        **made,
        "float_accuracy": _architecture_accuracy(run, source, runtime),
        "accuracy": _architecture_accuracy(run, target, runtime),
    }


def _file_entry(path: Path, parity: ParityRecord, precision: str) -> Json:
    """`tolerance` is what `verify` holds its logits to: what is allowed in float16, or the file's own error
    where that is more, so that one which may not be the answer is not taken for a damaged one."""
    from pipeline.deploy import FLOAT16_GATE

    allowed = FLOAT16_GATE.max_abs_error if precision == "fp16" else 1e-4
    tolerance = max(allowed, parity.max_abs_error) if math.isfinite(parity.max_abs_error) else allowed
    return {
        "name": path.name,
        "export": {"sha256": sha256_file(path), "bytes": path.stat().st_size},
        "parity": {**parity.to_json(), "tolerance": tolerance},
    }


def _refusal(profile: DeviceProfile, made: Json, parity: ParityRecord) -> str | None:
    from pipeline.deploy import FLOAT16_GATE

    if profile.precision == "fp16":
        problem = FLOAT16_GATE.problem(parity)
        return None if problem is None else f"fp16: {problem}"
    if made["within"]:
        return None
    drop = 100 * (made["float_accuracy"] - made["accuracy"])
    return (
        f"int8 loses {drop:.2f} points of accuracy on the architecture split, at most "
        f"{profile.int8.max_accuracy_drop:g} are allowed"
    )


def assessing_runtime(profile: DeviceProfile) -> RuntimeSettings | None:
    """Where lower precision is assessed: on the device itself where that is here, else on the CPU."""
    return None if profile.elsewhere else profile.runtime()


def _architecture_accuracy(run: Run, file: Path, runtime: RuntimeSettings | None) -> float:
    from pipeline.data.batches import evaluation_batches

    return accuracy_over(
        evaluation_batches(run.task, "architecture", run.task.assessed_at_once), file, runtime
    )


def accuracy_over(
    batches: Iterable[tuple[Tensor, Tensor]], file: Path, runtime: RuntimeSettings | None
) -> float:
    """Share of right answers of a finished file, by default on the CPU."""
    from pipeline.deploy import onnx_accuracy

    return onnx_accuracy(file, ((x.numpy(), y.numpy()) for x, y in batches), runtime)
