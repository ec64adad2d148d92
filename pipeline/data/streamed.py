"""Images that are too many to be held in memory: decoded when they are asked for, by processes.

What is asked for travels to a worker as file names, and comes back as pixels; a worker knows nothing
else, so any worker may answer any request, in any order, and the answer depends on the request alone.
Workers start without torch, on the first request, and end with this process, however it ends.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.data.cache import Rows
from pipeline.data.decode import Decoder, Request, answer_all
from pipeline.data.listing import Names
from pipeline.errors import WorkerLost
from pipeline.types import FloatArray, IntArray

_IMAGES_PER_TASK = 16


class Pending:
    """Pixels that workers are at."""

    def __init__(self, shape: tuple[int, int, int], tasks: list[Future[NDArray[np.uint8]]]) -> None:
        self._shape, self._tasks = shape, tasks

    def pixels(self) -> NDArray[np.uint8]:
        """Shape (N, H, W, C). Raises DataError for a file that cannot be read, WorkerLost."""
        with _death_told():
            parts = [task.result() for task in self._tasks]
        return np.concatenate(parts) if parts else np.empty((0, *self._shape), np.uint8)

    def cancel(self) -> None:
        """Whoever asked does not want them any more; what is being decoded is finished all the same."""
        for task in self._tasks:
            task.cancel()


@contextmanager
def _death_told() -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool:
        raise WorkerLost(
            "a process that decodes images has died; what was finished is kept: run the same command again, "
            "with fewer data.workers if memory ran out"
        ) from None


class StreamedImages:
    """An ImageSource over files. `workers` processes decode; `rows` is where decoded images are kept."""

    def __init__(
        self,
        root: Path,
        names: Names,
        labels: IntArray,
        decoder: Decoder,
        *,
        workers: int,
        rows: Rows | None = None,
    ) -> None:
        assert len(names) == len(labels)
        self.labels, self.workers = labels, workers
        self._root, self._names, self._decoder, self._rows = root, names, decoder, rows
        self._pool: Executor | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        return self._decoder.shape

    def read(self, indices: IntArray) -> NDArray[np.uint8]:
        return self.request(indices).pixels()

    def request(self, indices: IntArray, crops: FloatArray | None = None) -> Pending:
        """Begin to decode, and do not wait. `crops`, shape (N, *CROP_DRAWS), are numbers in 0..1 that
        decide what is cut out of each image; without them it is the whole. Raises WorkerLost."""
        if self._pool is None:
            self._pool = start_processes(self.workers)
            weakref.finalize(self, self._pool.shutdown, wait=False, cancel_futures=True)
        with _death_told():
            tasks = [
                self._pool.submit(answer_all, self._decoder, self._requests(indices, crops, start))
                for start in range(0, len(indices), _IMAGES_PER_TASK)
            ]
        return Pending(self.shape, tasks)

    def _requests(self, indices: IntArray, crops: FloatArray | None, start: int) -> list[Request]:
        part = indices[start : start + _IMAGES_PER_TASK].tolist()
        return [
            Request(
                self._root / self._names[index],
                None if self._rows is None else self._rows.place(index),
                None if crops is None else crops[start + number],
            )
            for number, index in enumerate(part)
        ]

    def batches_ahead(self, batch_size: int) -> int:
        """How many batches of this size keep all workers busy while one is being used."""
        tasks_per_batch = -(-batch_size // _IMAGES_PER_TASK)
        return -(-2 * self.workers // tasks_per_batch) + 1


# -------------------------------------------------------------------------------------------------- processes


def start_processes(workers: int) -> ProcessPoolExecutor:
    """Fresh processes, not copies of this one: it may hold a GPU and locks of other threads."""
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload(["pipeline.data.decode"])
    return ProcessPoolExecutor(workers, context, initializer=_end_with_the_parent)


@contextmanager
def processes(workers: int) -> Iterator[Executor]:
    """Processes for the time of the block."""
    with start_processes(workers) as pool:
        yield pool


def _end_with_the_parent() -> None:
    """A worker that waits for its next task would outlive a parent that was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends its workers
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
