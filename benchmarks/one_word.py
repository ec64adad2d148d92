"""One run with a word changed at a time, say another space or another method: every one ends with a family.

    python -m benchmarks.one_word --change space=cell,nb201 --work DIR --json FILE [--run RUN.yaml]

RUN is run once for each word in the place of its KEY; nothing else changes. A fresh process verifies each
family: hashes, parity, budgets measured again. Finished runs in WORK are only read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.family import Asked as AskedOfFamily
from benchmarks.family import family_numbers, family_targets, verify_again
from benchmarks.record import Evidence, Target, markdown_table, parser_for, run_script
from benchmarks.several_devices import run_variant
from pipeline.config import DEFAULTS, parse, read_config
from pipeline.errors import ConfigError
from pipeline.report.manifest import tier_key
from pipeline.settings import pick
from pipeline.types import Json
from pipeline.units import format_value

RUN = Path(__file__).with_suffix(".yaml")


@dataclass(frozen=True)
class Change:
    key: str
    words: tuple[str, ...]


def read_change(text: str) -> Change:
    """`space=cell,nb201`."""
    key, equals, words = text.partition("=")
    change = Change(key.strip(), tuple(word.strip() for word in words.split(",") if word.strip()))
    if not equals or not change.words:
        raise ConfigError(f"--change: '{text}' is not KEY=WORD,WORD; example: space=cell,nb201")
    pick(DEFAULTS, change.key, "key of a run")
    return change


def variants(config: Json, change: Change) -> dict[str, Json]:
    """By word. Raises ConfigError where a run cannot be asked for so, before any is started."""
    runs = {word: {**config, change.key: word} for word in change.words}
    for word, run in runs.items():
        parse(run, f"--change {change.key}={word}")
    return runs


def numbers_of(manifest: Json, checks: list[Json]) -> Json:
    return {
        "space": manifest["space"]["name"],
        "numbers": family_numbers(manifest, checks, None),
        "attacks": {tier_key(tier): tier["accuracy"]["attacks"] for tier in manifest["tiers"]},
    }


def targets_of(families: Mapping[str, Json]) -> list[Target]:
    """Budgets kept, when made and when measured again, and all else that `verify` looks at."""
    asked = AskedOfFamily()
    return [
        Target(f"{word}: {target.name}", target.wanted, target.came, target.passed)
        for word, family in families.items()
        for target in family_targets(family["numbers"], asked)
    ]


def table_of(families: Mapping[str, Json]) -> str:
    headings = [
        "space",
        "method",
        "tier",
        "budget",
        "use",
        "measured again",
        "params",
        "test %",
        "attacked %",
    ]
    rows, times = [], []
    for word, family in families.items():
        numbers = family["numbers"]
        for tier in numbers["tiers"]:
            rows.append(
                [
                    family["space"],
                    numbers["search"]["method"],
                    tier["tier"],
                    ", ".join(format_value(metric, limit) for metric, limit in tier["budgets"].items()),
                    f"{100 * max(tier['use'].values()):.1f} %",
                    (tier["measured_again"] or "–").partition(" (")[0],
                    format_value("params", tier["params"]),
                    f"{tier['test_accuracy']:.2f}",
                    ", ".join(
                        f"{attack['attack']} {100 * attack['accuracy']:.1f}"
                        for attack in family["attacks"][tier["tier"]]
                    ),
                ]
            )
        stages = numbers["seconds"]["stages"]
        times.append([word, *(f"{seconds:.0f}" for seconds in stages.values())])
    stages = next(iter(families.values()))["numbers"]["seconds"]["stages"]
    return "\n\n".join(
        [
            markdown_table(headings, rows),
            markdown_table(["the word", *(f"{stage}, s" for stage in stages)], times),
        ]
    )


def main() -> bool:
    parser = parser_for("one_word", __doc__, "--change space=cell,nb201 --work one-word --json one_word.json")
    parser.add_argument("--run", type=Path, default=RUN, metavar="RUN.yaml", help="default: %(default)s")
    parser.add_argument("--change", required=True, metavar="KEY=WORD,WORD", help="what is changed in RUN")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="where the runs go")
    asked = parser.parse_args()
    runs = variants(read_config(asked.run), read_change(asked.change))
    evidence = Evidence("one_word")
    asked.work.mkdir(parents=True, exist_ok=True)
    families: dict[str, Json] = {}
    seeds: set[int] = set()
    for word, config in runs.items():
        manifest = run_variant(word, config, asked.work)
        families[word] = numbers_of(manifest, verify_again(asked.work / word))
        seeds.add(int(manifest["search"]["seed"]))
    return evidence.finish(
        asked.json,
        seeds=sorted(seeds),
        numbers=families,
        targets=targets_of(families),
        table=table_of(families),
    )


if __name__ == "__main__":
    run_script(main)
