"""Where the stages keep what they make in a run's folder, and how later ones read it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pipeline.artifacts import RunFolder, sha256_file, sha256_json
from pipeline.devices.profile import DeviceProfile
from pipeline.errors import ConfigError, RunFolderError
from pipeline.run import Run
from pipeline.types import Arch, Json, Tier

SEARCH_RESULT = Path("search", "result.json")
TIER_RECORDS = {"derive": "arch", "retrain": "train", "export": "export", "measure": "measure"}
"""Stage → name of the record that it leaves in every tier's folder."""


def chosen_tiers(run: Run, only: str | None) -> tuple[Tier, ...]:
    """All tiers, or the one that `--tier` names by `name` or `device/name`."""
    chosen = tuple(tier for tier in run.tiers if only in (None, tier.name, tier.key))
    if not chosen:
        there = ", ".join(tier.key for tier in run.tiers)
        raise RunFolderError(f"{run.folder.root}: no tier '{only}'; there are: {there}")
    return chosen


def search_path(run: Run) -> Path:
    return run.folder.path(SEARCH_RESULT)


def trace_path(run: Run) -> Path:
    """The search step by step, in JSON lines."""
    return run.folder.path("search", "trace.jsonl")


def evaluator_path(run: Run) -> Path:
    """What the search's evaluator learnt."""
    return run.folder.path("search", "evaluator.npz")


def search_record(run: Run) -> Json:
    """What the search found. Raises RunFolderError where it has not run."""
    return run.done(search_path(run), "search")


def earlier_path(run: Run) -> Path:
    """What was copied of the run named by `search.start_from`, so that its folder may go."""
    return run.folder.path("search", "earlier.json")


def copied_earlier(run: Run) -> Json | None:
    """None where nothing was copied yet, or of another run."""
    kept = run.folder.read_record(earlier_path(run))
    named = sha256_json(run.config.search.start_from)
    return kept if kept is not None and kept["inputs"].get("start_from") == named else None


def earlier_search(run: Run) -> Json:
    """What the run named by `search.start_from` found. Raises RunFolderError where that has not searched,
    ConfigError where it searched another space."""
    root = Path(run.config.search.start_from or "").expanduser()
    found = RunFolder(root).read_record(root / SEARCH_RESULT)
    if found is None:
        raise RunFolderError(
            f"search.start_from: {root} holds no finished search; make one with `budgetline search`"
        )
    if found["inputs"].get("space") != run.input_hashes["space"]:
        raise ConfigError(
            f"search.start_from: {root} searched another space than {run.space.name} with this run's "
            "settings, image shape and classes; name a run of the same space"
        )
    return found


def hash_of_record(run: Run, path: Path, stage: str) -> str:
    """For what is made from the record of a stage. Raises RunFolderError where that has not run."""
    run.done(path, stage)
    return sha256_file(path)


def record_path(run: Run, tier: Tier, stage: str) -> Path:
    return run.tier_path(tier, f"{TIER_RECORDS[stage]}.json")


def record_of(run: Run, tier: Tier, stage: str) -> Json:
    """What a stage left of a tier. Raises RunFolderError where it has not run."""
    return run.done(record_path(run, tier, stage), stage)


def find_record(run: Run, tier: Tier, stage: str, inputs: Mapping[str, str] | None = None) -> Json | None:
    """What a stage left of a tier, None where it has not run. `inputs` are what it would be made from now:
    raises StaleArtifact where they were others."""
    return run.folder.read_record(record_path(run, tier, stage), inputs)


def write_record(run: Run, tier: Tier, stage: str, record: Json, inputs: Mapping[str, str]) -> None:
    run.folder.write_record(record_path(run, tier, stage), record, inputs)


def arch_of(run: Run, tier: Tier) -> Arch:
    """The architecture that was derived for a tier."""
    return Arch.from_json(record_of(run, tier, "derive")["arch"])


def weights_path(run: Run, tier: Tier) -> Path:
    return run.tier_path(tier, "weights.safetensors")


def samples_path(run: Run, tier: Tier) -> Path:
    """Some test images and what the network answers."""
    return run.tier_path(tier, "samples.npz")


def onnx_path(run: Run, tier: Tier, role: str = "onnx", precision: str = "fp32") -> Path:
    """`model.onnx`, `model.batch1.onnx`, `model.int8.onnx`, `model.int8.batch1.onnx`, …"""
    parts = [precision] * (precision != "fp32") + ["batch1"] * (role == "onnx-batch1")
    return run.tier_path(tier, ".".join(["model", *parts, "onnx"]))


def timed_role(profile: DeviceProfile) -> str:
    """Of a tier's files the one that is timed: the static one where the device runs one image at a time."""
    return "onnx-batch1" if profile.batch == 1 else "onnx"
