"""What a manifest says of the evaluator's order among the finalists that were briefly trained."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.derive import DeriveSettings, Finalist, Trial
from pipeline.report.assemble import ranking_entry
from pipeline.types import Arch, Tier

S = Tier("cpu", "s", {"latency_ms": 1.0})
M = Tier("cpu", "m", {"latency_ms": 2.0})
FALLING = [0.9, 0.8, 0.7, 0.6, 0.5]


def trials(accuracies: Sequence[float | None]) -> list[Trial]:
    """One per accuracy, the evaluator's favourite first."""
    return [
        Trial(Finalist(Arch("toy", (number,)), 1.0 + number, 0.97, "search", 0.5), 0.97, accuracy)
        for number, accuracy in enumerate(accuracies)
    ]


def test_an_order_that_agrees_is_trusted_and_said_to_agree() -> None:
    entry = ranking_entry([(S, trials(FALLING)), (M, trials(FALLING))], DeriveSettings())
    assert entry is not None
    assert entry["trusted"] and entry["spearman"] == 1.0 and entry["n"] == 10
    assert "agrees with brief training" in entry["note"]


def test_a_reversed_order_is_not_trusted_and_the_note_says_what_the_choice_rests_on() -> None:
    entry = ranking_entry([(S, trials(FALLING[::-1]))], DeriveSettings())
    assert entry is not None
    assert not entry["trusted"] and entry["spearman"] == -1.0
    assert "brief training of them" in entry["note"] and "agrees" not in entry["note"]


def test_too_few_to_tell_are_not_trusted() -> None:
    entry = ranking_entry([(S, trials(FALLING[:3]))], DeriveSettings())
    assert entry is not None
    assert entry["spearman"] is None and not entry["trusted"]


def test_what_is_trusted_is_a_setting() -> None:
    nearly = trials([0.9, 0.7, 0.8, 0.5, 0.6])  # rho 0.8
    trusted = {
        least: ranking_entry([(S, nearly)], DeriveSettings(trusted_correlation=least)) for least in (0.7, 0.9)
    }
    assert {least: entry and entry["trusted"] for least, entry in trusted.items()} == {0.7: True, 0.9: False}


def test_finalists_that_were_not_trained_do_not_count() -> None:
    entry = ranking_entry([(S, trials([*FALLING, None, None])), (M, trials([None]))], DeriveSettings())
    assert entry is not None
    assert entry["n"] == 5
    assert [(tier["name"], tier["n"], tier["spearman"]) for tier in entry["tiers"]] == [
        ("s", 5, 1.0),
        ("m", 0, None),
    ]
    assert [point["accuracy"] for point in entry["points"]] == FALLING


def test_no_brief_training_leaves_nothing_to_say() -> None:
    assert ranking_entry([(S, trials([None, None]))], DeriveSettings()) is None
