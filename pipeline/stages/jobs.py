"""Where the independent pieces of a stage are done: one after the other, side by side, or on a cluster.

A stage that has such pieces names in its module's JOBS what does them, and says what of the run's folder a
job reads. Each job writes only its own files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

from pipeline.devices.hardware import usable_cores
from pipeline.engine import Engine, InProcess, Processes, Share, share_cores
from pipeline.run import RUN_FILE, Run
from pipeline.types import Json

Jobs = Mapping[str, Callable[[Run, Json], Json]]
"""A job's `do` → what does it."""

ReadBy = Callable[[Run, Json], Iterable[Path]]
"""What a job reads in the run's folder beside what all of them read."""


def engine_for(run: Run, module: str, jobs: Jobs, read_by: ReadBy, side_by_side: bool = True) -> Engine:
    """What does the `jobs` of a stage's `module`: the cluster, if there is one. Else ranks train one network
    at a time, together; without them there are `share_of` the run's machine."""
    if run.cluster is not None:
        reads = partial(_files_for, run, read_by)
        return run.cluster.engine(module, run.folder.root, run.task.fingerprint, reads, run.workers)
    share = share_of(run, len(run.tiers))
    if run.ranks.size > 1 or share.workers == 1 or not side_by_side:
        return InProcess(lambda job: jobs[job["do"]](run, job))
    return Processes(module, run.folder.root, run.cache, share, run.progress)


def share_of(run: Run, on_cpu: int) -> Share:
    """As many workers as were asked for; by default `on_cpu` of them on a CPU, as far as its cores go, and
    one on a GPU, which without NVIDIA's multi-process service works for one process at a time.
    A training's share of the cores decides the order of its sums, and so its last bits: it follows from the
    run and the machine alone, never from what is left to do."""
    return share_cores(len(usable_cores()), run.workers or (on_cpu if run.config.device == "cpu" else 1))


def _files_for(run: Run, read_by: ReadBy, job: Json) -> list[Path]:
    """All that a job reads in the run's folder, for machines that do not see it."""
    costs = [run.costs_path(profile.name) for profile in run.config.profiles]
    return [run.folder.path(RUN_FILE), *costs, *read_by(run, job)]
