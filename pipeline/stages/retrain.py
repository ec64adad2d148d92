"""The tiers' networks, each trained from scratch; one that several tiers share, once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from pipeline.artifacts import FileCheckpoint, sha256_file, write_bytes
from pipeline.ranks import SharedCheckpoint
from pipeline.run import Run
from pipeline.stages.finalists import contender_path
from pipeline.stages.jobs import Jobs, engine_for
from pipeline.stages.lineage import current_record, inputs_of_tier
from pipeline.stages.networks import largest_first, teacher_of, train_into, trained_network
from pipeline.stages.records import (
    arch_of,
    chosen_tiers,
    evaluator_path,
    find_record,
    record_path,
    search_path,
    weights_path,
    write_record,
)
from pipeline.types import Json, Tier


def retrain_stage(run: Run, only: str | None = None) -> None:
    """Largest tier first, since it may be the others' teacher; a network that several tiers share, once."""
    tiers = _in_order(run, only)
    for tier in tiers:
        _forget_another_teacher(run, tier)
    waiting = [tier for tier in tiers if current_record(run, tier, "retrain") is None]
    teachers = waiting[:1] if run.config.retrain.distil is not None and waiting[:1] == tiers[:1] else []
    steps = run.config.retrain.steps(len(run.task.splits["weights"])) if waiting else 0
    with engine_for(run, __name__, JOBS, _read_by_retraining) as engine:
        for group in (teachers, waiting[len(teachers) :]):
            left = _not_adopted(run, group)
            of_each = {arch_of(run, tier): tier for tier in reversed(left)}
            jobs = [{"do": "retrain", "tier": tier.key} for tier in left if tier in of_each.values()]
            engine.map("retrain", jobs, steps)
    for tier in waiting:
        _adopt(run, tier)


def _forget_another_teacher(run: Run, tier: Tier) -> None:
    """A network that learnt from another one than it would now is made again: its teacher was refused, or is
    not the largest any more. What else has changed is an error, as in every stage."""
    record = find_record(run, tier, "retrain")
    if record is None or run.config.retrain.distil is None:
        return
    inputs = inputs_of_tier(run, tier, "retrain")
    if {what for what, value in inputs.items() if record["inputs"].get(what) != value} == {"teacher"}:
        run.progress.say(f"{tier.key}: learnt from another network than the largest, so it is trained again")
        for stage in ("measure", "export", "retrain"):
            record_path(run, tier, stage).unlink(missing_ok=True)


def _not_adopted(run: Run, tiers: Sequence[Tier]) -> list[Tier]:
    """Those that are left to train, as the first rank says: it alone has the contenders."""
    left = [tier.key for tier in tiers if not _adopt(run, tier)]
    left = json.loads(run.ranks.from_first(json.dumps(left).encode()))
    return [tier for tier in tiers if tier.key in left]


def _adopt(run: Run, tier: Tier) -> bool:
    """Take the weights of a contender or of another tier that are the same network's, trained from the same;
    whether the tier is trained then. Its record says that they were adopted: its seconds are not its own."""
    inputs = inputs_of_tier(run, tier, "retrain")
    if find_record(run, tier, "retrain", inputs) is not None:
        return True
    contender = contender_path(run, inputs)
    twins = [(record_path(run, twin, "retrain"), weights_path(run, twin)) for twin in run.tiers]
    for path, weights in [(contender, contender.with_suffix(".safetensors")), *twins]:
        found = run.folder.read_record(path)
        if found is None or found["inputs"] != inputs or not weights.exists():
            continue
        if sha256_file(weights) != found["sha256"]:
            continue
        write_bytes(weights_path(run, tier), weights.read_bytes())
        write_record(run, tier, "retrain", {**found, "adopted": True}, inputs)
        return True
    return False


def retrain_one(run: Run, job: Json) -> Json:
    tier = chosen_tiers(run, job["tier"])[0]
    inputs, teacher = inputs_of_tier(run, tier, "retrain"), teacher_of(run, tier)
    checkpoint = FileCheckpoint(_checkpoint_path(run, tier))
    record = train_into(
        weights_path(run, tier),
        run,
        arch_of(run, tier),
        run.config.retrain,
        checkpoint=SharedCheckpoint(checkpoint, run.ranks),
        label=f"retrain {tier.key}",
        ranks=run.ranks,
        teacher=None if teacher is None else trained_network(run, teacher),
    )
    write_record(run, tier, "retrain", record, inputs)
    checkpoint.remove()
    return {}


JOBS: Jobs = {"retrain": retrain_one}


def _read_by_retraining(run: Run, job: Json) -> list[Path]:
    tier = chosen_tiers(run, job["tier"])[0]
    teacher = teacher_of(run, tier)
    reads = [*(record_path(run, other, "derive") for other in run.tiers), _checkpoint_path(run, tier)]
    if teacher is not None:
        reads += [record_path(run, teacher, "retrain"), weights_path(run, teacher)]
    if run.config.retrain.start == "supernet":
        reads += [search_path(run), evaluator_path(run)]
    return reads


def _checkpoint_path(run: Run, tier: Tier) -> Path:
    return run.tier_path(tier, "training.npz")


def _in_order(run: Run, only: str | None) -> list[Tier]:
    """The largest first; with distillation it is needed whatever was asked for."""
    chosen, keep_first = chosen_tiers(run, only), run.config.retrain.distil is not None
    by_size = enumerate(largest_first(run))
    return [tier for place, tier in by_size if tier in chosen or (place == 0 and keep_first)]
