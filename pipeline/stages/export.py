"""ONNX files, proven equal to the trained networks; the only stage that reads the test split, once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import __version__
from pipeline.artifacts import sha256_file, write_arrays
from pipeline.devices.session import NVIDIA, RuntimeSettings, open_session
from pipeline.run import Clock, Run
from pipeline.stages.jobs import Jobs, engine_for
from pipeline.stages.lineage import current_record, inputs_of_tier
from pipeline.stages.lower_precision import (
    accuracy_over,
    assessing_runtime,
    make_lower_precision,
)
from pipeline.stages.networks import trained_network
from pipeline.stages.records import (
    arch_of,
    chosen_tiers,
    onnx_path,
    record_path,
    samples_path,
    weights_path,
    write_record,
)
from pipeline.types import Json, Tier

if TYPE_CHECKING:
    from torch import nn


def export_stage(run: Run, only: str | None = None) -> None:
    """ONNX files, parity on test images, and the final assessment: the one place that reads the test
    split."""
    waiting = [tier for tier in chosen_tiers(run, only) if current_record(run, tier, "export") is None]
    if waiting:
        with engine_for(run, __name__, JOBS, _read_by_export, side_by_side=False) as engine:
            engine.map("export", [_export_job(run, tier) for tier in waiting], 1)


def _export_job(run: Run, tier: Tier) -> Json:
    """Lower precision is made and judged on the device itself where that can be reached."""
    profile, job = run.profile(tier.device), {"do": "export", "tier": tier.key}
    if profile.precision == "fp32" or not profile.measures_latency or profile.elsewhere:
        return job
    return {**job, "device": profile.name, "gpus": int(profile.provider in NVIDIA)}


def export_one(run: Run, job: Json) -> Json:
    import torch

    from pipeline.data import held_out
    from pipeline.train.assess import assess, withstand

    tier = chosen_tiers(run, job["tier"])[0]
    inputs, profile = inputs_of_tier(run, tier, "export"), run.profile(tier.device)
    run.progress.say(f"export {tier.key}")
    clock = Clock()
    network, settings = trained_network(run, tier), run.config.export
    images, _ = held_out.test_sample(run.task, settings.parity_images, seed=0)
    batches = [batch.numpy() for batch in torch.split(images.contiguous(), run.task.assessed_at_once)]
    files = _export_float32(run, tier, network, batches)
    assessment = assess(network, run.task)
    attacked = withstand(network, run.task, run.config.robustness)
    runtime = accuracy_on_test(run, onnx_path(run, tier))
    samples = _samples(network, images[: settings.samples])
    lower = None if profile.precision == "fp32" else _export_lower(run, tier, network, batches)
    if lower is not None and lower["precision"] == "int8":
        samples["logits_int8"] = _logits_of(onnx_path(run, tier, precision="int8"), samples["images"])
    write_arrays(samples_path(run, tier), samples)
    record = {
        "files": files,
        "accuracy": {
            "test": assessment.accuracy / 100,
            "test_onnxruntime": runtime,
            "attacks": [result.to_json() for result in attacked],
        },
        "test_images": assessment.images,
        "samples_sha256": sha256_file(samples_path(run, tier)),
        **({} if lower is None else {"lower": lower}),
        "seconds": clock(),
    }
    write_record(run, tier, "export", record, inputs)
    return {}


JOBS: Jobs = {"export": export_one}


def _read_by_export(run: Run, job: Json) -> list[Path]:
    tier = chosen_tiers(run, job["tier"])[0]
    derived = [record_path(run, other, "derive") for other in run.tiers]
    return [*derived, record_path(run, tier, "retrain"), weights_path(run, tier)]


def _export_float32(run: Run, tier: Tier, network: nn.Module, batches: Sequence[Any]) -> Json:
    """Write the tier's float32 files, one for any batch and one for a single image; by role, how and how
    exactly."""
    from pipeline.deploy import check_parity, export_onnx

    files: Json = {}
    for role, batch in (("onnx", None), ("onnx-batch1", 1)):
        target = onnx_path(run, tier, role)
        exported = export_onnx(
            network,
            target,
            image_shape=run.space.image_shape,
            batch=batch,
            opset=run.profile(tier.device).opset,
            metadata=_metadata(run, tier),
        )
        parity = check_parity(network, target, batches)
        files[role] = {"name": target.name, "export": exported.to_json(), "parity": parity.to_json()}
    return files


def _export_lower(run: Run, tier: Tier, network: nn.Module, batches: Sequence[Any]) -> Json:
    """Write the tier's files of lower precision. By their accuracy on the test split nothing is chosen."""
    lower = make_lower_precision(run, tier, network, batches)
    file = onnx_path(run, tier, precision=lower["precision"])
    on_test = accuracy_on_test(run, file, assessing_runtime(run.profile(tier.device)))
    return {**lower, "accuracy": {**lower["accuracy"], "test": on_test}}


def accuracy_on_test(run: Run, file: Path, runtime: RuntimeSettings | None = None) -> float:
    from pipeline.data import held_out

    return accuracy_over(held_out.test_batches(run.task, run.task.assessed_at_once), file, runtime)


def _logits_of(file: Path, images: Any) -> Any:
    session = open_session(file)
    return session.run(None, {session.get_inputs()[0].name: images})[0]


def _samples(network: nn.Module, images: Any) -> dict[str, Any]:
    import torch

    with torch.inference_mode():
        return {"images": images.contiguous().numpy(), "logits": network(images).numpy()}


def _metadata(run: Run, tier: Tier) -> dict[str, str]:
    """What travels inside the model file."""
    task = run.task
    return {
        "classes": json.dumps(list(task.classes)),
        "input": f"(pixel / 255 - mean) / std per channel, N×C×H×W, {task.channel_order}",
        "preparation": task.preparation,
        "mean": json.dumps(list(task.mean)),
        "std": json.dumps(list(task.std)),
        "tier": tier.name,
        "profile": tier.device,
        "run": run.folder.root.name,
        "architecture": json.dumps(run.space.describe(arch_of(run, tier))),
        "data": task.name.partition(":")[0],
        "license": "the weights follow the licence of the images they were trained on",
        "producer": f"budgetline {__version__}",
    }
