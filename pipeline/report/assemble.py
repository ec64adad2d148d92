"""From the records that the stages left to the parts of the manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.data.base import ImageTask
from pipeline.derive import DeriveSettings, Trial
from pipeline.report import manifest
from pipeline.report.agreement import rank_correlation
from pipeline.types import Arch, Json, LatencyRecord, Tier

_TRAINING = ("epochs", "best_epoch", "seconds", "images_per_second", "recipe", "weights")


def search_entry(result: Json, settings: Json, ranking: Json | None) -> Json:
    measured = {key: result[key] for key in ("method", "seed", "evaluations", "seconds")}
    return {**measured, "settings": settings, "ranking": ranking}


def data_entry(task: ImageTask) -> Json:
    return {
        "name": task.name,
        "fingerprint": task.fingerprint,
        "classes": task.classes,
        "image_shape": task.image_shape,
        "channel_order": task.channel_order,
        "preparation": task.preparation,
        "augmentation": task.augmentation,
        "mean": task.mean,
        "std": task.std,
        "splits": {split: len(indices) for split, indices in task.splits.items()},
    }


def costs_entry(record: Json) -> Json:
    """How one device's costs came to be."""
    latency = record["table"]["latency"]
    if latency is None:
        return {"source": "counted from the architectures; no device was measured", "reference": None}
    origin = ", from the cache" if record["how"].get("from_cache") else ""
    count = len(latency["networks"])
    return {
        "source": f"least squares over operator counts of {count} networks measured on the device{origin}",
        "error": latency["held_out"],
        "reference": record["reference"],
    }


def tier_entry(root: Path, tier: Tier, folder: Path, records: Mapping[str, Json], timed_role: str) -> Json:
    """One tier from the records of its stages. `timed_role` is the role of the files that were timed."""
    derived, trained, exported = records["derive"], records["retrain"], records["export"]
    measured, lower = records["measure"], exported.get("lower")
    accuracy = {"architecture": trained["accuracy"] / 100, "test": exported["accuracy"]["test"]}
    in_runtime = {"test": exported["accuracy"]["test_onnxruntime"]}
    files, answer, precision = [], exported["files"], None
    if lower is not None:
        in_runtime["architecture"] = lower["float32_architecture"]
        precision = precision_entry(lower, measured, in_runtime)
        if precision["answer"] == lower["precision"]:
            answer, accuracy = lower["files"], lower["accuracy"]
    files += _onnx_entries(root, folder, exported["files"], "fp32", timed_role, measured, in_runtime)
    if lower is not None:
        files += _onnx_entries(
            root,
            folder,
            lower["files"],
            lower["precision"],
            timed_role,
            measured["lower"],
            lower["accuracy"],
        )
    files.append(manifest.file_entry(root, folder / "weights.safetensors", "weights"))
    files.append(manifest.file_entry(root, folder / "samples.npz", "samples"))
    return manifest.tier_entry(
        tier,
        Arch.from_json(derived["arch"]),
        description=derived["description"],
        measured=measured["measured"],
        predicted=derived["predicted"],
        accuracy={**accuracy, "attacks": exported["accuracy"].get("attacks", [])},
        training={key: trained[key] for key in _TRAINING},
        files=files,
        answer=(folder / answer[timed_role]["name"]).relative_to(root).as_posix(),
        precision=precision,
    )


def _onnx_entries(
    root: Path,
    folder: Path,
    files: Mapping[str, Json],
    precision: manifest.Precision,
    timed_role: str,
    measured: Json,
    accuracy: Mapping[str, float],
) -> list[Json]:
    """The files of one precision: the accuracy is that of the one that takes any batch, the latency that of
    the one that was timed."""
    timed = measured["latency"]
    latency = None if timed is None else LatencyRecord(**timed)
    return [
        manifest.file_entry(
            root,
            folder / files[role]["name"],
            role,
            precision=precision,
            latency=latency if role == timed_role else None,
            parity=files[role]["parity"],
            accuracy=accuracy if role == "onnx" else None,
        )
        for role in manifest.ONNX_ROLES
    ]


def precision_entry(lower: Json, measured: Json, float32_accuracy: Mapping[str, float]) -> Json:
    """What came of the precision that was asked for; accuracies are of the files in ONNX Runtime."""
    made = lower["made"]
    return {
        "asked": lower["precision"],
        "answer": measured["precision"],
        "reason": measured["reason"],
        "speed_up": measured["latency"]["latency_ms"] / measured["lower"]["latency"]["latency_ms"],
        "accuracy_drop": {
            split: 100 * (float32_accuracy[split] - lower["accuracy"][split])
            for split in ("architecture", "test")
        },
        "allowed_drop": lower["allowed_drop"],
        **{key: made[key] for key in ("layers", "kept_float", "calibration_images") if key in made},
    }


def ranking_entry(tried: Sequence[tuple[Tier, Sequence[Trial]]], settings: DeriveSettings) -> Json | None:
    """How far the evaluator's order agrees with brief training inside the tiers' bands; None if none was
    tried."""
    kept = [(tier, [trial for trial in trials if trial.accuracy is not None]) for tier, trials in tried]
    if not any(trials for _, trials in kept):
        return None
    groups = [([t.finalist.loss for t in trials], [t.accuracy or 0.0 for t in trials]) for _, trials in kept]
    pooled = rank_correlation(groups)
    trusted = pooled.rho is not None and pooled.rho >= settings.trusted_correlation
    return {
        "spearman": pooled.rho,
        "interval": [pooled.low, pooled.high],
        "n": pooled.networks,
        "trusted": trusted,
        "note": _RANKING_NOTE[trusted],
        "tiers": [
            {
                "device": tier.device,
                "name": tier.name,
                "spearman": rank_correlation([group]).rho,
                "n": len(trials),
            }
            for (tier, trials), group in zip(kept, groups, strict=True)
        ],
        "points": [_point(tier, trial) for tier, trials in kept for trial in trials],
    }


_RANKING_NOTE = {
    True: "the evaluator's order of the finalists agrees with brief training inside the tiers' bands",
    False: "too low, or from too few networks, to trust the evaluator's order among finalists, most of which "
    "are its own best of the band; each tier's choice rests on brief training of them",
}


def _point(tier: Tier, trial: Trial) -> Json:
    return {
        "device": tier.device,
        "name": tier.name,
        "loss": trial.finalist.loss,
        "accuracy": trial.accuracy,
        "origin": trial.finalist.origin,
        "key": trial.finalist.arch.key,
    }
