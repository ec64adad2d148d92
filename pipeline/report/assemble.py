"""From the records that the stages left to the parts of the manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.data.base import ImageTask
from pipeline.derive import DeriveSettings, Trial, rank_correlation
from pipeline.report import manifest
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


def tier_entry(root: Path, tier: Tier, folder: Path, records: Mapping[str, Json], timed_file: str) -> Json:
    """One tier from the records of its stages. `timed_file` is the name of the file that was timed."""
    derived, trained, exported = records["derive"], records["retrain"], records["export"]
    measured, timed = records["measure"]["measured"], records["measure"]["latency"]
    latency = None if timed is None else LatencyRecord(**timed)
    files = [
        manifest.file_entry(
            root,
            folder / file["name"],
            role,
            latency=latency if file["name"] == timed_file else None,
            parity=file["parity"],
            accuracy={"test": exported["accuracy"]["test_onnxruntime"]} if role == "onnx" else None,
        )
        for role, file in exported["files"].items()
    ]
    files.append(manifest.file_entry(root, folder / "weights.safetensors", "weights"))
    files.append(manifest.file_entry(root, folder / "samples.npz", "samples"))
    return manifest.tier_entry(
        tier,
        Arch.from_json(derived["arch"]),
        description=derived["description"],
        measured=measured,
        predicted=derived["predicted"],
        accuracy={"architecture": trained["accuracy"] / 100, "test": exported["accuracy"]["test"]},
        training={key: trained[key] for key in _TRAINING},
        files=files,
        answer=(folder / timed_file).relative_to(root).as_posix(),
    )


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
    True: "the evaluator's order agrees with brief training inside the tiers' bands",
    False: "too low, or from too few networks, to trust the evaluator's order inside a tier's band; each "
    "tier's choice rests on brief training of its finalists",
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
