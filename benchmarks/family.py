"""A whole family: budgets kept, accuracies, and time, from the manifest and from measuring again.

Runs RUN into FOLDER; a FOLDER that is finished is only read. Then a fresh process verifies it (hashes,
parity, latency budgets measured again). What must be reached depends on the data set; flags change it.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import time
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from benchmarks.record import (
    Evidence,
    Target,
    at_least,
    at_most,
    budgetline,
    markdown_table,
    none_of,
    parser_for,
    run_script,
    run_to_end,
)
from pipeline.errors import BudgetlineError, ConfigError
from pipeline.report.manifest import MANIFEST, answer_file, read_manifest, tier_key
from pipeline.types import Json
from pipeline.units import format_value

EXAMPLE = "--run runs/fashion-mnist.yaml --out exports/fashion-mnist --json family-fashion-mnist.json"
REMEASURED = "measured here"


@dataclass(frozen=True, slots=True)
class Asked:
    """What a family has to reach; None where nothing is asked. Accuracies are of the test split in per cent,
    `use` is the least share of the latency budget, `minutes` the most for the whole job."""

    largest: float | None = None
    smallest: float | None = None
    use: float | None = None
    minutes: float | None = None
    rising: bool = False


ASKED: dict[str, Asked] = {
    "digits": Asked(largest=98, minutes=3),
    "fashion-mnist": Asked(largest=91.5, smallest=88, use=0.9, minutes=40),
    "cifar10": Asked(largest=82, minutes=90, rising=True),
}


# -------------------------------------------------------------------------------------------------- processes


class JobFailed(BudgetlineError):
    """A `budgetline` process ended with an error."""


def run_job(
    config: Path, out: Path, settings: Sequence[str], environment: Mapping[str, str] | None = None
) -> float:
    """The whole job in a process of its own, its progress shown; wall seconds."""
    flags = [word for setting in settings for word in ("--set", setting)]
    started = time.perf_counter()
    command = budgetline("run", str(config), "--out", str(out), *flags)
    code = run_to_end(command, env=environment, stdout=subprocess.DEVNULL)
    if code != 0:
        raise JobFailed(f"budgetline run {config} --out {out} exited with {code}; see above")
    return time.perf_counter() - started


def verify_again(folder: Path) -> list[Json]:
    """The checks of `budgetline verify`, made in a fresh process; latency is measured again."""
    command = budgetline("verify", str(folder), "--json")
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode not in (0, 1):
        raise JobFailed(f"budgetline verify {folder} exited with {ended.returncode}: {ended.stderr.strip()}")
    checks: list[Json] = json.loads(ended.stdout)
    return checks


# ---------------------------------------------------------------------------------------------------- judging


def family_numbers(manifest: Json, checks: Sequence[Json], wall_s: float | None) -> Json:
    """`wall_s` is None where a finished folder was read."""
    return {
        "data": manifest["data"]["name"],
        "run": manifest["run"],
        "seconds": {
            "wall": None if wall_s is None else round(wall_s, 1),
            "stages": manifest["stages"],
            "sum_of_stages": round(sum(manifest["stages"].values()), 1),
        },
        "search": {key: manifest["search"][key] for key in ("method", "seed", "evaluations", "seconds")},
        "ranking": manifest["search"]["ranking"],
        "tiers": [_tier_numbers(tier, checks) for tier in _smallest_first(manifest["tiers"])],
        "checks": list(checks),
    }


def _smallest_first(tiers: Sequence[Json]) -> list[Json]:
    return sorted(tiers, key=lambda tier: float(tier["budgets"].get("latency_ms", tier["flops"])))


def _tier_numbers(tier: Json, checks: Sequence[Json]) -> Json:
    latency = answer_file(tier)["latency"] or {}
    return {
        "tier": tier_key(tier),
        "budgets": tier["budgets"],
        "measured": tier["measured"],
        "use": tier["use"],
        "latency": {key: latency.get(key) for key in ("p50_ms", "p95_ms", "spread", "drift")},
        "measured_again": next((c["came"] for c in _remeasured(checks) if c["tier"] == tier_key(tier)), None),
        "params": tier["params"],
        "flops": tier["flops"],
        "architecture_accuracy": 100 * tier["accuracy"]["architecture"],
        "test_accuracy": 100 * tier["accuracy"]["test"],
        "retrain_seconds": tier["training"]["seconds"],
        "epochs": tier["training"]["epochs"],
        "choices": tier["architecture"]["description"],
    }


def _remeasured(checks: Sequence[Json]) -> list[Json]:
    return [check for check in checks if check["check"].endswith(REMEASURED)]


def family_targets(numbers: Json, asked: Asked) -> list[Target]:
    tiers, seconds = numbers["tiers"], numbers["seconds"]
    over = [f"{t['tier']} {metric}" for t in tiers for metric, use in t["use"].items() if use > 1]
    others = [check for check in numbers["checks"] if check not in _remeasured(numbers["checks"])]
    failed = [f"{check['tier']} {check['check']}" for check in others if check["ok"] is False]
    limited = [tier for tier in tiers if "latency_ms" in tier["budgets"]]
    seen = {check["tier"] for check in _remeasured(numbers["checks"]) if check["ok"]}
    targets = [
        none_of("tiers over budget, by the manifest", over),
        none_of(
            "tiers not within budget, measured again", [t["tier"] for t in limited if t["tier"] not in seen]
        ),
        none_of("other checks of verify that failed", failed),
    ]
    accuracies = [tier["test_accuracy"] for tier in tiers]
    if asked.use is not None and limited:
        least = min(tier["use"]["latency_ms"] for tier in limited)
        targets.append(at_least("least use of a latency budget", 100 * least, 100 * asked.use, " %"))
    if asked.largest is not None:
        targets.append(at_least("largest tier, test", accuracies[-1], asked.largest, " %"))
    if asked.smallest is not None:
        targets.append(at_least("smallest tier, test", accuracies[0], asked.smallest, " %"))
    if asked.rising:
        targets.append(_rising(accuracies))
    if asked.minutes is not None:
        taken = seconds["sum_of_stages"] if seconds["wall"] is None else seconds["wall"]
        targets.append(at_most("the whole job", taken / 60, asked.minutes, " min"))
    return targets


def _rising(accuracies: Sequence[float]) -> Target:
    rises = all(low < high for low, high in itertools.pairwise(accuracies))
    return Target(
        "test accuracy from tier to tier", "rising", " ".join(f"{a:.2f}" for a in accuracies), rises
    )


# ---------------------------------------------------------------------------------------------------- showing


def family_table(numbers: Json) -> str:
    headings = [
        "tier",
        "budget",
        "use",
        "p50",
        "p95",
        "measured again",
        "params",
        "FLOPs",
        "architecture %",
        "test %",
        "retrain s",
    ]
    tiers = markdown_table(headings, [_row(tier) for tier in numbers["tiers"]])
    seconds = numbers["seconds"]
    stages = ", ".join(f"{stage} {value:.0f}" for stage, value in seconds["stages"].items())
    wall = "" if seconds["wall"] is None else f"; {seconds['wall']:.0f} s of wall time"
    return (
        f"{tiers}\n\nSeconds: {stages}; {seconds['sum_of_stages']:.0f} in all{wall}. {_ranking_line(numbers)}"
    )


def _row(tier: Json) -> list[str]:
    budgets = ", ".join(format_value(metric, limit) for metric, limit in tier["budgets"].items())
    times = [tier["latency"][key] for key in ("p50_ms", "p95_ms")]
    return [
        tier["tier"],
        budgets,
        f"{100 * max(tier['use'].values()):.1f} %",
        *("–" if ms is None else format_value("latency_ms", ms) for ms in times),
        "–" if tier["measured_again"] is None else tier["measured_again"].partition(" (")[0],
        format_value("params", tier["params"]),
        format_value("flops", tier["flops"]),
        f"{tier['architecture_accuracy']:.2f}",
        f"{tier['test_accuracy']:.2f}",
        f"{tier['retrain_seconds']:.0f}",
    ]


def _ranking_line(numbers: Json) -> str:
    ranking = numbers["ranking"]
    if ranking is None:
        return "No rank correlation: nothing was tried."
    if ranking["spearman"] is None:
        return f"No rank correlation: too few networks ({ranking['n']})."
    return (
        f"Rank correlation within the tiers' bands: {ranking['spearman']:.2f} over {ranking['n']} networks "
        f"({'trusted' if ranking['trusted'] else 'not trusted'})."
    )


# ----------------------------------------------------------------------------------------------------- script


def judge(
    evidence: Evidence, folder: Path, wall_s: float | None, changed: Mapping[str, Any], path: Path
) -> bool:
    """Verify a finished family, and write down how it did."""
    manifest = read_manifest(folder)
    numbers = family_numbers(manifest, verify_again(folder), wall_s)
    asked = replace(ASKED.get(str(numbers["data"]).partition(":")[0], Asked()), **changed)
    return evidence.finish(
        path,
        seeds=[manifest["search"]["seed"]],
        numbers=numbers,
        targets=family_targets(numbers, asked),
        table=family_table(numbers),
    )


def add_targets(parser: ArgumentParser) -> None:
    parser.add_argument("--largest", type=float, help="least test accuracy of the largest tier, per cent")
    parser.add_argument("--smallest", type=float, help="least test accuracy of the smallest tier, per cent")
    parser.add_argument("--use", type=float, help="least use of every latency budget, a share")
    parser.add_argument("--minutes", type=float, help="most minutes for the whole job")
    parser.add_argument("--rising", action=BooleanOptionalAction, help="accuracy must rise with the tiers")


def changed_targets(asked: Namespace) -> dict[str, Any]:
    flags = {field.name: getattr(asked, field.name) for field in fields(Asked)}
    return {name: value for name, value in flags.items() if value is not None}


def main() -> bool:
    parser = parser_for("family", __doc__, EXAMPLE)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the run's folder")
    parser.add_argument("--run", type=Path, metavar="RUN.yaml", help="needed where FOLDER is not finished")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for budgetline run")
    add_targets(parser)
    asked = parser.parse_args()
    evidence, wall_s = Evidence("family"), None
    if not (asked.out / MANIFEST).is_file():
        if asked.run is None:
            raise ConfigError(f"{asked.out}: holds no finished run; say with --run RUN.yaml what to run")
        started_fresh = not asked.out.exists()
        seconds = run_job(asked.run, asked.out, asked.set)
        wall_s = seconds if started_fresh else None
    return judge(evidence, asked.out, wall_s, changed_targets(asked), asked.json)


if __name__ == "__main__":
    run_script(main)
