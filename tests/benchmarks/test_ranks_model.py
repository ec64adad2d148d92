from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.ranks import Cluster, Job, Searched, estimate, sent, tables, targets_of, torchrun
from pipeline.artifacts import write_arrays, write_json
from pipeline.types import Json

EQUAL = Job(vector_bytes=8_000_000, macs=(1e9,), batch_size=100)


def test_one_gpu_only_works() -> None:
    alone = estimate(EQUAL, Cluster(arithmetic=1e13, fixed_s=0.01), 1, 4, np.random.default_rng(0))
    assert alone["step_ms"] == pytest.approx(4 * (10 + 30))  # 3e11 multiply-adds each, and what is fixed
    assert alone["efficiency"] == 1


def test_equal_architectures_leave_nobody_waiting() -> None:
    found = estimate(EQUAL, Cluster(), 64, 2, np.random.default_rng(0))
    assert found["waiting_ms"] == pytest.approx(0)
    assert found["step_ms"] == pytest.approx(found["working_ms"] + found["sum_ms"])


def test_more_architectures_each_are_shared_out_more_evenly() -> None:
    job, rng = Job(0, (1e8, 3e8, 9e8), 100), np.random.default_rng(0)
    one, four = (estimate(job, Cluster(), 8, per_gpu, rng)["efficiency"] for per_gpu in (1, 4))
    assert one < four < 1


def test_what_a_sum_sends() -> None:
    cluster = Cluster(gpus_per_machine=8, inside_bytes_s=100.0, between_bytes_s=10.0, message_s=0.0)
    assert cluster.sum_s(800, 8, 1) == pytest.approx(2 * 7 * 100 / 100)
    assert cluster.sum_s(1600, 16, 3) == pytest.approx(4 * (7 * 100 / 100 + 8 * 100 / 10))
    config: Json = {"search": {"fit_samples": 4}, "evaluator": {"batch_size": 64}}
    assert sent(1000, 1, config)["sent_bytes"] == 0
    assert sent(1000, 2, config)["sent_bytes"] == 3 * 500 + 4 * 64 * 10 + 40


def test_one_process_needs_no_torchrun() -> None:
    assert "torch.distributed.run" not in torchrun(1, Path("x"))
    assert torchrun(4, Path("x"))[-7:] == ["--nproc-per-node", "4", "-m", "pipeline", "search", "--out", "x"]


def test_a_search_as_it_lies_on_disk(tmp_path: Path) -> None:
    write_json(tmp_path / "search/result.json", {"candidates": [[[0, 1], 2.5, 1]], "seconds": 3.0})
    write_arrays(tmp_path / "search/evaluator.npz", {"weight/w": np.zeros(3), "momentum/w": np.ones(3)})
    found = Searched.read(tmp_path)
    other = Searched(found.choices, found.losses, {"weight/w": np.array([0.0, -0.5, 0.25])}, 1.0)
    assert (found.choices, found.losses, found.vector_bytes) == ([[0, 1]], [2.5], 12)
    assert found.furthest(other) == 0.5


def test_what_falls_short_is_named() -> None:
    alone = {"ranks": 1, "same_architectures": True, "furthest_weight": 0.0}
    two = {"ranks": 2, "same_architectures": False, "furthest_weight": 1e-3}
    loss = {"ended_s": 70.0, "code": 0, "told": False, "same_architectures": True}
    targets = targets_of({"compared": [alone, two]}, loss, 60.0)
    assert [target.passed for target in targets] == [False, False, False, False, False, True]
    assert targets[0].came == "2 ranks"


def test_the_tables_have_a_row_for_each() -> None:
    one = {"ranks": 2, "architectures": 9, "same_architectures": True, "furthest_weight": 0.0}
    one |= {"step_ms": 12.0, "sent_bytes": 5000}
    model = estimate(EQUAL, Cluster(), 8, 1, np.random.default_rng(0))
    shown = tables({"compared": [one], "model": {"estimates": [model]}})
    assert "| 2 | 9 | yes | 0.0e+00 | 12 ms | 5 kB |" in shown and "| 8 | 1 |" in shown
