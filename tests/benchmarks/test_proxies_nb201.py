"""The evidence on proxies: which cells judge, what is kept, what is compared; on a table made for the
test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from benchmarks import nb201_cells
from benchmarks.dps_nb201 import Judged, judge_draw, known_cells, search_draw
from benchmarks.dps_nb201 import table_of as dps_table
from benchmarks.dps_nb201 import targets_of as dps_targets
from benchmarks.nb201_cells import (
    CellTable,
    alike,
    best_found,
    cells_of,
    load_cells,
    rank_quality,
    score_kept,
    space_of,
)
from benchmarks.nb201_whole import WholeCellSpace
from benchmarks.proxies_nb201 import (
    Entry,
    agreement,
    evaluator_of,
    judge,
    parse_entries,
    table_of,
    targets_of,
)
from pipeline.artifacts import RunFolder, write_arrays
from pipeline.costs.counts import module_flops, module_params
from pipeline.data.base import ImageTask
from pipeline.errors import ConfigError, StaleArtifact
from pipeline.evaluators import scores
from pipeline.evaluators.dps import DpsSettings, Judge, with_jacov
from pipeline.evaluators.eproxy import Branch, EproxySettings, make_eproxy
from pipeline.progress import Silent
from pipeline.spaces.nb201 import NB201Settings, NB201Space
from pipeline.types import Arch

QUICK = {"batch_size": 4, "iterations": 2, "branches": [{"channels": 4}]}
DISCONNECTED = (0, 0, 0, 0, 0, 0)


class Pixels:
    shape = (8, 8, 3)

    def __init__(self) -> None:
        self.pixels = np.random.default_rng(1).integers(0, 256, (200, 8, 8, 3), dtype=np.uint8)
        self.labels = np.arange(200) % 3

    def read(self, indices: Any) -> Any:
        return self.pixels[indices]


TASK = ImageTask(
    name="toy",
    classes=("a", "b", "c"),
    source=Pixels(),
    splits={"weights": np.arange(180), "architecture": np.arange(180, 190), "test": np.arange(190, 200)},
    mean=(0.5,) * 3,
    std=(0.3,) * 3,
    flip=True,
    crop_padding=1,
    fingerprint="toy",
)


def columns(rows: int = 200) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    ops = rng.integers(0, 5, (rows, 6))
    ops[:10] = DISCONNECTED
    truth = np.isin(ops, (2, 3)).sum(axis=1) + rng.random(rows)
    truth[20] = np.nan
    ids = np.arange(rows) // 2
    return {"ops": ops, "test_acc_200ep": truth, "unique_id": ids, "proxy_nwot": truth.astype(np.float32)}


@pytest.fixture
def table() -> CellTable:
    return cells_of(columns())


# ----------------------------------------------------------------------------------------------------- cells


def test_the_cells_that_judge_are_connected_known_and_not_the_pilot_s(table: CellTable) -> None:
    usable = set(table.usable.tolist())
    assert not usable & {*range(10), 20}
    connected = np.flatnonzero((table.ops_RS != 0).any(axis=1))
    pilot = np.random.default_rng(nb201_cells.PILOT_SEED)
    live = [row for row in connected.tolist() if any(nb201_cells.live_edges(tuple(table.ops_RS[row])))]
    chosen = pilot.choice(live, 60, replace=False)
    assert not usable & set(alike(table.columns, chosen).tolist())
    assert usable == set(live) - {20} - set(alike(table.columns, chosen).tolist())


def test_draws_are_fixed_different_and_keep_clear_of_what_is_known(table: CellTable) -> None:
    first = table.draw(10, 7)
    assert len(set(first.tolist())) == 10 and set(first.tolist()) <= set(table.usable.tolist())
    np.testing.assert_array_equal(table.draw(10, 7), first)
    assert not np.array_equal(table.draw(10, 8), first)
    others = table.draw(20, 7, without=first)
    assert not set((others // 2).tolist()) & set((first // 2).tolist()), "no isomorphic one either"
    with pytest.raises(ConfigError, match="999 cells were asked for"):
        table.draw(999, 7)


def test_a_table_without_accuracies_is_refused(tmp_path: Path) -> None:
    write_arrays(tmp_path / "t.npz", {"ops": np.zeros((2, 6)), "unique_id": np.arange(2)})
    with pytest.raises(ConfigError, match="no column 'test_acc_200ep'; there are: ops, unique_id"):
        load_cells(tmp_path / "t.npz")


def test_whole_networks_are_the_table_s() -> None:
    """The space says what the table counted: parameters and multiply-adds with dead edges."""
    space = WholeCellSpace((3, 16, 16), 10, NB201Settings(cells=2, channels=4))
    rng = np.random.default_rng(0)
    for ops in rng.integers(0, 5, (6, 6)).tolist():
        arch = Arch("nb201", tuple(ops))
        network = space.build(arch)
        assert module_params(network) == space.table_params(arch)
        assert module_flops(network, (3, 16, 16)) + 10 == space.table_macs(arch)
    assert space.fingerprint() != NB201Space((3, 16, 16), 10, space.settings).fingerprint()


def test_whole_networks_compute_what_the_space_s_do() -> None:
    """With equal weights, dead edges' norms bringing nothing; a rectifier per convolution changes no
    value."""
    settings = NB201Settings(cells=1, channels=4)
    arch = Arch("nb201", (3, 1, 2, 4, 0, 2))
    whole = WholeCellSpace((3, 16, 16), 10, settings).build(arch)
    lean = NB201Space((3, 16, 16), 10, settings).build(arch)
    for weight in (*whole.parameters(), *lean.parameters()):
        if weight.dim() > 1:
            weight.data = torch.linspace(-1, 1, weight.numel()).cos().reshape(weight.shape)
        elif weight.numel() == 10:  # the classifier's bias
            torch.nn.init.zeros_(weight)
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(whole(x), lean(x))


# --------------------------------------------------------------------------------------------------- scoring


def test_scores_are_kept_and_never_made_twice(
    table: CellTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archs, path = table.archs(table.draw(7, 1)), tmp_path / "kept.npz"
    entry = Entry("eproxy", 1)
    monkeypatch.setattr(nb201_cells, "LOT", 3)
    made: list[Arch] = []
    score_all = scores.score_all

    def watched(score: Any, asked: list[Arch], workers: int) -> Any:
        made.extend(asked)
        if len(made) > 4:
            raise KeyboardInterrupt
        return score_all(score, asked, workers)

    with monkeypatch.context() as patch:
        patch.setattr(scores, "score_all", watched)
        with pytest.raises(KeyboardInterrupt):
            score_kept(evaluator_of(entry, TASK, 0, QUICK), archs, path, Silent(), "toy")
    evaluator = evaluator_of(entry, TASK, 0, QUICK)
    resumed = score_kept(evaluator, archs, path, Silent(), "toy")
    space = space_of(TASK.image_shape, 3, 1)
    assert len(evaluator.state()["losses"]) == len({space.canonical(arch) for arch in archs})
    np.testing.assert_array_equal(resumed.loss_N, evaluator_of(entry, TASK, 0, QUICK).losses(archs)[:, 0])
    assert resumed.seconds_per_candidate > 0
    with pytest.raises(StaleArtifact):
        score_kept(evaluator_of(entry, TASK, 1, QUICK), archs, path, Silent(), "toy")


def test_rank_quality_looks_at_all_and_at_the_best() -> None:
    rng = np.random.default_rng(0)
    truth = rng.random(200)
    loss = -truth + 0.3 * rng.random(200)
    best = np.argsort(truth)[-20:]
    quality = rank_quality(loss, truth)
    assert quality["rho"] == pytest.approx(spearmanr(-loss, truth).statistic)
    assert quality["rho_best_tenth"] == pytest.approx(spearmanr(-loss[best], truth[best]).statistic)


def test_what_is_found_grows_with_the_cells_looked_at() -> None:
    truth = np.random.default_rng(0).permutation(np.linspace(0, 1, 300))
    found = [best_found(-truth, truth, count, np.random.default_rng(1)) for count in (1, 10, 300, 9_999)]
    assert found[0] == pytest.approx(0.5, abs=0.06) and found[1] == pytest.approx(10 / 11, abs=0.03)
    assert found[2] == found[3] == pytest.approx(truth.max())


# --------------------------------------------------------------------------------------------------- proxies


def test_entries() -> None:
    assert parse_entries("eproxy:1, nwot:5:whole") == [Entry("eproxy", 1), Entry("nwot", 5, True)]
    for wrong in ("eproxy", "eproxy:", "eproxy:0", "eproxy:1:half", ""):
        with pytest.raises(ConfigError, match="expected NAME:CELLS"):
            parse_entries(wrong)
    with pytest.raises(ConfigError, match="'one-shot' is no score without training"):
        evaluator_of(Entry("one-shot", 1), TASK, 0, {})


def test_agreement_is_with_the_column_where_networks_are_the_table_s(table: CellTable) -> None:
    rows = table.draw(30, 1)
    loss = -table.columns["proxy_nwot"][rows].astype(float)
    whole, lean = Entry("nwot", 1, True), Entry("nwot", 1)
    assert agreement(whole, loss, table, rows) == pytest.approx(1.0)
    assert agreement(lean, loss, table, rows) is None
    assert agreement(Entry("synflow", 1, True), loss, table, rows) is None
    table.columns["proxy_nwot"][rows[:5]] = [np.nan, -1e8, np.nan, -1e8, np.nan]
    assert agreement(whole, loss, table, rows) == pytest.approx(1.0)
    assert agreement(whole, np.where(np.arange(30) == 9, 1e9, loss), table, rows) != pytest.approx(1.0)


def test_proxies_are_judged_side_by_side(table: CellTable, tmp_path: Path) -> None:
    rows = table.draw(12, 1)
    results = []
    for entry, settings in (
        (Entry("eproxy", 1), QUICK),
        (Entry("params", 1), {}),
        (Entry("nwot", 1, True), {"batch_size": 8}),
    ):
        work = RunFolder(tmp_path)
        results.append(judge(entry, [0, 1], table, rows, TASK, settings, work, 1e9, Silent()))
    eproxy, params, nwot = results
    assert [s["seed"] for s in eproxy["by_seed"]] == [0, 1]
    assert eproxy["rho"] == pytest.approx(np.mean([s["rho"] for s in eproxy["by_seed"]]))
    params_M = [NB201Space(TASK.image_shape, 3, NB201Settings(cells=1)).layers(a) for a in table.archs(rows)]
    counted = [sum(layer.parameters for layer in layers) for layers in params_M]
    assert params["rho"] == pytest.approx(spearmanr(counted, table.truth_R[rows]).statistic)
    assert params["looked_at"] == 12 and nwot["agreement"] is not None
    names = [target.name for target in targets_of(results)]
    assert names == ["eproxy, 1 cells per stage: ρ", "nwot, 1 cells per stage, whole: agrees with the table"]
    assert len(table_of(results, 1.0).splitlines()) == 2 + 3


# ------------------------------------------------------------------------------------------------------- dps


def test_a_draw_is_searched_once_and_judged_four_ways(
    table: CellTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = table.draw(8, 2, 0)
    known = known_cells(table, rows)
    assert {k.accuracy for k in known} <= set(table.truth_R[rows].tolist())
    space, work = space_of(TASK.image_shape, 3, 1), RunFolder(tmp_path)
    settings = DpsSettings(
        population=2, tournament=1, evaluations=3, jacov=False, held_back=0.0, max_channels=16
    )
    found = search_draw(0, known, space, TASK, settings, work, Silent(), "cpu")
    assert (tmp_path / "search.yaml").exists() and not (tmp_path / "search.npz").exists()
    monkeypatch.setattr("benchmarks.dps_nb201.search_settings", lambda *a, **k: pytest.fail("searched again"))
    assert search_draw(0, known, space, TASK, settings, work, Silent(), "cpu") == found
    with pytest.raises(StaleArtifact):
        search_draw(0, known[1:], space, TASK, settings, work, Silent(), "cpu")
    others = table.draw(10, 1, without=rows)
    cells = table.archs(others), table.truth_R[others]
    base = EproxySettings(iterations=2, branches=(Branch(channels=4),))
    judge_of_known = Judge(space, TASK, base, seed=0)
    judged = Judged(cells, space, TASK, 0, "cpu", work, Silent())
    quality = judge_draw(found, known, base, judge_of_known, judged)
    assert judge_draw(found, known, base, judge_of_known, judged) == quality
    # the answer is what a run on the settings file would rank by
    answer = with_jacov(found.settings, judge_of_known.correlations([k.arch for k in known]))
    for settings_of_way, way in ((answer, "answer"), (found.settings, "tuned"), (base, "default")):
        evaluator = make_eproxy(space, TASK, settings_of_way, total_steps=0, seed=0, device="cpu")
        expected = rank_quality(evaluator.losses(cells[0], step=0)[:, 0], cells[1])
        assert quality[way] == pytest.approx(expected, nan_ok=True)
    draws = [{"draw": 0, **found.to_json(), **quality, "answer": {**quality["answer"], "rho": 0.9}}]
    (target,) = dps_targets(draws)
    assert target.passed and target.name == "mean ρ of 1 draws after tuning"
    assert [line.split("|")[1].strip() for line in dps_table(draws).splitlines()[2:]] == ["0", "mean"]
