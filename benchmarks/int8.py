"""What int8 gains and costs: a finished run's family in int8, timed beside its float32 files.

Every tier's shipped float32 file is quantised anew by what runs use (pipeline/deploy/quantize.py: static,
QDQ, per channel, calibrated on the weights split, a mixture where that loses too much), whatever the run's
profile asked for. All files of a device are timed together, in shuffled rounds with a reference network.
Accuracies are of the very files in ONNX Runtime: on the architecture split, by which layers are left in
float32, and on the test split, by which nothing is chosen. The run's folder is left as it is.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.record import Evidence, markdown_table, none_of, parser_for, run_script
from pipeline.costs.memory import footprint
from pipeline.deploy import choose, fix_batch
from pipeline.devices.profile import DeviceProfile, Int8Settings
from pipeline.errors import ConfigError
from pipeline.run import Run, open_run
from pipeline.stages.export import accuracy_on_test
from pipeline.stages.lower_precision import quantise
from pipeline.stages.records import onnx_path, timed_role
from pipeline.types import Json, LatencyRecord, Tier
from pipeline.ui import progress_for

HEADINGS = (
    "tier",
    "float32",
    "int8",
    "speed-up",
    "lost on architecture",
    "lost on test",
    "layers in float32",
    "answer",
)


def quantised(run: Run, profile: DeviceProfile, tier: Tier, folder: Path) -> tuple[list[Path], Json]:
    """The float32 and the int8 file that are timed, and what the latter came to."""
    role = timed_role(profile)
    plain, int8 = onnx_path(run, tier), folder / f"{tier.name}.onnx"
    run.progress.say(f"int8 for {tier.key}")
    made = quantise(run, profile, plain, int8)
    tests = {"float32": accuracy_on_test(run, plain), "int8": accuracy_on_test(run, int8)}
    timed = int8
    if role == "onnx-batch1":
        timed = folder / f"{tier.name}.batch1.onnx"
        fix_batch(int8, timed, 1)
    files = [onnx_path(run, tier, role), timed]
    return files, {
        "made": made,
        "accuracy": {
            "architecture": {"float32": made["float_accuracy"], "int8": made["accuracy"]},
            "test": tests,
        },
    }


def judged(tier: Tier, batch: int, files: list[Path], records: list[LatencyRecord], found: Json) -> Json:
    """One tier's figures, and which file would be its answer."""
    measured: list[dict[str, float]] = []
    for file, record in zip(files, records, strict=True):
        takes = footprint(file, batch)
        measured.append(
            {
                "latency_ms": record.latency_ms,
                "weight_bytes": takes.weight_bytes,
                "memory_bytes": takes.memory_bytes,
            }
        )
    drop = {split: 100 * (a["float32"] - a["int8"]) for split, a in found["accuracy"].items()}
    limits = {metric: limit for metric, limit in tier.budgets.items() if metric in measured[0]}
    refusal = None if found["made"]["within"] else "loses more than is allowed"
    answer = choose(measured[0], measured[1], limits, precision="int8", refusal=refusal)
    return {
        "tier": tier.key,
        "answer": "int8" if answer.lower else "fp32",
        "reason": answer.reason,
        "speed_up": records[0].latency_ms / records[1].latency_ms,
        "drop_points": drop,
        **found,
        **{
            name: {**costs, "timed": asdict(record), "resident_bytes": record.context.get("resident_bytes")}
            for name, costs, record in zip(("float32", "int8"), measured, records, strict=True)
        },
    }


def of_device(run: Run, profile: DeviceProfile, tiers: list[Tier], folder: Path) -> list[Json]:
    made = [quantised(run, profile, tier, folder) for tier in tiers]
    records = run.bench(profile).time_files([file for files, _ in made for file in files])
    return [
        judged(tier, profile.batch, files, records[2 * place : 2 * place + 2], found)
        for place, (tier, (files, found)) in enumerate(zip(tiers, made, strict=True))
    ]


def row(tier: Json) -> list[str]:
    made: dict[str, Any] = tier["made"]
    return [
        tier["tier"],
        *(f"{tier[name]['latency_ms']:.4f} ms" for name in ("float32", "int8")),
        f"{tier['speed_up']:.2f}",
        *(f"{tier['drop_points'][split]:.2f}" for split in ("architecture", "test")),
        f"{len(made['kept_float'])} of {made['layers']}",
        tier["answer"],
    ]


def main() -> bool:
    parser = parser_for("int8", __doc__, "exports/fashion-mnist --json int8.json")
    parser.add_argument("run", type=Path, help="a finished run's folder")
    parser.add_argument("--max-accuracy-drop", type=float, default=1.0, help="percentage points")
    parser.add_argument("--calibration-images", type=int, default=512)
    asked = parser.parse_args()
    evidence = Evidence("int8")
    run = open_run(asked.run, None, progress_for(Console(stderr=True)))
    int8 = Int8Settings(
        max_accuracy_drop=asked.max_accuracy_drop, calibration_images=asked.calibration_images
    )
    here = [p for p in run.config.profiles if p.measures_latency and not p.elsewhere]
    if not here:
        raise ConfigError(f"{asked.run}: has no device that is here; int8 is about speed")
    found: list[Json] = []
    with tempfile.TemporaryDirectory(prefix="budgetline-int8-") as folder:
        for profile in here:
            wanted = profile.model_copy(update={"precision": "int8", "int8": int8})
            tiers = [tier for tier in run.tiers if tier.device == profile.name]
            found += of_device(run, wanted, tiers, Path(folder))
    missed = [tier["tier"] for tier in found if not tier["made"]["within"]]
    return evidence.finish(
        asked.json,
        seeds=[run.config.seed],
        numbers={
            "data": run.task.name.partition(":")[0],
            "images": {split: len(indices) for split, indices in run.task.splits.items()},
            "settings": int8.model_dump(),
            "tiers": found,
        },
        targets=[none_of(f"tiers that lose over {asked.max_accuracy_drop:g} points", missed)],
        table=markdown_table(HEADINGS, [row(tier) for tier in found]),
    )


if __name__ == "__main__":
    run_script(main)
