"""benchmarks/ranking.py and truth.py: judging signals, and the table of trainings."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from tiny_run import TINY

from benchmarks import ranking
from benchmarks.truth import Key, Row, add_rows, read_rows, sha256_of_space
from pipeline.artifacts import RunFolder
from pipeline.config import parse
from pipeline.errors import ConfigError, CorruptArtifact
from pipeline.progress import Silent
from pipeline.run import Run
from pipeline.stages.profile import profile_stage
from pipeline.types import Arch, Limit, Tier


def band(name: str, test: list[float], again: list[float] | None = None) -> ranking.Band:
    tier = Tier("cpu", name, (Limit("latency_ms", 1.0, False, "1 ms"),))
    archs = tuple(Arch("mbconv", (i,)) for i in range(len(test)))
    return ranking.Band(tier, archs, np.array(test), np.array(again or []), tier.key)


def test_a_signal_that_knows_the_truth_has_rho_one_and_no_regret() -> None:
    bands = [band("s", np.linspace(80, 90, 30).tolist()), band("m", np.linspace(99, 85, 30).tolist())]
    losses = [-b.test_N for b in bands]
    found = ranking.judged(losses, bands, 0, losses)
    assert found["rho"] == pytest.approx(1) and found["interval"] == pytest.approx((1, 1), abs=0.01)
    assert found["lead"] == 0 and found["lead_interval"] == (0, 0)
    assert [b["regret"] for b in found["bands"].values()] == [0, 0]


def test_a_lead_is_of_the_same_networks() -> None:
    """Signals that err together lead by less, and more surely, than their own intervals say."""
    rng = np.random.default_rng(0)
    bands = [band("s", rng.normal(size=40).tolist())]
    mine = [-bands[0].test_N + rng.normal(size=40)]
    found = ranking.judged([mine[0] + 0.3 * rng.normal(size=40)], bands, 0, mine)
    low, high = found["lead_interval"]
    assert low <= found["lead"] <= high
    assert high - low < 0.6 * (found["interval"][1] - found["interval"][0])


def test_bands_do_not_rank_each_other() -> None:
    """Everything in the second band is better and has the lower loss, but within the bands the order is
    wrong."""
    bands = [band("s", [1.0, 2.0, 3.0]), band("m", [11.0, 12.0, 13.0])]
    losses = [np.array([10.0, 11.0, 12.0]), np.array([0.0, 1.0, 2.0])]
    found = ranking.judged(losses, bands, 0, [-each for each in losses])
    assert found["rho"] == pytest.approx(-1) and found["lead"] == pytest.approx(2)
    assert found["bands"]["cpu/m"]["regret"] == pytest.approx(2)


def test_a_constant_signal_ranks_nothing() -> None:
    assert ranking.pooled([np.ones(5)], [np.arange(5.0)]) == 0


def test_interval_narrows_with_more_networks() -> None:
    rng = np.random.default_rng(0)

    def width(count: int) -> float:
        truth = rng.normal(size=count)
        low, high = ranking.interval([-truth + rng.normal(size=count)], [truth], seed=0)
        return high - low

    assert width(400) < 0.5 * width(20)


def test_stability_is_of_what_two_seeds_share() -> None:
    found = ranking.stability([band("s", [1.0, 2.0, 3.0, 9.0], [1.5, 2.5, 3.5])])
    assert found is not None and found["networks"] == 3
    assert found["rho"] == pytest.approx(1) and found["std_of_one_training"] == pytest.approx(0)
    assert ranking.stability([band("s", [1.0, 2.0])]) is None


def test_the_runs_evaluator_must_beat_size_and_reach_its_target() -> None:
    behind = {"lead": -0.1, "lead_interval": (-0.3, 0.1)}
    ahead = {"lead": 0.4, "lead_interval": (0.1, 0.7)}
    targets = ranking.targets_of({"run": {"rho": 0.5}, "flops": behind, "latency": ahead})
    assert {t.name: t.passed for t in targets} == {
        "ρ within the bands, the run's evaluator": False,
        "ρ above that of flops": False,
        "ρ above that of latency": True,
    }


ROW = Row("digits", "s" * 12, "r" * 12, "0 1 2", 0, 4, "cpu/s", 0.1, 1000, 2000, 91.25, 90.5)


def test_table_keeps_each_training_once_and_sorted(tmp_path: Path) -> None:
    path = tmp_path / "truth.csv"
    later, better = replace(ROW, seed=1), replace(ROW, test=95.0)
    add_rows(path, [later])
    add_rows(path, [ROW])
    add_rows(path, [better])
    assert list(read_rows(path).values()) == [better, later]
    assert next(iter(read_rows(path))) == Key("digits", "s" * 12, "r" * 12, "0 1 2", 0)


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "truth.csv"
    add_rows(path, [ROW])
    path.write_text(path.read_text().replace("91.25", "high"))
    with pytest.raises(CorruptArtifact, match="line 2"):
        read_rows(path)
    assert read_rows(tmp_path / "none.csv") == {}


def test_rho_of_one_band_is_spearmans() -> None:
    rng = np.random.default_rng(0)
    loss_N, test_N = rng.normal(size=20), rng.integers(5, size=20).astype(float)
    assert ranking.pooled([loss_N], [test_N]) == pytest.approx(stats.spearmanr(-loss_N, test_N).statistic)


def test_a_part_of_the_images_is_another_truth(tmp_path: Path) -> None:
    def named(data: object) -> str:
        wanted = {"data": data, "profiles": ["params"], "space": {"name": "mbconv", "size": "tiny"}}
        return ranking.data_of(Run(RunFolder(tmp_path), parse(wanted, "test"), Silent()))

    assert named("digits") == "digits"
    part, other = (named({"name": "digits", "limit": limit}) for limit in (100, 200))
    assert part.startswith("digits ") and part != other


def test_known_networks_are_ranked_without_training(tmp_path: Path) -> None:
    run = Run(RunFolder(tmp_path / "run"), parse(TINY, "test"), Silent())
    profile_stage(run)
    table, archs = tmp_path / "truth.csv", list(itertools.islice(run.space.uniform(), 8))
    of_run = replace(ROW, data=ranking.data_of(run), space=sha256_of_space(run.space), tier=run.tiers[0].key)
    rows = [
        replace(of_run, choices=" ".join(map(str, arch.choices)), test=80.0 + number)
        for number, arch in enumerate(archs)
    ]
    assert len(archs) == 8
    others = [
        replace(of_run, choices="9 9 9", latency_ms=0.2, test=1.0),  # of another budget
        replace(of_run, choices="9 9 8", recipe="q" * 12, test=2.0),
        replace(rows[0], data="cifar10", test=3.0),
        replace(rows[0], space="o" * 12, test=3.0),
        replace(rows[0], tier="elsewhere/s", choices="9 9 7", test=4.0),
    ]
    add_rows(table, [*rows, replace(rows[5], seed=1, test=85.5), *others])

    (found,) = ranking.known_bands(run, table, [0, 1])
    assert (found.tier.key, found.name) == (run.tiers[0].key, "counts/s of 0.1 ms, 4 epochs")
    assert found.archs[0] == archs[5] and set(found.archs) == set(archs), "second seeds first"
    assert found.again_R.tolist() == [85.5] and found.test_N[0] == 85.0 and found.test_N.mean() == 83.5
    (alone,) = ranking.known_bands(run, table)
    assert alone.again_R.size == 0 and len(alone.archs) == 8

    assert ranking.known_bands_of(run, run.tiers, table, [0])[0].name == alone.name
    with pytest.raises(ConfigError, match=r"--known: .* holds no 8 trainings of digits .* for counts/l$"):
        ranking.known_bands_of(run, run.tiers[1:], table, [0])


def test_a_new_row_leaves_the_others_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "truth.csv"
    add_rows(path, [ROW])
    before = path.read_text().splitlines()
    add_rows(path, [replace(ROW, seed=1, epochs=0.5)])
    assert path.read_text().splitlines()[:2] == before and ",4," in before[1]
