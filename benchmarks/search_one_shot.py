"""All tiers in one search by `importance`, beside a search per tier by `asng`, on real images.

RUN has one device with several tiers. Per seed it is run once as it stands, and once per tier with the others
left out and `method: asng`. Both sides get the same number of evaluations in all: E together, E/K each. A
search per tier trains a supernet of its own for as many steps as the one for all tiers. What a search
prefers within a tier's band is retrained, by the same recipe on both sides. Finished runs in WORK are only
read, so the same command goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from scipy import stats

from benchmarks.record import (
    Evidence,
    Target,
    at_least,
    at_most,
    markdown_table,
    parser_for,
    run_script,
    whole_numbers,
)
from benchmarks.several_devices import run_variant
from pipeline.config import parse, read_config
from pipeline.errors import ConfigError
from pipeline.types import Json

RUN = Path(__file__).with_name("search_one_shot.yaml")
TOGETHER = "together"
WALL_LIMIT = 1.3
TOLERATED_POINTS = 0.3


def variants(config: Json, seed: int) -> dict[str, Json]:
    """The run for all tiers, and one per tier with its share of the evaluations."""
    parsed = parse(config, "--run")
    if len(parsed.profiles) != 1 or len(parsed.profiles[0].tiers) < 2:
        raise ConfigError(
            "--run: searches for several tiers of one device are compared; name one with several"
        )
    (profile,) = config["profiles"]
    each = parsed.search.evaluations // len(profile["tiers"])
    alone = {
        str(tier["name"]): {
            **config,
            "seed": seed,
            "method": "asng",
            "profiles": [{**profile, "tiers": [tier]}],
            "search": {**config["search"], "evaluations": each},
        }
        for tier in profile["tiers"]
    }
    return {TOGETHER: {**config, "seed": seed, "method": "importance"}, **alone}


def compared(manifests: dict[str, Json]) -> Json:
    """One seed: seconds of the searches, and every tier's accuracy on both sides, in per cent."""
    together = manifests[TOGETHER]
    return {
        "seed": together["search"]["seed"],
        "seconds": {name: manifest["search"]["seconds"] for name, manifest in manifests.items()},
        "evaluations": {name: manifest["search"]["evaluations"] for name, manifest in manifests.items()},
        "tiers": [
            {
                "tier": tier["name"],
                "budgets": tier["budgets"],
                TOGETHER: 100 * tier["accuracy"]["test"],
                "alone": 100 * manifests[tier["name"]]["tiers"][0]["accuracy"]["test"],
            }
            for tier in together["tiers"]
        ],
    }


def wall_ratio(seed: Json) -> float:
    """The search for all tiers against the mean of those for one."""
    alone = [seconds for name, seconds in seed["seconds"].items() if name != TOGETHER]
    return float(seed["seconds"][TOGETHER] / fmean(alone))


def gains(seeds: Sequence[Json]) -> list[float]:
    """Points of test accuracy that searching together gains, per seed and tier."""
    return [tier[TOGETHER] - tier["alone"] for seed in seeds for tier in seed["tiers"]]


def gain_interval(seeds: Sequence[Json]) -> tuple[float, float]:
    """95 % t interval of the mean gain over seeds and tiers."""
    interval = stats.ttest_1samp(gains(seeds), 0.0).confidence_interval(0.95)
    return float(interval.low), float(interval.high)


def targets_of(seeds: Sequence[Json]) -> list[Target]:
    return [
        at_most("wall time of the search against one tier's", fmean(map(wall_ratio, seeds)), WALL_LIMIT),
        at_least("mean gain of test accuracy", fmean(gains(seeds)), -TOLERATED_POINTS, " points"),
    ]


def table_of(seeds: Sequence[Json]) -> str:
    rows = [
        [
            names[0]["tier"],
            f"{fmean(tier[TOGETHER] for tier in names):.2f}",
            f"{fmean(tier['alone'] for tier in names):.2f}",
            f"{fmean(tier[TOGETHER] - tier['alone'] for tier in names):+.2f}",
        ]
        for names in zip(*(seed["tiers"] for seed in seeds), strict=True)
    ]
    low, high = gain_interval(seeds)
    together = fmean(seed["seconds"][TOGETHER] for seed in seeds)
    alone = fmean(s for seed in seeds for name, s in seed["seconds"].items() if name != TOGETHER)
    return (
        f"{markdown_table(['tier', 'together, test %', 'alone', 'gain'], rows)}\n\n"
        f"Mean gain {fmean(gains(seeds)):+.2f} points ({low:+.2f} to {high:+.2f}). One search for all took "
        f"{together:.0f} s, one for a tier {alone:.0f} s on average."
    )


def main() -> bool:
    parser = parser_for("search_one_shot", __doc__, "--work one-shot --json search_one_shot.json")
    parser.add_argument("--run", type=Path, default=RUN, metavar="RUN.yaml", help="default: %(default)s")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="where the runs go")
    parser.add_argument("--seeds", type=whole_numbers, default=[0, 1, 2], help="with commas between")
    asked = parser.parse_args()
    evidence = Evidence("search_one_shot")
    asked.work.mkdir(parents=True, exist_ok=True)
    config = read_config(asked.run)
    seeds = [
        compared(
            {
                name: run_variant(f"seed{seed}-{name}", each, asked.work)
                for name, each in variants(config, seed).items()
            }
        )
        for seed in asked.seeds
    ]
    return evidence.finish(
        asked.json,
        seeds=asked.seeds,
        numbers={"seeds": seeds, "gain_interval": gain_interval(seeds)},
        targets=targets_of(seeds),
        table=table_of(seeds),
    )


if __name__ == "__main__":
    run_script(main)
