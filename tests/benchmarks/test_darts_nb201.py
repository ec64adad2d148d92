from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import darts_nb201
from benchmarks.darts_nb201 import VARIANTS, Table, in_words, summary, targets_of
from pipeline.errors import ConfigError
from pipeline.search.darts_prime import DartsPrime
from pipeline.spaces.nb201 import OPERATIONS

OPS = np.array(list(itertools.product(range(5), repeat=6)))


def arrays() -> dict[str, np.ndarray[Any, Any]]:
    """A table in which every 3×3 convolution is worth ten points."""
    return {"ops": OPS, "test_acc_200ep": 30.0 + 10 * (OPS == 3).sum(axis=1)}


def record_of(*choices: int) -> dict[str, Any]:
    return {"choices": list(choices), "steps_of_alpha": 5, "minutes": 0.5, "schema": 1}


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, *words: str) -> dict[str, Any]:
    np.savez(folder / "table.npz", allow_pickle=False, **arrays())
    small = "--data digits --images 200 --batch 16 --channels 2 --steps 6 --methods darts-prime,darts".split()
    files = ["--table", str(folder / "table.npz"), "--json", str(folder / "found.json")]
    monkeypatch.setattr(darts_nb201, "start_tuned", lambda name: None)
    monkeypatch.setattr("sys.argv", ["darts_nb201", *small, *files, *words])
    darts_nb201.main()
    found: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return found


def test_cells_are_looked_up_and_summed_up() -> None:
    table = Table(arrays(), Path("t"))
    found = summary(table, [record_of(3, 3, 3, 3, 3, 1), record_of(1, 1, 1, 1, 1, 1)])
    assert (found["mean"], found["worst"], found["accuracy"]) == (55.0, 30.0, [80.0, 30.0])
    assert "schema" not in found["records"][0]
    assert table.mean_without_none() == pytest.approx(30 + 10 * 6 / 4)
    missed = targets_of({"darts-prime": found})
    assert [target.passed for target in missed] == [False, False]
    assert all(target.passed for target in targets_of({"darts-prime": {"mean": 91.0, "worst": 88.0}}))


def test_a_table_without_what_is_needed_is_refused() -> None:
    with pytest.raises(ConfigError, match="t: no column 'test_acc_200ep'; there are: ops"):
        Table({"ops": OPS}, Path("t"))


def test_cells_in_words() -> None:
    assert in_words([3, 1, 3, 4, 3, 1], OPERATIONS) == "3 conv3 + 2 skip + 1 avg"


def test_every_part_is_changed_alone_and_alpha_can_go_as_far_as_published() -> None:
    ours = DartsPrime()
    for name, variant in VARIANTS.items():
        if variant.method == "darts-prime" and name != "darts-prime":
            changed = [key for key, value in variant.settings if getattr(ours, key) != value]
            assert len(changed) == 1, name
    prime, plain = VARIANTS["darts-prime"], VARIANTS["darts"]
    assert prime.architecture_share == pytest.approx(1 / 11) and plain.architecture_share == 0.5
    assert plain.with_reach(19531).learning_rate == pytest.approx(3e-4, rel=1e-3)
    assert prime.with_reach(35511).learning_rate == pytest.approx(3e-4, rel=1e-3)
    assert plain.with_reach(1953).learning_rate == pytest.approx(3e-3, rel=1e-3)


def test_it_searches_every_seed_once_and_keeps_what_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run(monkeypatch, tmp_path, "--seeds", "0,1")
    assert found["benchmark"] == "darts_nb201" and found["seeds"] == [0, 1]
    assert {target["name"] for target in found["targets"]} == {
        "darts-prime, mean over seeds",
        "darts-prime, worst seed",
    }
    methods = found["numbers"]["methods"]
    assert set(methods) == {"darts-prime", "darts"}
    assert all(len(method["accuracy"]) == 2 for method in methods.values())
    assert methods["darts"]["steps_of_alpha"] == 6, "with every minibatch"
    assert "A random cell without `none`: 45.00 %; the best of all: 90.00 %." in capsys.readouterr().out
    monkeypatch.setattr(darts_nb201, "METHODS", {})
    again = run(monkeypatch, tmp_path, "--seeds", "0,1")
    assert again["numbers"] == found["numbers"]


def test_an_estimate_times_and_searches_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(darts_nb201, "METHODS", {})
    with pytest.raises(FileNotFoundError):
        run(monkeypatch, tmp_path, "--estimate", "1")
    assert "| all, 3 seeds |" in capsys.readouterr().out
