"""Several devices in one search beside a search per device: evaluations, time, and accuracy per tier.

RUN names several profiles. It is run once as it stands, and once per profile with the others left out; all
else is equal: supernet steps, evaluations, seed, recipe. Finished runs in WORK are only read. Latency
predictors are shared through the cost cache, so that time is told without the profile stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import yaml

from benchmarks.family import run_job
from benchmarks.record import (
    Evidence,
    Target,
    at_most,
    markdown_table,
    none_of,
    parser_for,
    run_script,
)
from pipeline.artifacts import write_bytes
from pipeline.config import parse, read_config
from pipeline.devices.profile import DeviceProfile
from pipeline.errors import ConfigError
from pipeline.progress import Silent
from pipeline.report.manifest import MANIFEST, read_manifest, tier_key
from pipeline.run import open_run
from pipeline.types import Json
from pipeline.units import format_value

RUN = Path(__file__).with_name("several_devices.yaml")
LATENCY = "latency_ms"
TOGETHER = "together"
TOLERATED_POINTS = 0.5  # about the spread of one training's test accuracy from seed to seed


def variants(config: Json) -> dict[str, Json]:
    """The run as it stands, and one per profile."""
    profiles = {profile.name: entry for profile, entry in _profiles(config)}
    if len(profiles) < 2:
        raise ConfigError("--run: has one profile; several devices are compared, so name several")
    return {TOGETHER: config, **{name: {**config, "profiles": [entry]} for name, entry in profiles.items()}}


def _profiles(config: Json) -> list[tuple[DeviceProfile, object]]:
    return list(zip(parse(config, "--run").profiles, config["profiles"], strict=True))


def run_variant(name: str, config: Json, work: Path) -> Json:
    """The finished run's manifest. Raises StaleArtifact where the folder holds a run of another job."""
    folder, path = work / name, work / f"{name}.yaml"
    if (folder / MANIFEST).is_file():
        open_run(folder, parse(config, str(path)), Silent())
    else:
        write_bytes(path, yaml.safe_dump(config, sort_keys=False).encode())
        run_job(path, folder, [])
    return read_manifest(folder)


def search_numbers(manifest: Json) -> Json:
    return {
        "evaluations": manifest["search"]["evaluations"],
        "search_seconds": manifest["search"]["seconds"],
        "derive_seconds": manifest["stages"]["derive"],
    }


def by_tier(manifests: dict[str, Json]) -> list[Json]:
    """Each tier as the search of all devices found it, beside its own device's search."""
    alone = {tier_key(t): t for name, m in manifests.items() if name != TOGETHER for t in m["tiers"]}
    return [
        {
            "tier": tier_key(tier),
            "budget_ms": tier["budgets"][LATENCY],
            **{
                side: {
                    "use": found["use"][LATENCY],
                    **{split: 100 * found["accuracy"][split] for split in ("architecture", "test")},
                    "choices": found["architecture"]["description"],
                }
                for side, found in ((TOGETHER, tier), ("alone", alone[tier_key(tier)]))
            },
        }
        for tier in manifests[TOGETHER]["tiers"]
    ]


def targets_of(searches: dict[str, Json], tiers: Sequence[Json]) -> list[Target]:
    alone = [numbers for name, numbers in searches.items() if name != TOGETHER]
    together = searches[TOGETHER]
    loss = fmean(tier["alone"]["test"] - tier[TOGETHER]["test"] for tier in tiers)
    over = [
        f"{tier['tier']} {side}" for tier in tiers for side in (TOGETHER, "alone") if tier[side]["use"] > 1
    ]
    return [
        none_of("tiers over budget", over),
        at_most(
            "evaluations against the sum of the searches alone",
            together["evaluations"] / sum(numbers["evaluations"] for numbers in alone),
            0.4,
        ),
        at_most("mean loss of test accuracy", loss, TOLERATED_POINTS, " points"),
    ]


def table_of(searches: dict[str, Json], tiers: Sequence[Json]) -> str:
    headings = ["search", "evaluations", "search s", "derive s"]
    rows = [
        [name, n["evaluations"], f"{n['search_seconds']:.0f}", f"{n['derive_seconds']:.0f}"]
        for name, n in searches.items()
    ]
    tier_headings = ["tier", "budget", "use together", "alone", "test % together", "alone", "difference"]
    tier_rows = [
        [
            tier["tier"],
            format_value(LATENCY, tier["budget_ms"]),
            *(f"{100 * tier[side]['use']:.1f} %" for side in (TOGETHER, "alone")),
            *(f"{tier[side]['test']:.2f}" for side in (TOGETHER, "alone")),
            f"{tier[TOGETHER]['test'] - tier['alone']['test']:+.2f}",
        ]
        for tier in tiers
    ]
    return "\n\n".join([markdown_table(headings, rows), markdown_table(tier_headings, tier_rows)])


def main() -> bool:
    parser = parser_for("several_devices", __doc__, "--work several --json several_devices.json")
    parser.add_argument("--run", type=Path, default=RUN, metavar="RUN.yaml", help="default: %(default)s")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="where the runs go")
    asked = parser.parse_args()
    evidence = Evidence("several_devices")
    asked.work.mkdir(parents=True, exist_ok=True)
    config = read_config(asked.run)
    manifests = {name: run_variant(name, each, asked.work) for name, each in variants(config).items()}
    searches = {name: search_numbers(manifest) for name, manifest in manifests.items()}
    tiers = by_tier(manifests)
    return evidence.finish(
        asked.json,
        seeds=[int(manifests[TOGETHER]["search"]["seed"])],
        numbers={"searches": searches, "tiers": tiers},
        targets=targets_of(searches, tiers),
        table=table_of(searches, tiers),
    )


if __name__ == "__main__":
    run_script(main)
