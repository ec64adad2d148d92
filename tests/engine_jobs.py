"""Jobs for tests of the engine; a worker imports this module by name."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pipeline.artifacts import FileCheckpoint
from pipeline.errors import DivergedTraining
from pipeline.run import Run
from pipeline.types import Json


def square(run: Run, job: Json) -> Json:
    with run.progress.track(f"square of {job['x']}", 3) as advance:
        for _ in range(3):
            advance(1, "on its way")
    run.progress.say(f"squared {job['x']}")
    return {"x": job["x"] ** 2, "process": os.getpid()}


def diverge(run: Run, job: Json) -> Json:
    raise DivergedTraining(f"{run.folder.root.name}: the loss is nan")


def die(run: Run, job: Json) -> Json:
    os.write(2, b"out of luck\n")
    os._exit(7)


def fill_the_disk(run: Run, job: Json) -> Json:
    raise OSError(28, "No space left on device", "weights.npz")


def sleep(run: Run, job: Json) -> Json:
    Path(job["started"]).write_text(str(os.getpid()))
    time.sleep(60)
    return {}


def linger(run: Run, job: Json) -> Json:
    """Saves a checkpoint, tells its process and waits to be lost; the second time it ends."""
    checkpoint = FileCheckpoint(run.folder.path("linger.npz"))
    saved = checkpoint.load()
    if saved is None:
        checkpoint.save({"weights": np.arange(3)}, {"step": 7})
    with run.progress.track("linger", 100, 7 if saved else 0) as advance:
        for _ in range(93 if saved else 60_000):
            advance(1, str(os.getpid()))
            time.sleep(0.01 if saved is None else 0)
    assert saved is not None, "nobody ended it"
    checkpoint.remove()
    return {"went_on_from": saved[1]["step"], "weights": saved[0]["weights"].tolist()}


JOBS: dict[str, Callable[[Run, Json], Json]] = {
    f.__name__: f for f in (square, diverge, die, fill_the_disk, sleep, linger)
}
