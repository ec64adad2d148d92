"""The manifest and the report, from the records of all stages."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime

from pipeline.artifacts import sha256_file, write_bytes
from pipeline.derive import Trial
from pipeline.devices.environment import describe_environment, package_versions
from pipeline.errors import CorruptArtifact
from pipeline.report import assemble
from pipeline.report.html import render_report
from pipeline.report.manifest import build_manifest, write_manifest
from pipeline.run import Run, read_trace
from pipeline.stages.finalists import trainings_of_finalists
from pipeline.stages.misses import misses_of
from pipeline.stages.records import (
    TIER_RECORDS,
    record_of,
    record_path,
    samples_path,
    search_record,
    timed_role,
    trace_path,
    weights_path,
)
from pipeline.types import Json, Tier


def report_stage(run: Run) -> Json:
    """The manifest and the report, always made anew from the records."""
    folder, config = run.folder, run.config
    environment = describe_environment()
    manifest = build_manifest(
        run=folder.root.resolve().name,
        created=datetime.now(UTC),
        search=assemble.search_entry(
            search_record(run),
            settings={
                "method": config.method.to_json(),
                "evaluator": config.evaluator.to_json(),
                **config.search.model_dump(mode="json"),
            },
            ranking=assemble.ranking_entry(_trials(run), config.derive),
        ),
        data=assemble.data_entry(run.task),
        space={"name": run.space.name, "settings": run.space.fingerprint()},
        profiles={p.name: p.model_dump(mode="json") for p in config.profiles},
        costs={p.name: assemble.costs_entry(run.costs_record(p.name)) for p in config.profiles},
        stages=_seconds_per_stage(run),
        versions=package_versions(),
        environment=environment,
        tiers=[_tier_entry(run, tier) for tier in run.tiers],
    )
    write_manifest(folder.root, manifest)
    trace = read_trace(trace_path(run))
    write_bytes(folder.path("report.html"), render_report(manifest, trace).encode())
    return manifest


def _tier_entry(run: Run, tier: Tier) -> Json:
    records = {stage: record_of(run, tier, stage) for stage in TIER_RECORDS}
    _require_made_files(run, tier, records)
    timed = timed_role(run.profile(tier.device))
    return assemble.tier_entry(run.folder.root, tier, run.tier_path(tier, "."), records, timed)


def _require_made_files(run: Run, tier: Tier, records: Mapping[str, Json]) -> None:
    """Raises CorruptArtifact where a file is not the one that its record tells of."""
    export = records["export"]
    exported = [*export["files"].values(), *export.get("lower", {}).get("files", {}).values()]
    made = [(weights_path(run, tier), records["retrain"]["sha256"], "retrain")]
    made += [(run.tier_path(tier, file["name"]), file["export"]["sha256"], "export") for file in exported]
    made.append((samples_path(run, tier), export["samples_sha256"], "export"))
    for path, digest, stage in made:
        if not path.exists() or sha256_file(path) != digest:
            record = record_path(run, tier, stage)
            raise CorruptArtifact(f"{path}: is not the file that was made; remove {record} to make it again")


def _trials(run: Run) -> list[tuple[Tier, list[Trial]]]:
    records = [(tier, record_of(run, tier, "derive")) for tier in run.tiers]
    return [(tier, [Trial.from_json(trial) for trial in record["trials"]]) for tier, record in records]


def _seconds_per_stage(run: Run) -> dict[str, float]:
    """Working time, interruptions left out. Trainings that ran side by side count each, one that several
    tiers share once: brief ones where they belong, those in full, contenders too, as retraining."""
    records = {stage: [record_of(run, tier, stage) for tier in run.tiers] for stage in TIER_RECORDS}
    seconds = {
        "profile": sum(run.costs_record(p.name)["seconds"] for p in run.config.profiles),
        "search": search_record(run)["seconds"],
        **{stage: sum(record["seconds"] for record in of_tiers) for stage, of_tiers in records.items()},
    }
    trials, contenders = trainings_of_finalists(run)
    if all("trained_seconds" in record for record in records["derive"]):  # else they are in its own seconds
        seconds["derive"] += sum(trial["seconds"] for trial in trials)
    in_full = {record["sha256"]: record["seconds"] for record in [*records["retrain"], *contenders]}
    for miss in (miss for tier in run.tiers for miss in misses_of(run, tier)):
        in_full.setdefault(miss.get("weights", miss["key"]), miss["seconds"]["retrain"])
        for stage in ("derive", "export"):
            seconds[stage] += miss["seconds"][stage]
    seconds["retrain"] = sum(in_full.values())
    return {stage: round(value, 3) for stage, value in seconds.items()}
