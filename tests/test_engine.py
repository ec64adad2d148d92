"""Jobs side by side: answers in order, errors as they were raised, no process that outlives its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import pytest
from tiny_run import TINY, Cli

from pipeline.artifacts import sha256_file, write_yaml
from pipeline.config import parse
from pipeline.engine import InProcess, Processes, Share, share_cores
from pipeline.errors import BudgetlineError, DivergedTraining, StorageError, WorkerLost
from pipeline.stages import jobs as stage_jobs
from pipeline.types import Json

TESTS = Path(__file__).parent
T = TypeVar("T")


class Watched:
    """A Progress that remembers."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.notes: list[str] = []
        self.steps = 0

    @contextmanager
    def track(self, label: str, total: int, done: int = 0) -> Iterator[Callable[[int, str], None]]:
        self.total = total

        def advance(steps: int, note: str) -> None:
            self.steps += steps
            self.notes.append(note)

        yield advance

    def say(self, message: str) -> None:
        self.said.append(message)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run's folder with nothing in it yet; workers find this folder's jobs."""
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    write_yaml(tmp_path / "run" / "run.yaml", {"budgetline": "0", **parse(TINY, "test").to_json()})
    return tmp_path / "run"


def processes(root: Path, progress: Watched, workers: int = 2) -> Processes:
    return Processes("engine_jobs", root, root.parent / "cache", Share(workers, 1), progress)


@pytest.mark.parametrize(
    ("cores", "jobs", "share"),
    [(2, 4, (2, 1)), (8, 4, (4, 2)), (1, 4, (1, 1)), (8, 1, (1, 8)), (6, 4, (4, 1)), (2, 1, (1, 2))],
)
def test_cores_are_divided_evenly(cores: int, jobs: int, share: tuple[int, int]) -> None:
    assert share_cores(cores, jobs) == share


def test_answers_come_in_order_from_several_processes(root: Path) -> None:
    progress = Watched()
    with processes(root, progress) as engine:
        answers = engine.map("squares", [{"do": "square", "x": x} for x in range(6)], steps_each=3)
        again = engine.map("squares", [{"do": "square", "x": 9}], steps_each=3)
    assert [answer["x"] for answer in answers] == [x**2 for x in range(6)]
    assert len({answer["process"] for answer in answers} - {os.getpid()}) == 2
    assert again[0]["process"] in {answer["process"] for answer in answers}, "workers are kept"
    assert progress.steps == 21 and progress.total == 3
    assert sorted(progress.said) == sorted(f"squared {x}" for x in (*range(6), 9))
    assert "square of 4: on its way" in progress.notes


@pytest.mark.parametrize(
    ("job", "error", "text"),
    [
        ("diverge", DivergedTraining, "run: the loss is nan"),
        ("die", WorkerLost, "exit code 7 while it did .*last words: out of luck; .*run the same command"),
        ("fill_the_disk", StorageError, "weights.npz: No space left on device"),
    ],
)
def test_an_error_ends_the_others_and_is_told(
    root: Path, tmp_path: Path, job: str, error: type[BudgetlineError], text: str
) -> None:
    """The third waits for a worker when the second fails, and must not wait for ever."""
    started = [tmp_path / "first", tmp_path / "third"]
    first, third = ({"do": "sleep", "started": str(path)} for path in started)
    with processes(root, Watched()) as engine, pytest.raises(error, match=text):
        engine.map("", [first, {"do": job}, third], steps_each=1)
    for path in started:
        told = path.read_text() if path.exists() else ""  # empty where it was ended while it wrote
        assert not told or not alive(int(told))


def test_a_worker_ends_with_its_parent(root: Path, tmp_path: Path) -> None:
    started = tmp_path / "started"
    program = (
        "from pathlib import Path; from pipeline.engine import *; from pipeline.progress import Silent\n"
        f"root = Path({str(root)!r})\n"
        "engine = Processes('engine_jobs', root, root, Share(1, 1), Silent())\n"
        f"engine.map('', [{{'do': 'sleep', 'started': {str(started)!r}}}], 1)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=TESTS.parent)
    child = int(wait_for(lambda: started.read_text() if started.exists() else ""))
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    wait_for(lambda: not alive(child))


def test_in_this_process_jobs_are_done_one_by_one() -> None:
    done: list[Json] = []

    def do(job: Json) -> Json:
        done.append(job)
        return {"number": len(done)}

    with InProcess(do) as engine:
        assert engine.map("", [{"a": 1}, {"b": 2}], steps_each=1) == [{"number": 1}, {"number": 2}]


def test_side_by_side_makes_the_same_bits(
    cli: Cli, finished: Path, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes of one thread against one process of one thread, trials and trainings."""
    monkeypatch.setattr(stage_jobs, "usable_cores", lambda: (0, 1))
    before = {path.name: path.read_bytes() for path in (finished / "search" / "trials").iterdir()}
    for path in (*copied.glob("search/trials/*"), *copied.glob("*/*/arch.json")):
        path.unlink()
    for path in (*copied.glob("*/*/train.json"), *copied.glob("*/*/weights.safetensors")):
        path.unlink()
    for stage in ("derive", "retrain"):
        outcome = cli(stage, "--workers", 2, "--out", copied)
        assert outcome.code == 0, outcome
    assert {path.name for path in (copied / "search" / "trials").iterdir()} == set(before)
    for path in finished.glob("*/*/weights.safetensors"):
        assert sha256_file(copied / path.relative_to(finished)) == sha256_file(path)


def alive(process: int) -> bool:
    """Whether it runs; a zombie that nobody has waited for does not."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"


def wait_for(what: Callable[[], T], seconds: float = 60.0) -> T:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := what():
            return found
        time.sleep(0.05)
    raise AssertionError("waited in vain")
