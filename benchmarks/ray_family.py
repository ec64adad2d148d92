"""Two Ray nodes on this machine make the local engine's family, though one is lost during retraining.

The same job twice. First with the local engine, trainings of one thread each. Then all that comes after the
search once more, as tasks of a cluster of two local nodes of one CPU each (Ray's own cluster for tests): as
soon as a training on the second node has a checkpoint in the driver's folder, all processes of that node are
killed. The job must end all the same, and everything that does not measure time must be equal: brief
trainings, architectures, weights and ONNX files, the files by sha256.

Both use one cache of timings, since two measurements of a network are never the same number. Shipped files
are timed anew, on the node that carries the device's label.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.kills import Job, differences, outcome
from benchmarks.record import (
    Evidence,
    Target,
    at_least,
    budgetline,
    markdown_table,
    none_of,
    parser_for,
    run_script,
    run_to_end,
)
from pipeline.artifacts import FileCheckpoint
from pipeline.devices.hardware import usable_cores
from pipeline.engine_ray import label
from pipeline.errors import BudgetlineError
from pipeline.types import Json

POLL_SECONDS = 0.05
LOST = "other"
"""The node that is killed; the driver's is `desk`, which is also the device."""
STARTED = re.compile(r"^retrain (\S+) on node (\S+)$", re.MULTILINE)
AGAIN = re.compile(r"^retrain (\S+): lost on node", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Loss:
    """`kept_s` is the work in the checkpoint that had come back when the node was lost."""

    tier: str
    at_s: float
    kept_s: float


class Nodes:
    """Two nodes of one CPU each, `desk` labelled as each of the devices."""

    def __init__(self, devices: tuple[str, ...]) -> None:
        from ray.cluster_utils import Cluster

        each: Json = {"num_cpus": 1, "object_store_memory": 200 * 2**20}
        desk = {"node_name": "desk", "resources": {label(device): 1 for device in devices}}
        self._cluster: Any = Cluster(
            initialize_head=True, head_node_args={**each, **desk, "include_dashboard": False}
        )
        self._other = self._cluster.add_node(**each, node_name=LOST)
        self.address: str = self._cluster.address

    def lose_one(self) -> None:
        self._cluster.remove_node(self._other, allow_graceful=False)

    def stop(self) -> None:
        session = self._cluster.head_node.get_session_dir_path()
        self._cluster.shutdown()
        shutil.rmtree(session)


@contextmanager
def two_nodes(devices: tuple[str, ...]) -> Iterator[Nodes]:
    nodes = Nodes(devices)
    try:
        yield nodes
    finally:
        nodes.stop()


def run_local(job: Job, folder: Path, cache: Path, log: Path) -> float:
    """Seconds of the whole job; as many trainings as cores side by side are trainings of one thread."""
    began = time.perf_counter()
    command = budgetline("run", str(job.config), "--out", str(folder), "--workers", str(len(usable_cores())))
    with log.open("wb") as output:
        code = run_to_end(command, env=_environment(cache), stdout=output, stderr=output)
    _check_ended_well(code, log)
    return time.perf_counter() - began


def run_with_loss(nodes: Nodes, folder: Path, cache: Path, log: Path) -> tuple[float, list[Loss]]:
    """Seconds of what is left of a job, and the loss, if a training was ever there to be lost."""
    command = budgetline("run", "--out", str(folder), "--engine", "ray", "--ray-address", nodes.address)
    began, losses = time.perf_counter(), list[Loss]()
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=_environment(cache), stdout=output, stderr=output)
        try:
            while process.poll() is None:
                tier = None if losses else tier_with_checkpoint(log.read_text(), folder)
                if tier is not None:
                    kept_s = checkpoint_seconds(folder, tier)
                    nodes.lose_one()
                    losses.append(Loss(tier, round(time.perf_counter() - began, 1), kept_s))
                    print(f"node '{LOST}' is lost, {kept_s:.1f} s into retraining {tier}", flush=True)
                time.sleep(POLL_SECONDS)
        finally:
            process.kill()
            process.wait()
    _check_ended_well(process.returncode, log)
    return time.perf_counter() - began, losses


def tier_with_checkpoint(said: str, folder: Path) -> str | None:
    """A tier that trains on the node to be lost, and whose checkpoint is in the driver's folder."""
    there = [tier for tier, node in STARTED.findall(said) if node == LOST]
    at_work = [tier for tier in there if not (folder / tier / "train.json").exists()]
    return next((tier for tier in at_work if (folder / tier / "training.npz").exists()), None)


def checkpoint_seconds(folder: Path, tier: str) -> float:
    found = FileCheckpoint(folder / tier / "training.npz").load()
    return 0.0 if found is None else round(float(found[1]["seconds"]), 1)


def keep_the_search_only(folder: Path, tiers: tuple[str, ...]) -> None:
    """As a run's folder is when its search has ended."""
    for path in (*(folder / tier for tier in tiers), folder / "search" / "trials"):
        shutil.rmtree(path)
    for name in ("manifest.json", "report.html"):
        (folder / name).unlink()


def _environment(cache: Path) -> dict[str, str]:
    return {**os.environ, "BUDGETLINE_CACHE": str(cache), "RAY_USAGE_STATS_ENABLED": "0"}


def _check_ended_well(code: int, log: Path) -> None:
    if code != 0:
        last = (log.read_text(errors="replace").strip().splitlines() or ["nothing"])[-1]
        raise BudgetlineError(f"the job exited with {code}; it said last: {last}")


def targets_of(losses: list[Loss], again: list[str], apart: list[str]) -> list[Target]:
    kept_s = min((loss.kept_s for loss in losses), default=0.0)
    return [
        at_least("nodes lost while they retrained", len(losses), 1),
        at_least("trainings that started again elsewhere", len(again), 1),
        Target("work that came back before the loss", "> 0 s", f"{kept_s:.1f} s", kept_s > 0),
        none_of("differs from the local engine's family", apart),
    ]


def main() -> bool:
    parser = parser_for("ray_family", __doc__, "--json ray_family.json")
    parser.add_argument("--job", type=Path, default=Path("benchmarks/kills.yaml"), metavar="RUN.yaml")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep both folders there (must be new)")
    asked = parser.parse_args()
    evidence, job = Evidence("ray_family"), Job.read(asked.job)
    with tempfile.TemporaryDirectory(prefix="budgetline-ray-family-") as scratch:
        numbers, targets, table = show(job, asked.keep or Path(scratch))
    return evidence.finish(asked.json, seeds=[0], numbers=numbers, targets=targets, table=table)


def show(job: Job, root: Path) -> tuple[Json, list[Target], str]:
    # A run's name goes into its ONNX files: both folders have the same one.
    local, ray, cache = root / "local" / "job", root / "ray" / "job", root / "cache"
    root.mkdir(parents=True, exist_ok=True)
    print("with the local engine", flush=True)
    seconds = run_local(job, local, cache, root / "local.log")
    shutil.copytree(local, ray)
    keep_the_search_only(ray, job.tiers)
    print(f"took {seconds:.0f} s; now all after the search on two Ray nodes", flush=True)
    with two_nodes(job.devices) as nodes:
        ray_seconds, losses = run_with_loss(nodes, ray, cache, root / "ray.log")
    expected = outcome(local, job.tiers)
    again = AGAIN.findall((root / "ray.log").read_text())
    numbers: Json = {
        "losses": [{"tier": loss.tier, "at_s": loss.at_s, "kept_s": loss.kept_s} for loss in losses],
        "started_again": again,
        "seconds_local": round(seconds, 1),
        "seconds_ray_after_search": round(ray_seconds, 1),
        "compared": sorted(expected),
        "job": job.config.as_posix(),
    }
    apart = differences(expected, outcome(ray, job.tiers))
    return numbers, targets_of(losses, again, apart), _table(numbers)


def _table(numbers: Json) -> str:
    rows = [[loss["tier"], f"{loss['at_s']:.0f} s", f"{loss['kept_s']:.1f} s"] for loss in numbers["losses"]]
    losses = markdown_table(["lost while retraining", "after", "work kept"], rows)
    return (
        f"{losses}\n\n{len(numbers['compared'])} things compared; {numbers['seconds_local']:.0f} s with the "
        f"local engine, {numbers['seconds_ray_after_search']:.0f} s with Ray for what comes after the search."
    )


if __name__ == "__main__":
    run_script(main)
