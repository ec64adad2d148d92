"""benchmarks/one_word.py: what is changed, what is refused, and what is told of it."""

from __future__ import annotations

import pytest

from benchmarks import one_word
from benchmarks.one_word import Change, read_change
from pipeline.config import parse, read_config
from pipeline.errors import ConfigError
from pipeline.types import Json

CELLS = one_word.RUN.with_name("cells.yaml")


def test_the_space_is_changed_and_nothing_else() -> None:
    config = read_config(one_word.RUN)
    made = one_word.variants(config, read_change("space=cell,nb201"))
    runs = {word: parse(changed, word) for word, changed in made.items()}
    assert runs["cell"] == parse(config, "the file as it stands")
    assert {word: run.space.name for word, run in runs.items()} == {"cell": "cell", "nb201": "nb201"}
    cell, nb201 = (run.to_json() | {"space": None} for run in runs.values())
    assert cell == nb201


def test_a_method_brings_its_evaluator() -> None:
    made = one_word.variants(read_config(CELLS), read_change("method=darts,darts-prime,e2rnas"))
    runs = [parse(changed, word) for word, changed in made.items()]
    assert [run.method.name for run in runs] == ["darts", "darts-prime", "e2rnas"]
    assert [run.evaluator.name for run in runs] == ["relaxed", "relaxed", "relaxed-adversarial"]
    for run in runs:
        assert run.space.name == "cell" and run.profiles == runs[0].profiles
        assert (run.search, run.derive, run.retrain) == (runs[0].search, runs[0].derive, runs[0].retrain)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("space", "--change: 'space' is not KEY=WORD,WORD"),
        ("space= ,", "is not KEY=WORD,WORD; example: space=cell,nb201"),
        ("spaec=cell", "did you mean 'space'"),
    ],
)
def test_what_cannot_be_read_is_refused(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read_change(text)


def test_all_words_are_tried_before_anything_runs() -> None:
    with pytest.raises(ConfigError, match="nb210"):
        one_word.variants(read_config(one_word.RUN), Change("space", ("cell", "nb210")))


def family(use: float, *, ok: bool = True) -> Json:
    latency = {"latency_ms": 0.2}
    tier = {
        "tier": "cpu/s",
        "budgets": latency,
        "use": {"latency_ms": use},
        "measured_again": "0.190 ms (slower)",
        "params": 12_000,
        "test_accuracy": 87.654,
    }
    checks = [
        {"tier": "cpu/s", "check": "latency measured here", "ok": ok, "came": "0.190 ms"},
        {"tier": "cpu/s", "check": "hash", "ok": True, "came": "same"},
    ]
    numbers = {
        "search": {"method": "darts"},
        "tiers": [tier],
        "checks": checks,
        "seconds": {"wall": None, "stages": {"search": 12.0, "derive": 3.4}, "sum_of_stages": 15.4},
    }
    attacks = [{"attack": "fgsm", "accuracy": 0.251}, {"attack": "pgd", "accuracy": 0.1}]
    return {"space": "cell", "numbers": numbers, "attacks": {"cpu/s": attacks}}


@pytest.mark.parametrize(("use", "ok", "failed"), [(0.98, True, 0), (1.01, True, 1), (0.98, False, 1)])
def test_budgets_are_kept_when_made_and_when_measured_again(use: float, ok: bool, failed: int) -> None:
    targets = one_word.targets_of({"darts": family(use, ok=ok), "e2rnas": family(0.5)})
    assert len(targets) == 6
    wrong = [target for target in targets if not target.passed]
    assert len(wrong) == failed and all(target.name.startswith("darts: ") for target in wrong)


def test_what_is_told() -> None:
    told = one_word.table_of({"darts": family(0.98)})
    row = "| cell | darts | cpu/s | 0.200 ms | 98.0 % | 0.190 ms | 12.0 k | 87.65 | fgsm 25.1, pgd 10.0 |"
    assert row in told
    assert "| darts | 12 | 3 |" in told
