"""Budgets kept and used: whole runs with several seeds, two profiles and five tiers each.

Every seed is a run of its own with an empty cost cache, so that its latency predictor is fitted anew. Then
`budgetline verify` measures every tier again in a fresh process. Trainings are brief: what the networks have
learnt does not change how long they take. A run that is finished in WORK is only read.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from benchmarks.family import REMEASURED, run_job, verify_again
from benchmarks.record import (
    Evidence,
    Target,
    at_least,
    markdown_table,
    none_of,
    parser_for,
    run_script,
    whole_numbers,
)
from pipeline.data import cache_folder
from pipeline.report.manifest import MANIFEST, read_manifest, tier_key
from pipeline.types import Json
from pipeline.units import format_value

RUN = Path(__file__).with_name("budgets.yaml")
LATENCY = "latency_ms"


def run_seed(config: Path, work: Path, seed: int) -> Path:
    """The folder of the finished run with this seed."""
    folder = work / f"seed{seed}"
    if not (folder / MANIFEST).is_file():
        environment = {**os.environ, "BUDGETLINE_CACHE": str(fresh_cache(work / f"cache{seed}"))}
        run_job(config, folder, [f"seed={seed}"], environment)
    return folder


def fresh_cache(folder: Path) -> Path:
    """A cache with the data sets of the usual one, and no measurements but its own."""
    folder.mkdir(parents=True, exist_ok=True)
    for entry in cache_folder().iterdir():
        link = folder / entry.name
        if entry.name != "costs" and not link.exists():
            link.symlink_to(entry)
    return folder


def tiers_of(folder: Path, seed: int) -> list[Json]:
    """Every tier's latency budget, its use when it was made, and what measuring again says."""
    again = {
        check["tier"]: check for check in verify_again(folder) if str(check["check"]).endswith(REMEASURED)
    }
    return [
        {
            "seed": seed,
            "tier": tier_key(tier),
            "budget_ms": tier["budgets"][LATENCY],
            "measured_ms": tier["measured"][LATENCY],
            "use": tier["use"][LATENCY],
            "kept_again": again[tier_key(tier)]["ok"],
            "again": again[tier_key(tier)]["came"],
        }
        for tier in read_manifest(folder)["tiers"]
    ]


def targets_of(tiers: Sequence[Json]) -> list[Target]:
    uses = [100 * tier["use"] for tier in tiers]
    return [
        none_of("over budget when made", [_name(tier) for tier in tiers if tier["use"] > 1]),
        none_of(
            "over budget, measured again in a fresh process",
            [_name(tier) for tier in tiers if not tier["kept_again"]],
        ),
        at_least("mean use of the budget", fmean(uses), 97.7, " %"),
        at_least("least use of a budget", min(uses), 92, " %"),
    ]


def _name(tier: Json) -> str:
    return f"seed {tier['seed']} {tier['tier']}"


def table_of(tiers: Sequence[Json]) -> str:
    seeds = sorted({tier["seed"] for tier in tiers})
    names = list(dict.fromkeys(tier["tier"] for tier in tiers))
    cells = {(tier["seed"], tier["tier"]): tier for tier in tiers}
    rows = [
        [
            name,
            format_value(LATENCY, cells[seeds[0], name]["budget_ms"]),
            *(f"{100 * cells[seed, name]['use']:.1f} %" for seed in seeds),
            f"{sum(bool(cells[seed, name]['kept_again']) for seed in seeds)} of {len(seeds)}",
        ]
        for name in names
    ]
    headings = ["tier", f"budget, seed {seeds[0]}", *(f"use, seed {seed}" for seed in seeds), "kept again"]
    return markdown_table(headings, rows)


def main() -> bool:
    parser = parser_for("budgets", __doc__, "--work budgets --json budgets.json")
    parser.add_argument("--run", type=Path, default=RUN, metavar="RUN.yaml", help="default: %(default)s")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="where the runs go")
    parser.add_argument("--seeds", type=whole_numbers, default=[0, 1, 2, 3, 4], help="with commas between")
    asked = parser.parse_args()
    evidence = Evidence("budgets")
    tiers = [tier for seed in asked.seeds for tier in tiers_of(run_seed(asked.run, asked.work, seed), seed)]
    for seed in asked.seeds:
        shutil.rmtree(asked.work / f"cache{seed}", ignore_errors=True)
    return evidence.finish(
        asked.json,
        seeds=asked.seeds,
        numbers={"tiers": tiers},
        targets=targets_of(tiers),
        table=table_of(tiers),
    )


if __name__ == "__main__":
    run_script(main)
