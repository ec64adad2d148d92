"""Second choices: a finished network that was measured a little over its tier's latency budget is given up,
and the tier is derived again.

A network is chosen by what it takes untrained, before its hours of training. By the time its file ships the
clock of a shared machine may have moved, and small networks do not follow a clock exactly as the reference
does. So the next network must keep the budget by as much as the last one was misjudged. A miss by more than
MOST is a disturbed machine and no misjudged network: that is measured again, not chosen again.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pipeline.artifacts import read_json, sha256_json, write_json
from pipeline.costs.table import LATENCY
from pipeline.run import Run
from pipeline.stages.records import hash_of_record, record_of, record_path
from pipeline.types import Json, Tier

MOST = 0.2


def misses_of(run: Run, tier: Tier) -> list[Json]:
    """The networks that were given up since the device was measured, oldest first: `key`, what it took
    (`timed_ms`) when chosen and (`shipped_ms`) when finished, the hash of its `weights`, which others may
    have, and the seconds spent on it per stage."""
    path = misses_path(run, tier)
    costs = _costs_of(run, tier)
    return [miss for miss in read_json(path) if miss.get("costs") == costs] if path.exists() else []


def _costs_of(run: Run, tier: Tier) -> str:
    return hash_of_record(run, run.costs_path(tier.device), "profile")


def inputs_of_misses(run: Run, tier: Tier) -> dict[str, str]:
    """What a derivation is made from besides, where it is not the first."""
    misses = misses_of(run, tier)
    return {"misses": sha256_json(misses)} if misses else {}


def stricter(run: Run, tier: Tier) -> Tier:
    """The tier with its latency budget divided by the worst misjudgement so far."""
    factor = max((miss["shipped_ms"] / miss["timed_ms"] for miss in misses_of(run, tier)), default=1.0)
    limits = tuple(
        replace(limit, value=limit.value / factor) if limit.metric == LATENCY else limit
        for limit in tier.limits
    )
    return replace(tier, limits=limits)


def was_misjudged(run: Run, tier: Tier, shipped_ms: float) -> bool:
    """Whether the network, rather than a disturbed machine, is over the budget. `shipped_ms` is what its file
    takes in the precision that it was chosen in."""
    timed = record_of(run, tier, "derive")["timed"]
    missed_by = shipped_ms / tier.budgets[LATENCY] - 1
    return timed is not None and 0 < missed_by <= MOST


def attempts_left(run: Run, tier: Tier) -> bool:
    return len(misses_of(run, tier)) + 1 < run.config.derive.attempts


def give_up(run: Run, tier: Tier, shipped_ms: float) -> None:
    """Remove the records of a tier and remember the miss, so that `derive` chooses again. In this order:
    killed on the way, the same network is chosen, and missed, once more, and no record is stale."""
    stages = ("derive", "retrain", "export")
    records = {stage: record_of(run, tier, stage) for stage in stages}
    miss: Json = {
        "key": records["derive"]["key"],
        "timed_ms": records["derive"]["timed"]["latency_ms"],
        "shipped_ms": shipped_ms,
        "costs": _costs_of(run, tier),
        "weights": records["retrain"]["sha256"],
        "seconds": {stage: float(record["seconds"]) for stage, record in records.items()},
    }
    misses = [*misses_of(run, tier), miss]
    for stage in stages:
        record_path(run, tier, stage).unlink(missing_ok=True)
    write_json(misses_path(run, tier), misses)


def misses_path(run: Run, tier: Tier) -> Path:
    return run.tier_path(tier, "misses.json")
