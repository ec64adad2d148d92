"""Latency of the files that ship, on the device; a tier over its budget is refused."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from pipeline.costs.bench import SHIPPED_PROCESSES
from pipeline.costs.table import LATENCY
from pipeline.devices.kit import Waiting
from pipeline.devices.profile import DeviceProfile
from pipeline.errors import BudgetMissed, NetworkRefused
from pipeline.run import RUN_FILE, Clock, Run
from pipeline.stages.lineage import current_record, inputs_of_tier
from pipeline.stages.misses import attempts_left, give_up, was_misjudged
from pipeline.stages.networks import fresh_network
from pipeline.stages.records import (
    arch_of,
    chosen_tiers,
    onnx_path,
    record_of,
    timed_role,
    write_record,
)
from pipeline.types import Json, LatencyRecord, Tier
from pipeline.units import format_value

Latencies = dict[str, LatencyRecord | None]
"""Of a tier's files, by their precision; None where there is no device."""


def measure_stage(run: Run, only: str | None = None) -> None:
    """Time the files that ship. A tier over its budget is refused, once all are timed.

    Raises NetworkRefused where another network can be chosen for it, else BudgetMissed."""
    elsewhere = Waiting()
    for profile in run.config.profiles:
        with elsewhere:
            _measure_device(run, profile, only)
    elsewhere.stop()


def _measure_device(run: Run, profile: DeviceProfile, only: str | None) -> None:
    waiting = []
    for tier in (tier for tier in chosen_tiers(run, only) if tier.device == profile.name):
        if current_record(run, tier, "measure") is None:
            waiting.append((tier, inputs_of_tier(run, tier, "measure")))
    if not waiting:
        return
    clock = Clock()
    timed = _time_shipped(run, profile, [tier for tier, _ in waiting])
    refusals = []
    for (tier, inputs), latencies in zip(waiting, timed, strict=True):
        record = _answered(run, tier, latencies)
        refusal = _refused(run, tier, record, latencies)
        if refusal is None:
            seconds_each = round(clock() / len(waiting), 3)
            write_record(run, tier, "measure", {**record, "seconds": seconds_each}, inputs)
        else:
            refusals.append(refusal)
    if refusals:
        *others, worst = sorted(refusals, key=lambda refusal: not isinstance(refusal, NetworkRefused))
        for other in others:
            run.progress.say(str(other))
        raise worst


def _time_shipped(run: Run, profile: DeviceProfile, tiers: Sequence[Tier]) -> list[Latencies]:
    """Of every tier's file, and the one of lower precision beside it. One that comes out over its budget is
    timed once more on its own: what disturbs a machine makes networks slower, never faster."""
    if not profile.measures_latency:
        return [{"fp32": None}] * len(tiers)
    bench = run.bench(profile)
    asked = [(tier, precision) for tier in tiers for precision in dict.fromkeys(("fp32", profile.precision))]
    files = [_timed_file(run, tier, precision) for tier, precision in asked]
    records = bench.time_files(files, SHIPPED_PROCESSES)
    timed: dict[str, Latencies] = {tier.key: {} for tier in tiers}
    for (tier, precision), file, record in zip(asked, files, records, strict=True):
        if profile.elsewhere and precision == profile.timed_precision:
            bench.keep(arch_of(run, tier), record)
        elif not profile.elsewhere and record.latency_ms > tier.budgets.get("latency_ms", math.inf):
            again = bench.time_files([file], SHIPPED_PROCESSES)[0]
            record = min(record, again, key=lambda r: r.latency_ms)
        timed[tier.key][precision] = replace(record, context={**record.context, "precision": precision})
    return list(timed.values())


def _answered(run: Run, tier: Tier, latencies: Latencies) -> Json:
    """What the tier's answer was measured to cost and, where there is a file of lower precision, what that
    one costs, which of them is the answer, and why."""
    from pipeline.deploy import choose

    measured = {
        precision: _measured(run, tier, precision, latency) for precision, latency in latencies.items()
    }
    timed = {
        precision: None if latency is None else asdict(latency) for precision, latency in latencies.items()
    }
    plain = {"measured": measured["fp32"], "latency": timed["fp32"]}
    lower = record_of(run, tier, "export").get("lower")
    if lower is None:
        return plain
    precision = lower["precision"]
    answer = choose(
        measured["fp32"], measured[precision], tier.budgets, precision=precision, refusal=lower["refusal"]
    )
    used = precision if answer.lower else "fp32"
    return {
        **plain,
        "measured": measured[used],
        "precision": used,
        "reason": answer.reason,
        "lower": {"measured": measured[precision], "latency": timed[precision]},
    }


def _refused(run: Run, tier: Tier, record: Json, latencies: Latencies) -> BudgetMissed | None:
    """Why the tier is not shipped; None where it keeps its budgets. Where another network can be chosen,
    this one is given up."""
    if all(record["measured"][metric] <= limit for metric, limit in tier.budgets.items()):
        return None
    chosen_in = run.profile(tier.device).timed_precision
    unfit = None if chosen_in == "fp32" else record_of(run, tier, "export")["lower"]["refusal"]
    judged = record if chosen_in == "fp32" or unfit is not None else record["lower"]
    measured = judged["measured"]
    for metric, limit in tier.budgets.items():
        if measured[metric] > limit:
            if unfit is not None and record["lower"]["latency"] is not None:
                kind, what_next = BudgetMissed, _instead_of(chosen_in, unfit)
            else:
                kind, what_next = _give_up_or_advise(run, tier, metric, latencies)
            return kind(
                f"tier {tier.key}: {metric} is {format_value(metric, measured[metric])}, budget "
                f"{format_value(metric, limit)}, so the tier is not shipped; {what_next}"
            )
    return None


def _instead_of(precision: str, reason: str) -> str:
    """Where the float32 file is over, since the one that the network was chosen in may not ship."""
    return (
        f"it was chosen in {precision}, but {reason}, so its float32 file is the answer; train it otherwise "
        "(retrain.label_smoothing keeps logits small), or start a run with 'precision: fp32' in the profile"
    )


def _give_up_or_advise(
    run: Run, tier: Tier, metric: str, latencies: Latencies
) -> tuple[type[BudgetMissed], str]:
    profile = run.profile(tier.device)
    if profile.elsewhere:
        return BudgetMissed, (
            "if the device was busy run its kit once more and import that; else remove the folder "
            f"{run.tier_path(tier)}: then the same command chooses another network, since what this one "
            "takes is known now"
        )
    shipped = latencies[profile.timed_precision]
    if metric != LATENCY or shipped is None:
        return BudgetMissed, f"remove the folder {run.tier_path(tier)} and run the same command again"
    if not was_misjudged(run, tier, shipped.latency_ms):
        return BudgetMissed, (
            "no network is misjudged by that much: run the same command again when the machine is idle"
        )
    if not attempts_left(run, tier):
        return BudgetMissed, (
            "if the machine was busy run the same command again, else raise derive.attempts (it is "
            f"{run.config.derive.attempts}) in {run.folder.path(RUN_FILE)} and go on with `budgetline run "
            f"--out {run.folder.root}`: then another network is chosen"
        )
    give_up(run, tier, shipped.latency_ms)
    return NetworkRefused, "`derive` and what follows choose and train another network"


def _timed_file(run: Run, tier: Tier, precision: str) -> Path:
    return onnx_path(run, tier, timed_role(run.profile(tier.device)), precision)


def _measured(run: Run, tier: Tier, precision: str, latency: LatencyRecord | None) -> dict[str, float]:
    """Counts are taken from the trained module: parameters as they are, FLOPs by fvcore; bytes from the file
    that is timed."""
    from pipeline.costs.counts import module_flops, module_params
    from pipeline.costs.memory import footprint

    network = fresh_network(run, arch_of(run, tier))
    takes = footprint(_timed_file(run, tier, precision), run.profile(tier.device).batch)
    measured = {
        "params": module_params(network),
        "flops": module_flops(network, run.space.image_shape),
        "weight_bytes": takes.weight_bytes,
        "memory_bytes": takes.memory_bytes,
    }
    return dict(measured) if latency is None else {"latency_ms": latency.latency_ms, **measured}
