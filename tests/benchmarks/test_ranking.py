"""benchmarks/ranking.py and truth.py: judging signals, and the table of trainings."""

from __future__ import annotations

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
    return ranking.Band(tier, archs, np.array(test), np.array(again or []))


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
    assert ranking.spearman(np.ones(5), np.arange(5.0)) == 0


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


def test_rho_is_spearmans() -> None:
    rng = np.random.default_rng(0)
    loss_N, test_N = rng.normal(size=20), rng.integers(5, size=20).astype(float)
    assert ranking.spearman(loss_N, test_N) == pytest.approx(stats.spearmanr(-loss_N, test_N).statistic)


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
    tiers, table = run.tiers, tmp_path / "truth.csv"
    row = replace(ROW, data=ranking.data_of(run), space=sha256_of_space(run.space), tier=tiers[0].key)
    archs = sorted(run.space.uniform())[:3]
    choices = [" ".join(map(str, arch.choices)) for arch in archs]
    other = replace(row, data="cifar10", choices=choices[2])
    firsts = [replace(row, choices=choices[0], test=80.0), replace(row, choices=choices[1], test=90.0)]
    add_rows(table, [*firsts, replace(firsts[1], seed=1, test=91.0), other])

    (found,) = ranking.known_bands(run, tiers, [0, 1], None, table)
    assert (found.tier, found.archs) == (tiers[0], (archs[1], archs[0])), "second seeds first"
    assert found.test_N.tolist() == [90.0, 80.0] and found.again_R.tolist() == [91.0]
    (alone,) = ranking.known_bands(run, tiers, [0], 4, table)
    assert alone.test_N.tolist() == [80.0, 90.0] and alone.again_R.size == 0

    with pytest.raises(ConfigError, match=r"--known: .* holds no training of digits .* for counts/l"):
        ranking.known_bands(run, tiers[1:], [0], None, table)
    add_rows(table, [replace(firsts[0], recipe="q" * 12, epochs=0.5)])
    with pytest.raises(ConfigError, match=r"by 2 recipes, of 0\.5 and 4 epochs; choose one with --epochs"):
        ranking.known_bands(run, tiers, [0], None, table)
    (half,) = ranking.known_bands(run, tiers, [0], 0.5, table)
    assert half.archs == (archs[0],)
