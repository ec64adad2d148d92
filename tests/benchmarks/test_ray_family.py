from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.ray_family import (
    AGAIN,
    Loss,
    checkpoint_seconds,
    keep_the_search_only,
    targets_of,
    tier_with_checkpoint,
)
from pipeline.artifacts import FileCheckpoint, write_json

SAID = "retrain cpu/large on node desk\nretrain cpu/small on node other\nretrain: 3/10, 5 s left\n"


def test_a_node_is_lost_once_a_training_there_has_sent_a_checkpoint(tmp_path: Path) -> None:
    for tier in ("cpu/large", "cpu/small"):
        assert tier_with_checkpoint(SAID, tmp_path) is None
        checkpoint = FileCheckpoint(tmp_path / tier / "training.npz")
        checkpoint.save({"weights": np.zeros(2)}, {"seconds": 21.53})
    assert tier_with_checkpoint(SAID, tmp_path) == "cpu/small"
    assert checkpoint_seconds(tmp_path, "cpu/small") == 21.5
    assert checkpoint_seconds(tmp_path, "cpu/none") == 0
    write_json(tmp_path / "cpu/small/train.json", {})
    assert tier_with_checkpoint(SAID, tmp_path) is None, "it is done: nothing to lose"


def test_what_comes_after_the_search_is_made_again(tmp_path: Path) -> None:
    for path in ("search/result.json", "search/trials/a.json", "cpu/s/arch.json", "costs/cpu.json"):
        write_json(tmp_path / path, {})
    for path in ("manifest.json", "report.html"):
        (tmp_path / path).touch()
    keep_the_search_only(tmp_path, ("cpu/s",))
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"search/result.json", "costs/cpu.json"}


def test_all_is_shown_only_where_work_was_lost_and_went_on() -> None:
    again = AGAIN.findall(SAID + "retrain cpu/small: lost on node other (NodeDiedError); it starts again")
    assert again == ["cpu/small"]
    assert all(target.passed for target in targets_of([Loss("cpu/small", 60.0, 21.5)], again, []))
    failed = [target.name for target in targets_of([], [], ["cpu/small model.onnx"]) if not target.passed]
    assert len(failed) == 4
