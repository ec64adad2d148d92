from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import kills
from benchmarks.kills import Job, Kill, Timeline, differences, kill_targets, outcome, run_killed, run_through
from pipeline.artifacts import FileCheckpoint, write_arrays, write_json
from pipeline.errors import BudgetlineError

JOB = Job(Path("job.yaml"), devices=("cpu",), tiers=("cpu/small", "cpu/large"))


@pytest.fixture
def timeline() -> Timeline:
    return Timeline((2.0, 4.0, 34.0, 40.0, 42.0))


# ----------------------------------------------------------------------------------------- where a run stands


def test_the_shipped_job_can_be_read(root: Path) -> None:
    job = Job.read(root / "benchmarks/kills.yaml")
    stages = list(dict.fromkeys(stage for stage, _ in job.records()))
    assert stages == ["start", "profile", "search", "derive", "retrain", "export", "measure", "report"]
    assert job.tiers == ("cpu/small", "cpu/large")


def test_a_folder_stands_at_the_first_record_that_is_not_there(tmp_path: Path) -> None:
    assert (JOB.finished(tmp_path), JOB.stage(tmp_path)) == (0, "start")
    for path in ("run.yaml", "costs/cpu.json", "search/result.json", "cpu/small/arch.json"):
        write_json(tmp_path / path, {})
    assert (JOB.finished(tmp_path), JOB.stage(tmp_path)) == (4, "derive")
    for _, path in JOB.records():
        write_json(tmp_path / path, {})
    assert JOB.stage(tmp_path) == "end"


def test_work_is_kept_in_the_checkpoint_of_the_stage_at_work_only(tmp_path: Path) -> None:
    for path in ("run.yaml", "costs/cpu.json"):
        write_json(tmp_path / path, {})
    assert JOB.kept_s(tmp_path) == 0
    FileCheckpoint(tmp_path / "search/state.npz").save({"x": np.zeros(2)}, {"seconds": 21.5})
    assert JOB.kept_s(tmp_path) == 21.5
    for path in ("search/result.json", "cpu/small/arch.json", "cpu/large/arch.json"):
        write_json(tmp_path / path, {})
    assert JOB.kept_s(tmp_path) == 0
    FileCheckpoint(tmp_path / "cpu/large/training.npz").save({"x": np.zeros(2)}, {"seconds": 7.0})
    assert JOB.kept_s(tmp_path) == 7


# --------------------------------------------------------------------------------------------------- timeline


@pytest.mark.parametrize("times", [1, 10, 33])
def test_one_moment_in_each_part_of_the_run(timeline: Timeline, times: int) -> None:
    moments = timeline.moments(times, np.random.default_rng(1))
    part_s = kills.LAST_SHARE * 42.0 / times
    assert [int(at_s // part_s) for at_s in moments] == list(range(times))
    assert moments == timeline.moments(times, np.random.default_rng(1))
    assert moments != timeline.moments(times, np.random.default_rng(2))


def test_a_moment_is_so_many_records_and_the_time_since_the_last(timeline: Timeline) -> None:
    assert (timeline.records_at(1.0), timeline.since_record(1.0)) == (0, 1.0)
    assert (timeline.records_at(10.0), timeline.since_record(10.0)) == (2, 6.0)
    assert timeline.position(2, kept_s=6.0) == 10.0


# ---------------------------------------------------------------------------------------------------- killing

FAKE_JOB = """
import json, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
for path in json.loads(sys.argv[2]):
    time.sleep(0.08)
    if not (folder / path).exists():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text("{}")
"""


def test_a_job_is_killed_as_planned_and_comes_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = json.dumps([path for _, path in JOB.records()])
    monkeypatch.setattr(
        kills, "budgetline", lambda *words: [sys.executable, "-c", FAKE_JOB, words[-1], paths]
    )
    log = tmp_path / "log.txt"
    seconds, timeline = run_through(JOB, tmp_path / "through", tmp_path, log)
    assert len(timeline.reached_s) == len(JOB.records())
    assert list(timeline.reached_s) == sorted(timeline.reached_s) and timeline.reached_s[-1] <= seconds
    plan = timeline.moments(3, np.random.default_rng(0))
    made, failures = run_killed(JOB, tmp_path / "killed", tmp_path, log, timeline, plan)
    assert len(made) == 3 and failures == 0
    assert [kill.planned_s for kill in made] == [round(at_s, 2) for at_s in plan]
    assert all(kill.records >= timeline.records_at(at_s) for kill, at_s in zip(made, plan, strict=True))
    assert JOB.stage(tmp_path / "killed") == "end"


def test_a_job_that_keeps_failing_by_itself_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = "import sys; print('BudgetMissed: tier s'); sys.exit(2)"
    monkeypatch.setattr(kills, "budgetline", lambda *words: [sys.executable, "-c", script])
    timeline = Timeline(tuple(map(float, range(1, 14))))
    with pytest.raises(BudgetlineError, match="exited with 2; it said last: BudgetMissed: tier s"):
        run_killed(JOB, tmp_path / "run", tmp_path, tmp_path / "log.txt", timeline, [])
    with pytest.raises(BudgetlineError, match="exited with 2"):
        run_through(JOB, tmp_path / "run", tmp_path, tmp_path / "log.txt")


# -------------------------------------------------------------------------------------------------- comparing


def write_run(folder: Path, seconds: float) -> None:
    """A finished run of one tier, as far as it is compared; `seconds` is how long it took."""
    result = {"candidates": [[[0, 1], 0.5, 1]], "theta": None, "evaluations": 1, "seconds": seconds}
    write_json(folder / "search/result.json", result)
    (folder / "search/trace.jsonl").write_text('{"iteration": 0}\n')
    write_arrays(folder / "search/evaluator.npz", {"w": np.arange(3.0)})
    tier = folder / "cpu/small"
    write_json(
        tier / "arch.json", {"arch": {"space": "s", "choices": [0, 1]}, "trials": [], "seconds": seconds}
    )
    write_json(tier / "train.json", {"history": [{"epoch": 1}], "seconds": seconds})
    write_json(tier / "export.json", {"accuracy": {"test": 0.9}, "seconds": seconds})
    for name in ("weights.safetensors", "model.onnx", "model.batch1.onnx"):
        (tier / name).write_bytes(name.encode())


def test_runs_that_differ_in_time_alone_are_equal(tmp_path: Path) -> None:
    write_run(tmp_path / "one", 1.0)
    write_run(tmp_path / "other", 2.0)
    one, other = (outcome(tmp_path / name, ["cpu/small"]) for name in ("one", "other"))
    assert differences(one, other) == []
    assert len(one) == 10


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("search/trace.jsonl", "search trace"),
        ("cpu/small/weights.safetensors", "cpu/small weights.safetensors"),
        ("cpu/small/model.onnx", "cpu/small model.onnx"),
    ],
)
def test_one_more_byte_is_a_difference(tmp_path: Path, path: str, name: str) -> None:
    write_run(tmp_path / "one", 1.0)
    shutil.copytree(tmp_path / "one", tmp_path / "other")
    with (tmp_path / "other" / path).open("ab") as file:
        file.write(b"\n")
    one, other = (outcome(tmp_path / run, ["cpu/small"]) for run in ("one", "other"))
    assert differences(one, other) == [name]


def test_another_value_in_the_shared_weights_is_a_difference(tmp_path: Path) -> None:
    write_run(tmp_path / "one", 1.0)
    shutil.copytree(tmp_path / "one", tmp_path / "other")
    write_arrays(tmp_path / "other/search/evaluator.npz", {"w": np.array([0.0, 1.0, np.nextafter(2.0, 3.0)])})
    one, other = (outcome(tmp_path / run, ["cpu/small"]) for run in ("one", "other"))
    assert differences(one, other) == ["shared weights"]


def test_what_only_one_run_has_is_a_difference() -> None:
    assert differences({"a": "1", "b": "2"}, {"b": "2", "c": "3"}) == ["a", "c"]


def test_too_few_kills_and_any_difference_miss() -> None:
    kill = Kill(1.0, 1.0, "search", 2, 0.0)
    assert [t.passed for t in kill_targets([kill] * 10, 10, [], [])] == [True, True, True]
    assert [t.passed for t in kill_targets([kill] * 9, 10, ["weights"], ["trace"])] == [False, False, False]
