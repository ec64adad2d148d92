"""A family found without training beside one found with a supernet: time, and accuracy per tier.

RUN is run twice, with `evaluator: eproxy` and with `evaluator: one-shot`; all else is equal: tiers, method,
evaluations, seed, recipe. Finished runs in WORK are only read. The latency predictor is shared through the
cost cache, so that time is told without the profile stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from benchmarks.record import Evidence, Target, at_most, markdown_table, none_of, parser_for, run_script
from benchmarks.several_devices import LATENCY, run_variant
from pipeline.config import read_config
from pipeline.report.manifest import tier_key
from pipeline.types import Json
from pipeline.units import format_value

RUN = Path(__file__).with_name("eproxy_family.yaml")
EPROXY, SUPERNET = "eproxy", "one-shot"
SEARCH_MINUTES = 10.0


def seconds_of(manifest: Json) -> Json:
    """Of the stages that differ, and of all but the profile."""
    stages = {name: seconds for name, seconds in manifest["stages"].items() if name != "profile"}
    return {**stages, "all": sum(stages.values())}


def by_tier(manifests: dict[str, Json]) -> list[Json]:
    """Each tier as both searches found it."""
    found = {name: {tier_key(t): t for t in m["tiers"]} for name, m in manifests.items()}
    return [
        {
            "tier": tier_key(tier),
            "budget_ms": tier["budgets"][LATENCY],
            **{
                name: {
                    "use": tiers[tier_key(tier)]["use"][LATENCY],
                    "test": 100 * tiers[tier_key(tier)]["accuracy"]["test"],
                    "choices": tiers[tier_key(tier)]["architecture"]["description"],
                }
                for name, tiers in found.items()
            },
        }
        for tier in manifests[EPROXY]["tiers"]
    ]


def targets_of(seconds: dict[str, Json], tiers: Sequence[Json]) -> list[Target]:
    over = [f"{t['tier']} {name}" for t in tiers for name in (EPROXY, SUPERNET) if t[name]["use"] > 1]
    return [
        none_of("tiers over budget", over),
        at_most("search without training", seconds[EPROXY]["search"] / 60, SEARCH_MINUTES, " min"),
    ]


def table_of(seconds: dict[str, Json], tiers: Sequence[Json]) -> str:
    stages = list(seconds[EPROXY])
    times = [[name, *(f"{numbers[stage]:.0f}" for stage in stages)] for name, numbers in seconds.items()]
    rows = [
        [
            tier["tier"],
            format_value(LATENCY, tier["budget_ms"]),
            *(f"{100 * tier[name]['use']:.1f} %" for name in (EPROXY, SUPERNET)),
            *(f"{tier[name]['test']:.2f}" for name in (EPROXY, SUPERNET)),
            f"{tier[EPROXY]['test'] - tier[SUPERNET]['test']:+.2f}",
        ]
        for tier in tiers
    ]
    mean = fmean(tier[EPROXY]["test"] - tier[SUPERNET]["test"] for tier in tiers)
    headings = ["tier", "budget", "use, eproxy", "supernet", "test %, eproxy", "supernet", "difference"]
    return "\n\n".join(
        [
            markdown_table(["evaluator", *(f"{stage} s" for stage in stages)], times),
            markdown_table(headings, rows),
            f"Without training {mean:+.2f} points on average.",
        ]
    )


def main() -> bool:
    parser = parser_for("eproxy_family", __doc__, "--work eproxy-family --json eproxy_family.json")
    parser.add_argument("--run", type=Path, default=RUN, metavar="RUN.yaml", help="default: %(default)s")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="where the runs go")
    asked = parser.parse_args()
    evidence = Evidence("eproxy_family")
    asked.work.mkdir(parents=True, exist_ok=True)
    config = read_config(asked.run)
    manifests = {
        name: run_variant(name, {**config, "evaluator": name}, asked.work) for name in (EPROXY, SUPERNET)
    }
    seconds = {name: seconds_of(manifest) for name, manifest in manifests.items()}
    tiers = by_tier(manifests)
    return evidence.finish(
        asked.json,
        seeds=[int(manifests[EPROXY]["search"]["seed"])],
        numbers={"seconds": seconds, "tiers": tiers},
        targets=targets_of(seconds, tiers),
        table=table_of(seconds, tiers),
    )


if __name__ == "__main__":
    run_script(main)
