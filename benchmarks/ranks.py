"""Several processes search as one does, survive the loss of one, and what that costs.

Everything goes through the commands that a person would type, `budgetline search` and `torchrun … -m pipeline
search`, on CPU processes that talk by gloo:

1. the job of benchmarks/ranks.yaml in one process, then with each number of ranks: the same architectures
   in the same order, and shared weights within 1e-5 after its 50 steps;
2. a longer job (`--kill-warm-up` steps): when its first checkpoint is there one rank gets SIGKILL. torchrun
   has to end, with our message, within `--bound` seconds; another number of ranks then goes on from the
   checkpoint and comes to what an uninterrupted process comes to;
3. what a step costs and what it sends, measured; and a model of 8, 64 and 512 GPUs, which are not here: an
   estimate with its assumptions, not a measurement.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import psutil
from numpy.random import Generator

from benchmarks.record import (
    Evidence,
    Target,
    at_least,
    at_most,
    budgetline,
    markdown_table,
    none_of,
    parser_for,
    run_script,
)
from pipeline.artifacts import FileCheckpoint, read_arrays, read_json, read_yaml
from pipeline.errors import BudgetlineError
from pipeline.ranks import share_out
from pipeline.types import Arrays, Json

POLL_SECONDS = 0.1
CLOSE = 1e-5
DIGEST_BYTES = 8 * 5
"""What a rank says of its decisions after a step: five digests."""

# ---------------------------------------------------------------------------------------------------- running


def torchrun(ranks: int, folder: Path) -> list[str]:
    """The command line that searches in this run's folder with so many ranks."""
    several = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [*(several if ranks > 1 else [sys.executable]), "-m", "pipeline", "search", "--out", str(folder)]


def one_thread_each() -> dict[str, str]:
    """Ranks share the cores, and the order of sums must not depend on how many there are."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def profiled(config: Path, folder: Path, warm_up: int | None) -> Path:
    """A run whose search can start."""
    changed = [] if warm_up is None else ["--set", f"search.warm_up={warm_up}"]
    finish(budgetline("profile", str(config), "--out", str(folder), *changed))
    return folder


def finish(command: Sequence[str]) -> float:
    """Run to the end; its seconds. Raises BudgetlineError where it failed."""
    began = time.perf_counter()
    done = subprocess.run(command, env=one_thread_each(), capture_output=True, text=True)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise BudgetlineError(f"{' '.join(command)}: exited with {done.returncode}; it said last: {last}")
    return time.perf_counter() - began


@dataclass(frozen=True)
class Searched:
    """What a search left: architectures in the order in which they were first sampled."""

    choices: list[list[int]]
    losses: list[float]
    weights: Arrays
    seconds: float

    @classmethod
    def read(cls, folder: Path) -> Searched:
        result = read_json(folder / "search/result.json")
        choices, losses, _ = zip(*result["candidates"], strict=True)
        weights = read_arrays(folder / "search/evaluator.npz")
        return cls(list(choices), list(losses), weights, float(result["seconds"]))

    def furthest(self, other: Searched) -> float:
        """The largest difference between any two weights."""
        names = [name for name in self.weights if name.startswith("weight/")]
        return max(float(np.abs(self.weights[n] - other.weights[n]).max()) for n in names)

    @property
    def vector_bytes(self) -> int:
        """Of one architecture's gradient."""
        return 4 * sum(value.size for name, value in self.weights.items() if name.startswith("weight/"))


# ---------------------------------------------------------------------------------------------------- killing


@dataclass(frozen=True, slots=True)
class Loss:
    """One rank of `ranks` was killed at step `killed_after`; `ended_s` later torchrun was gone."""

    ranks: int
    rank: int
    killed_after: int
    ended_s: float
    code: int
    told: bool


def kill_one(folder: Path, ranks: int, rank: int, log: Path) -> Loss:
    """Start a search, kill a rank once there is a checkpoint, and wait for the rest to end."""
    checkpoint = folder / "search/state.npz"
    with log.open("w") as output:
        process = subprocess.Popen(
            torchrun(ranks, folder), env=one_thread_each(), stdout=output, stderr=output
        )
        while not checkpoint.exists() and process.poll() is None:
            time.sleep(POLL_SECONDS)
        if process.poll() is not None:
            raise BudgetlineError(
                f"the search was over before it had a checkpoint; raise --kill-warm-up ({log})"
            )
        victim_of(process.pid, rank).send_signal(signal.SIGKILL)
        killed = time.perf_counter()
        code = process.wait()
        ended_s = time.perf_counter() - killed
    loaded = FileCheckpoint(checkpoint).load()
    assert loaded is not None
    told = "RankLost: rank " in log.read_text(errors="replace")
    return Loss(ranks, rank, int(loaded[1]["iteration"]), round(ended_s, 2), code, told)


def victim_of(torchrun_pid: int, rank: int) -> psutil.Process:
    """The process of a rank."""
    for child in psutil.Process(torchrun_pid).children():
        if child.environ().get("RANK") == str(rank):
            return child
    raise BudgetlineError(f"torchrun has no process of rank {rank}")


# ------------------------------------------------------------------------------------------------------ model


@dataclass(frozen=True, slots=True)
class Cluster:
    """What is assumed of machines that are not here: 8 GPUs each, of the H100 or H200 kind.

    `arithmetic` is what convolutions of this size really reach, in multiply-adds per second and GPU: about a
    twentieth of 495 TFLOP/s (dense TF32), since depthwise layers are bound by memory. Bandwidths are of one
    GPU in one direction, in bytes per second, within a machine and between machines."""

    arithmetic: float = 12e12
    gpus_per_machine: int = 8
    inside_bytes_s: float = 300e9
    between_bytes_s: float = 40e9
    message_s: float = 4e-6
    fixed_s: float = 0.015
    """Kernel launches and Python for one architecture's forward and backward pass."""

    def sum_s(self, num_bytes: float, gpus: int, per_gpu: int) -> float:
        """`Ranks.sum_in_order`: everyone sends each of the others its part of `per_gpu` vectors, and then the
        part that it has added up; one message after the other."""
        inside = min(gpus, self.gpus_per_machine) - 1
        between = gpus - 1 - inside
        part_s = inside / self.inside_bytes_s + between / self.between_bytes_s
        return 2 * (gpus - 1) * self.message_s + (per_gpu + 1) * num_bytes / gpus * part_s


@dataclass(frozen=True, slots=True)
class Job:
    """A supernet step: bytes of a gradient, multiply-adds of one image's forward pass for every
    architecture that a search might sample, images in a batch."""

    vector_bytes: int
    macs: tuple[float, ...]
    batch_size: int


def estimate(job: Job, cluster: Cluster, gpus: int, per_gpu: int, rng: Generator) -> Json:
    """What a step of `per_gpu` architectures for every GPU takes, and how much of it the GPUs work.

    A backward pass counts as two forward passes. Architectures are drawn from the job's and shared out as the
    search does it; the slowest GPU decides."""
    drawn = rng.choice(job.macs, size=(20, gpus * per_gpu))
    one_s = cluster.fixed_s + 3 * drawn * job.batch_size / cluster.arithmetic
    slowest_s = float(np.mean([_slowest(row_s.tolist(), gpus) for row_s in one_s]))
    mean_s = float(one_s.sum(axis=1).mean()) / gpus
    sum_s = cluster.sum_s(job.vector_bytes, gpus, per_gpu)
    step_s = slowest_s + sum_s
    return {
        "gpus": gpus,
        "architectures_per_gpu": per_gpu,
        "step_ms": 1e3 * step_s,
        "working_ms": 1e3 * mean_s,
        "waiting_ms": 1e3 * (slowest_s - mean_s),
        "sum_ms": 1e3 * sum_s,
        "efficiency": mean_s / step_s,
        "architectures_per_second": gpus * per_gpu / step_s,
    }


def _slowest(one_s: list[float], gpus: int) -> float:
    taken_s = np.zeros(gpus)
    np.add.at(taken_s, share_out(one_s, gpus), one_s)
    return float(taken_s.max())


def imagenet_job(rng: Generator) -> Job:
    """The largest `mbconv` at 224 × 224 with 1,000 classes, batches of 128, random architectures."""
    from pipeline.spaces.mbconv import MBConvSettings, MBConvSpace
    from pipeline.types import Arch

    space = MBConvSpace((3, 224, 224), 1000, MBConvSettings(size="large"))
    weights = list(space.supernet().module().parameters())
    sizes = [len(slot.choices) for slot in space.slots]
    archs = [
        space.canonical(Arch(space.name, tuple(int(rng.integers(size)) for size in sizes)))
        for _ in range(200)
    ]
    macs = tuple(float(sum(layer.macs for layer in space.layers(arch))) for arch in archs)
    return Job(4 * sum(weight.numel() for weight in weights), macs, batch_size=128)


# ----------------------------------------------------------------------------------------------------- script


def main() -> bool:
    parser = parser_for("ranks", __doc__, "--ranks 2 4 --json ranks.json")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="numbers of processes")
    parser.add_argument("--run", type=Path, default=Path("benchmarks/ranks.yaml"), metavar="RUN.yaml")
    parser.add_argument("--kill-warm-up", type=int, default=1500, help="steps of the job that loses a rank")
    parser.add_argument("--bound", type=float, default=60.0, help="seconds from a kill to the end")
    asked = parser.parse_args()
    evidence = Evidence("ranks")
    with tempfile.TemporaryDirectory(prefix="budgetline-ranks-") as scratch:
        root = Path(scratch)
        together = show_equal(asked.run, root, asked.ranks)
        loss = show_loss(asked.run, root, asked.ranks, asked.kill_warm_up)
    rng = np.random.default_rng(0)
    job = imagenet_job(rng)
    model = [estimate(job, Cluster(), gpus, per_gpu, rng) for gpus in (1, 8, 64, 512) for per_gpu in (1, 4)]
    numbers: Json = {
        **together,
        "killed": loss,
        "model": {
            "assumed": asdict(Cluster()),
            "vector_bytes": job.vector_bytes,
            "mean_macs": float(np.mean(job.macs)),
            "batch_size": job.batch_size,
            "estimates": model,
        },
    }
    targets = targets_of(together, loss, asked.bound)
    return evidence.finish(asked.json, seeds=[0], numbers=numbers, targets=targets, table=tables(numbers))


def show_equal(config: Path, root: Path, ranks: Sequence[int]) -> Json:
    """One process and several come to the same; what that costs and sends."""
    start = profiled(config, root / "start", None)
    found: dict[int, Searched] = {}
    for size in (1, *ranks):
        folder = Path(shutil.copytree(start, root / f"of-{size}"))
        print(f"search with {size} ranks: {finish(torchrun(size, folder)):.0f} s", flush=True)
        found[size] = Searched.read(folder)
    alone, steps = found[1], _steps(start)
    return {
        "steps": steps,
        "compared": [
            {
                "ranks": size,
                "architectures": len(one.choices),
                "same_architectures": one.choices == alone.choices,
                "furthest_weight": one.furthest(alone),
                "furthest_loss": float(np.abs(np.subtract(one.losses, alone.losses)).max())
                if one.choices == alone.choices
                else None,
                "search_seconds": one.seconds,
                "step_ms": 1e3 * one.seconds / steps,
                **sent(one.vector_bytes, size, read_yaml(start / "run.yaml")),
            }
            for size, one in found.items()
        ],
    }


def _steps(folder: Path) -> int:
    trace = (folder.parent / "of-1/search/trace.jsonl").read_text().splitlines()
    return len(trace)


def sent(vector_bytes: int, ranks: int, config: Json) -> Json:
    """Bytes that the busiest rank sends in a step: parts of its gradients and of the sum; soft labels for a
    batch of digits, and what it says of its decisions, to everyone."""
    most = -(-int(config["search"]["fit_samples"]) // ranks)
    soft_labels = 4 * int(config["evaluator"]["batch_size"]) * 10
    to_each = (most + 1) * vector_bytes / ranks + soft_labels + DIGEST_BYTES
    return {"vector_bytes": vector_bytes, "sent_bytes": round((ranks - 1) * to_each)}


def show_loss(config: Path, root: Path, ranks: Sequence[int], warm_up: int) -> Json:
    """Of the first number of ranks one dies; the last number goes on."""
    start = profiled(config, root / "long", warm_up)
    whole = Path(shutil.copytree(start, root / "whole"))
    finish(torchrun(1, whole))
    killed = Path(shutil.copytree(start, root / "killed"))
    loss = kill_one(killed, ranks[0], ranks[0] - 1, root / "killed.txt")
    print(f"killed one of {ranks[0]}; the others ended {loss.ended_s:.1f} s later", flush=True)
    finish(torchrun(ranks[-1], killed))
    expected, found = Searched.read(whole), Searched.read(killed)
    return {
        **asdict(loss),
        "resumed_with": ranks[-1],
        "warm_up": warm_up,
        "same_architectures": found.choices == expected.choices,
        "furthest_weight": found.furthest(expected),
    }


def targets_of(together: Json, loss: Json, bound_s: float) -> list[Target]:
    several = [one for one in together["compared"] if one["ranks"] > 1]
    apart = [f"{one['ranks']} ranks" for one in several if not one["same_architectures"]]
    return [
        none_of("other architectures than one process", apart),
        at_most("furthest weight", max(one["furthest_weight"] for one in several), CLOSE),
        at_most("from a killed rank to the end", loss["ended_s"], bound_s, " s"),
        at_least("exit code after it", loss["code"], 1),
        none_of("missing of our message", [] if loss["told"] else ["RankLost"]),
        none_of("other result after it", [] if loss["same_architectures"] else ["architectures"]),
    ]


def tables(numbers: Json) -> str:
    compared = markdown_table(
        ["ranks", "architectures", "same", "furthest weight", "step", "sent per rank and step"],
        [
            [
                one["ranks"],
                one["architectures"],
                "yes" if one["same_architectures"] else "**no**",
                f"{one['furthest_weight']:.1e}",
                f"{one['step_ms']:.0f} ms",
                f"{one['sent_bytes'] / 1e3:.0f} kB",
            ]
            for one in numbers["compared"]
        ],
    )
    model = markdown_table(
        ["GPUs", "architectures each", "step", "working", "waiting for the slowest", "sum", "efficiency"],
        [
            [
                one["gpus"],
                one["architectures_per_gpu"],
                *(f"{one[key]:.1f} ms" for key in ("step_ms", "working_ms", "waiting_ms", "sum_ms")),
                f"{100 * one['efficiency']:.0f} %",
            ]
            for one in numbers["model"]["estimates"]
        ],
    )
    return f"{compared}\n\nEstimated, not measured (assumptions in the record):\n\n{model}"


if __name__ == "__main__":
    run_script(main)
