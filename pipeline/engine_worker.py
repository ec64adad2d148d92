"""A worker process of `pipeline.engine`: one request, then jobs, as JSON lines on stdin; messages on stdout.

The request names the run folder, which the parent holds the lock of, and the module that has the JOBS. The
process ends when its stdin closes.
"""

from __future__ import annotations

import importlib
import json
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.errors import BudgetlineError, StorageError
from pipeline.types import Json

REPORT_SECONDS = 0.5


class Messages:
    """A Progress whose bars and lines are messages to the parent; a bar's parts are told twice a second."""

    def __init__(self, send: Callable[[Json], None]) -> None:
        self._send = send

    @contextmanager
    def track(self, label: str, total: int, done: int = 0) -> Iterator[Callable[[int, str], None]]:
        waiting, last_note, told = done, "", 0.0

        def tell() -> None:
            nonlocal waiting, told
            self._send({"steps": waiting, "note": f"{label}: {last_note}" if last_note else label})
            waiting, told = 0, time.monotonic()

        def advance(steps: int, note: str) -> None:
            nonlocal waiting, last_note
            waiting, last_note = waiting + steps, note
            if time.monotonic() - told >= REPORT_SECONDS:
                tell()

        yield advance
        if waiting:
            tell()

    def say(self, message: str) -> None:
        self._send({"say": message})


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends this process
    lines: queue.SimpleQueue[Json] = queue.SimpleQueue()
    threading.Thread(target=_read_until_the_parent_ends, args=(lines,), daemon=True).start()
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not mix with the messages

    def send(message: dict[str, Any]) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    do = _opened(lines.get(), send)
    while True:
        send(outcome(partial(do, lines.get())))


def outcome(do: Callable[[], Json]) -> Json:
    """The message that ends a job: its answer, or the error that is the user's to read."""
    try:
        return {"answer": do()}
    except BudgetlineError as error:
        return {"error": type(error).__name__, "text": str(error)}
    except OSError as failure:
        what = f"{failure.filename or 'a temporary file'}: {failure.strerror or failure}"
        return {"error": StorageError.__name__, "text": what}


def _opened(request: Json, send: Callable[[Json], None]) -> Callable[[Json], Json]:
    """What does a job: the run is opened at the first one, so that its errors have somewhere to go."""
    import torch

    from pipeline.run import Run, open_run, prepare_compute

    torch.set_num_threads(int(request["threads"]))
    jobs: dict[str, Callable[[Run, Json], Json]] = importlib.import_module(request["jobs"]).JOBS
    opened: list[Run] = []

    def do(job: Json) -> Json:
        if not opened:
            run = open_run(Path(request["root"]), None, Messages(send))
            run.cache = Path(request["cache"])
            prepare_compute(run)
            run.require_same_space()
            opened.append(run)
        return jobs[job["do"]](opened[0], job)

    return do


def _read_until_the_parent_ends(lines: queue.SimpleQueue[Json]) -> None:
    """Reads with `os.read`: a thread inside `sys.stdin` itself would break the interpreter's exit."""
    rest = b""
    while part := os.read(0, 65536):
        *whole, rest = (rest + part).split(b"\n")
        for line in whole:
            lines.put(json.loads(line))
    os._exit(1)


if __name__ == "__main__":
    main()
