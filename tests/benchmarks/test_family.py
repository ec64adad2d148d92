from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.family import ASKED, Asked, family_numbers, family_table, family_targets

Json = dict[str, Any]


@pytest.fixture
def manifest(root: Path) -> Json:
    found: Json = json.loads((root / "tests/report/golden_manifest.json").read_text())
    return found


def checks_of(manifest: Json) -> list[Json]:
    return [
        {
            "tier": f"{tier['device']}/{tier['name']}",
            "check": "budget latency_ms, measured here",
            "ok": True,
            "wanted": "≤ 1 ms",
            "came": "0.9 ms (p95 1 ms)",
        }
        for tier in manifest["tiers"]
        if "latency_ms" in tier["budgets"]
    ]


def verdicts(
    manifest: Json, checks: list[Json], asked: Asked, wall_s: float | None = None
) -> dict[str, bool]:
    targets = family_targets(family_numbers(manifest, checks, wall_s), asked)
    return {target.name: target.passed for target in targets}


def test_a_sound_family_reaches_what_is_always_asked(manifest: Json) -> None:
    assert verdicts(manifest, checks_of(manifest), Asked()) == {
        "tiers over budget, by the manifest": True,
        "tiers not within budget, measured again": True,
        "other checks of verify that failed": True,
    }


def test_a_tier_that_is_over_when_measured_again_is_named(manifest: Json) -> None:
    checks = checks_of(manifest)
    checks[0]["ok"] = False
    targets = family_targets(family_numbers(manifest, checks, None), Asked())
    missed = [target for target in targets if not target.passed]
    assert [(t.name, t.came) for t in missed] == [
        ("tiers not within budget, measured again", checks[0]["tier"])
    ]


def test_a_tier_that_was_not_measured_again_is_not_taken_for_good(manifest: Json) -> None:
    assert not verdicts(manifest, checks_of(manifest)[1:], Asked())["tiers not within budget, measured again"]


def test_any_failed_check_counts(manifest: Json) -> None:
    wrong = {"tier": "cpu/s", "check": "files", "ok": False, "wanted": "", "came": ""}
    assert not verdicts(manifest, [*checks_of(manifest), wrong], Asked())[
        "other checks of verify that failed"
    ]


def test_accuracies_are_asked_of_the_smallest_and_the_largest_tier(manifest: Json) -> None:
    tiers = manifest["tiers"]
    tiers.reverse()  # the order in the manifest does not matter
    budgets = [tier["budgets"]["latency_ms"] for tier in tiers]
    tests = [100 * tier["accuracy"]["test"] for tier in tiers]
    smallest, largest = tests[budgets.index(min(budgets))], tests[budgets.index(max(budgets))]
    exact = Asked(smallest=smallest, largest=largest, rising=True)
    assert all(verdicts(manifest, checks_of(manifest), exact).values())
    above = verdicts(manifest, checks_of(manifest), Asked(smallest=smallest + 0.01, largest=largest + 0.01))
    assert not above["smallest tier, test"] and not above["largest tier, test"]


def test_accuracy_must_rise_from_every_tier_to_the_next(manifest: Json) -> None:
    manifest["tiers"][1]["accuracy"]["test"] = manifest["tiers"][0]["accuracy"]["test"]
    assert not verdicts(manifest, checks_of(manifest), Asked(rising=True))["test accuracy from tier to tier"]


def test_use_is_the_least_over_the_tiers(manifest: Json) -> None:
    least = min(tier["use"]["latency_ms"] for tier in manifest["tiers"])
    name = "least use of a latency budget"
    assert verdicts(manifest, checks_of(manifest), Asked(use=least))[name]
    assert not verdicts(manifest, checks_of(manifest), Asked(use=least + 1e-6))[name]


def test_time_is_the_wall_where_it_is_known_else_the_stages(manifest: Json) -> None:
    minutes = sum(manifest["stages"].values()) / 60
    asked, checks = Asked(minutes=minutes + 0.01), checks_of(manifest)
    assert verdicts(manifest, checks, asked)["the whole job"]
    assert not verdicts(manifest, checks, asked, wall_s=60 * minutes + 1)["the whole job"]


def test_the_table_has_a_row_per_tier_and_the_rank_correlation(manifest: Json) -> None:
    table = family_table(family_numbers(manifest, checks_of(manifest), 100.0))
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + len(manifest["tiers"])
    assert "Rank correlation" in table and "100 s of wall time" in table and "0.9 ms" in table


def test_what_is_asked_of_the_data_sets_of_the_evidence() -> None:
    assert ASKED["fashion-mnist"] == Asked(largest=91.5, smallest=88, use=0.9, minutes=40)
    assert ASKED["cifar10"] == Asked(largest=82, minutes=90, rising=True)
    assert ASKED["digits"] == Asked(largest=98, minutes=3)
