from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from benchmarks import e2rnas_nb201
from benchmarks.e2rnas_nb201 import (
    CONTENDERS,
    Table,
    nearest_cells,
    reference,
    share_pressed,
    summary,
    targets_of,
)
from pipeline.costs.table import SpaceCosts
from pipeline.errors import ConfigError
from pipeline.search.e2rnas import E2rnas
from pipeline.search.problem import SearchProblem
from pipeline.spaces.nb201 import NB201Settings, NB201Space
from pipeline.types import Arch, Evaluator, Limit, Tier

OPS = np.array(list(itertools.product(range(5), repeat=6)))
CONVS = (OPS == 3).sum(axis=1)


def arrays(**changed: Any) -> dict[str, np.ndarray[Any, Any]]:
    """A table in which 3×3 convolutions are all that counts."""
    return {
        "ops": OPS,
        "test_acc_200ep": 30.0 + 10 * CONVS,
        "fgsm_acc_eps2": 10.0 + 5 * CONVS,
        "pgd_acc_eps2": 20.0 - 2 * CONVS,
        "params_M": 0.1 + 0.2 * CONVS,
        **changed,
    }


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, *words: str) -> dict[str, Any]:
    np.savez(folder / "table.npz", allow_pickle=False, **arrays())
    small = "--data digits --images 200 --batch 16 --channels 2 --warm-up 2 --steps 4".split()
    files = ["--table", str(folder / "table.npz"), "--json", str(folder / "found.json")]
    monkeypatch.setattr(e2rnas_nb201, "start_tuned", lambda name: None)
    monkeypatch.setattr("sys.argv", ["e2rnas_nb201", *small, *files, *words])
    e2rnas_nb201.main()
    found: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return found


def test_cells_are_judged_beside_random_ones_of_their_size() -> None:
    table = Table(arrays(), Path("t"), 2)
    usage_R = 0.2 * CONVS
    beside = reference(table, usage_R)
    assert beside["cells"] == int((CONVS == 5).sum()), "all of them are connected"
    assert beside["test_acc_200ep"] == {"mean": 80.0, "best": 80.0}
    beside = reference(table, np.where(CONVS >= 4, 1.0, 0.0))
    cell = {"choices": [3, 3, 3, 3, 3, 1], "last_mixture": [3] * 6, "usage": 0.9, "pressed": 0.5}
    found = summary(table, [{"tiers": [cell]}, {"tiers": [{**cell, "choices": [3] * 6}]}], 0, beside)
    assert (found["test_acc_200ep"], found["fgsm_acc_eps2"], found["pgd_acc_eps2"]) == (85.0, 37.5, 9.0)
    assert found["params_M"] == pytest.approx(1.2)
    num = [int((CONVS == k).sum()) for k in range(7)]
    all_of_them = num[4] + num[5] + num[6]
    expected = (num[4] + num[4] + num[5]) / 2 / all_of_them
    assert found["better_than"]["fgsm_acc_eps2"] == pytest.approx(expected)


def test_a_tier_s_cell_is_the_nearest_to_the_mixture_that_uses_the_budget() -> None:
    space = NB201Space((1, 8, 8), 10, NB201Settings(cells=1, channels=4))
    costs = SpaceCosts(space, None)
    wanted = Arch("nb201", (3, 1, 3, 1, 3, 1))
    own = float(costs.of([wanted])[0, costs.metrics.index("params")])
    mix_EO = np.where(space.mix_of(wanted) > 0, 0.3, 0.175)

    def found(limit: float) -> Arch:
        tier = Tier("d", "t", (Limit("params", limit, False, ""),))
        nobody = cast(Evaluator, None)
        asked = SearchProblem(space, {"d": costs}, (tier,), nobody, 1)
        return nearest_cells(asked, space, mix_EO[None])[0]

    assert found(own) == found(own / 0.86) == wanted
    smaller = found(0.84 * own)
    same = sum(a == b for a, b in zip(smaller.choices, wanted.choices, strict=True))
    assert smaller != wanted and same == 5, "it keeps its budget, at the price of one edge"


def test_steps_that_size_or_budget_had_a_say_in_are_counted(tmp_path: Path) -> None:
    def step(**own: Any) -> dict[str, Any]:
        return {"tiers": [{"tier": "d/t", "loss": 1.0, "multiplier": {"params": 0.0}, **own}]}

    records = [
        {"stage": "warm_up"},
        step(),
        step(multiplier={"params": 0.1}),
        step(objective_weights=[0.9, 0.1]),
        step(objective_weights=[1.0, 0.0]),
        {"tiers": [{"tier": "d/t", "multiplier": {"params": 1.0}}]},  # moves no α
        {"tiers": [{**step()["tiers"][0], "tier": "d/other"}]},
    ]
    (tmp_path / "trace").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    assert share_pressed(tmp_path / "trace", Tier("d", "t", ())) == 0.5


def test_ahead_means_ahead_of_both_under_both_attacks() -> None:
    table = Table(arrays(), Path("t"), 2)

    def of(fgsm: float, pgd: float) -> dict[str, Any]:
        return {tier: {"fgsm_acc_eps2": fgsm, "pgd_acc_eps2": pgd} for tier in ("a", "b")}

    targets = targets_of(table, {"e2rnas": of(30, 20), "darts": of(29, 21), "darts-prime": of(30, 10)})
    assert {target.name: target.passed for target in targets} == {
        "e2rnas over darts, FGSM": True,
        "e2rnas over darts, PGD": False,
        "e2rnas over darts-prime, FGSM": False,
        "e2rnas over darts-prime, PGD": True,
    }
    assert targets_of(table, {"darts": of(1, 1)}) == []


def test_a_table_without_attacks_is_refused() -> None:
    with pytest.raises(ConfigError, match="t: no column 'fgsm_acc_eps4'; there are: "):
        Table(arrays(), Path("t"), 4)


def test_halves_are_changed_one_at_a_time() -> None:
    ours = CONTENDERS["e2rnas"]
    assert ours.adversarial and ours.settings == E2rnas()
    clean, plain = CONTENDERS["e2rnas on clean weights"], CONTENDERS["darts on adversarial weights"]
    assert (clean.method, clean.settings, clean.mixed_norm, clean.adversarial) == (
        ours.method,
        ours.settings,
        ours.mixed_norm,
        False,
    )
    assert plain.settings == CONTENDERS["darts"].settings and plain.adversarial


def test_every_method_searches_once_per_seed_for_the_same_budgets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--seeds", "0,1", "--methods", "e2rnas,darts-prime"]
    found = run(monkeypatch, tmp_path, *words)
    numbers = found["numbers"]
    assert set(numbers["methods"]) == {"e2rnas", "darts-prime"}
    for tiers in numbers["methods"].values():
        assert list(tiers) == ["20%", "40%"]
        for own in tiers.values():
            assert len(own["per_seed"]) == 2 and max(own["usage"]) <= 1
    assert numbers["random"]["20%"]["params_M"]["mean"] < numbers["random"]["40%"]["params_M"]["mean"]
    assert len(found["targets"]) == 2
    assert "| random cells, best |" in capsys.readouterr().out
    monkeypatch.setattr(e2rnas_nb201, "METHODS", {})
    assert run(monkeypatch, tmp_path, *words)["numbers"] == numbers


def test_an_estimate_times_and_searches_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(e2rnas_nb201, "METHODS", {})
    with pytest.raises(FileNotFoundError):
        run(monkeypatch, tmp_path, "--estimate", "1")
    assert "| darts on adversarial weights |" in capsys.readouterr().out
