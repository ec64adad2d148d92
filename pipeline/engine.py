"""Where independent pieces of a stage run: in this process, side by side in processes of their own, or on
the machines of a cluster (`pipeline.engine_ray`).

Training one network on several threads spends much of its time at barriers: two trainings of one thread
each finish sooner than one after the other on two threads, and a neighbour disturbs them less. A job is a
JSON record whose `do` names an entry of a module's JOBS, such as `pipeline.stages.derive.JOBS`; a worker
(`python -m pipeline.engine_worker`) opens the run folder, does one job after the other, and answers with JSON
lines. Every job keeps its own checkpoint and writes its own record, so what a killed run had finished, or
begun, is not done again.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, NamedTuple, Protocol

from pipeline import errors
from pipeline.errors import BudgetlineError, WorkerLost
from pipeline.types import Json, Progress

if TYPE_CHECKING:
    from pipeline.costs.table import Measure
    from pipeline.devices.profile import DeviceProfile

Advance = Callable[[int, str], None]
Reads = Callable[[Json], Iterable[Path]]
"""The files of the run folder that a job reads; one that is not there is left out."""


class Engine(Protocol):
    """Does jobs that do not depend on each other; a context, which ends what it started."""

    def map(self, label: str, jobs: Sequence[Json], steps_each: int) -> list[Json]:
        """The jobs' answers, in order; `steps_each` is how far each advances the progress bar `label`.

        The first error ends the rest and is raised; their checkpoints stay."""
        ...

    def __enter__(self) -> Engine: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Cluster(Protocol):
    """Machines that work for this one and do not see its disk."""

    def engine(self, module: str, root: Path, data: str | None, reads: Reads, at_once: int | None) -> Engine:
        """Does the JOBS of `module` for the run in folder `root`, at most `at_once` of them at a time, on
        images of fingerprint `data`. A job that says `device` is done where that device is, on as many of
        its GPUs as `gpus` says."""
        ...

    def stopwatch(self, profile: DeviceProfile) -> Measure:
        """Times files where the device is."""
        ...

    def environment(self, profile: DeviceProfile) -> Json:
        """What of the machine that is the device decides a latency, beside the profile."""
        ...


class Share(NamedTuple):
    """`workers` processes of `threads` threads each."""

    workers: int
    threads: int


def share_cores(cores: int, jobs: int) -> Share:
    """A process for each of the jobs that run side by side, the cores divided evenly among them."""
    workers = max(1, min(cores, jobs))
    return Share(workers, max(1, cores // workers))


class InProcess:
    """One job after the other, here."""

    def __init__(self, do: Callable[[Json], Json]) -> None:
        self._do = do

    def map(self, label: str, jobs: Sequence[Json], steps_each: int) -> list[Json]:
        return [self._do(job) for job in jobs]

    def __enter__(self) -> InProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


class Processes:
    """Jobs side by side in processes of this machine, started when first needed and kept until the end.

    `root` is the run folder, which this process holds the lock of; `module` has the JOBS."""

    def __init__(self, module: str, root: Path, cache: Path, share: Share, progress: Progress) -> None:
        self._request = {"jobs": module, "root": str(root), "cache": str(cache), "threads": share.threads}
        self._share, self._progress = share, progress
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._workers: list[_Worker] = []

    def map(self, label: str, jobs: Sequence[Json], steps_each: int) -> list[Json]:
        if not jobs:
            return []
        for _ in range(min(self._share.workers, len(jobs)) - len(self._workers)):
            self._workers.append(_Worker(self._request))
            self._idle.put(self._workers[-1])
        idle, lock = self._idle, threading.Lock()
        with (
            self._progress.track(label, len(jobs) * steps_each) as advance,
            ThreadPoolExecutor(len(self._workers)) as threads,
        ):

            def advance_one_at_a_time(steps: int, note: str) -> None:
                with lock:
                    advance(steps, note)

            def do(job: Json) -> Json:
                worker = idle.get()
                try:
                    return worker.do(job, advance_one_at_a_time, self._progress.say)
                finally:
                    idle.put(worker)  # also a failed one: a job that waits for it would wait for ever

            futures = [threads.submit(do, job) for job in jobs]
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                failed = next((future for future in futures if future in done and future.exception()), None)
                if failed is not None:
                    failed.result()
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                self._end()
                raise
        return [future.result() for future in futures]

    def __enter__(self) -> Processes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        for worker in self._workers:
            worker.end()
        self._workers.clear()
        self._idle = queue.SimpleQueue()


class _Worker:
    """A process that does jobs; it ends when its standard input closes, so it never outlives this one."""

    def __init__(self, request: Json) -> None:
        self._stderr = tempfile.TemporaryFile("w+")
        self._child = subprocess.Popen(
            [sys.executable, "-P", "-m", "pipeline.engine_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            env=_environment(int(request["threads"])),
        )
        self._send(request)

    def _send(self, message: Json) -> None:
        assert self._child.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died; the next read tells
            self._child.stdin.write(json.dumps(message) + "\n")
            self._child.stdin.flush()

    def do(self, job: Json, advance: Advance, say: Callable[[str], None]) -> Json:
        assert self._child.stdout is not None
        self._send(job)
        for line in self._child.stdout:
            message = json.loads(line)
            if "answer" in message:
                answer: Json = message["answer"]
                return answer
            if "error" in message:
                raise told_error(message)
            if "say" in message:
                say(message["say"])
            else:
                advance(message["steps"], message["note"])
        code = self._child.wait()
        raise WorkerLost(
            f"a training process ended with {_ending(code)} while it did {json.dumps(job)}; its last words: "
            f"{self._last_line()}; finished work is kept: run the same command again, with --workers 1 if "
            "memory ran out"
        )

    def _last_line(self) -> str:
        self._stderr.seek(0)
        lines = self._stderr.read().strip().splitlines()
        return lines[-1] if lines else "none"

    def end(self) -> None:
        self._child.kill()
        self._child.wait()
        pipes: list[IO[str] | None] = [self._child.stdin, self._child.stdout]
        for pipe in (*pipes, self._stderr):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


def told_error(message: Json) -> BudgetlineError:
    """The error that a worker met, as it was raised there."""
    kind: type[BudgetlineError] = getattr(errors, message["error"])
    return kind(message["text"])


def _ending(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def _environment(threads: int) -> dict[str, str]:
    """This process' environment with this package on the path and as many threads as it may use."""
    package = str(Path(__file__).resolve().parents[1])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": str(threads)}
