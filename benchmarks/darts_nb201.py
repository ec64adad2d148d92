"""What gradient methods find on NAS-Bench-201, judged by the table after 200 epochs of training.

    python -m benchmarks.darts_nb201 --table nb201_cifar10.npz --json FILE [--work DIR] [--seeds 0,1,2]

Searches the cell with a supernet of --cells per stage and --channels, on a part of CIFAR-10:
darts-prime, darts, and darts-prime with each part changed in turn; no budget binds. All take the same
number of optimiser steps on the weights. Adam's learning rate is the published one times published
minibatches over these, so that α can go as far as in the papers. Where the schedule is dynamic, images
are divided r : 1 as published, else 1 : 1. The cell that the last mixture stands for is looked up in
the table.

Every (method, seed) is kept in the work folder, also half-way: the same command goes on where it
stopped. With --estimate N nothing is searched: N minibatches of each kind are timed and the whole is
projected.
"""

from __future__ import annotations

import time
from argparse import Namespace
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import numpy as np

from benchmarks.record import (
    Evidence,
    Target,
    at_least,
    markdown_table,
    parser_for,
    run_script,
    start_tuned,
    whole_numbers,
)
from pipeline.algorithms import relaxation
from pipeline.artifacts import FileCheckpoint, RunFolder, read_arrays, sha256_json
from pipeline.costs.table import SpaceCosts
from pipeline.data import load_task
from pipeline.data.base import ImageTask
from pipeline.errors import ConfigError
from pipeline.evaluators.relaxed import RelaxedSettings, RelaxedSupernet
from pipeline.run import TraceFile
from pipeline.search import METHODS
from pipeline.search.darts import Darts
from pipeline.search.darts_prime import DartsPrime
from pipeline.search.gradient_rules import PUBLISHED_RATE, GradientSettings
from pipeline.search.problem import SearchProblem
from pipeline.settings import pick
from pipeline.spaces.nb201 import NB201Settings, NB201Space
from pipeline.types import Arrays, FloatArray, Json, Limit, Progress, Tier
from pipeline.ui import progress_for

TRUTH = "test_acc_200ep"
IDENTITY = ("images", "cells", "channels", "batch", "steps", "order", "device")
"""What a search depends on, beside its method, its seed and the data."""
PUBLISHED_IMAGES, PUBLISHED_EPOCHS, PUBLISHED_BATCH = 50_000, 50, 64
SHORT = {
    "none": "none",
    "skip_connect": "skip",
    "nor_conv_1x1": "conv1",
    "nor_conv_3x3": "conv3",
    "avg_pool_3x3": "avg",
}


@dataclass(frozen=True)
class Variant:
    """A method with its settings, and the norm of the mixed supernet that goes with its activation.
    That of softmax is none, as NAS-Bench-201's authors search."""

    method: str
    settings: GradientSettings
    mixed_norm: Literal["none", "nodes"]

    @property
    def dynamic(self) -> bool:
        return isinstance(self.settings, DartsPrime) and self.settings.schedule == "dynamic"

    @property
    def architecture_share(self) -> float:
        """Of the images, for α."""
        if not self.dynamic:
            return 0.5
        assert isinstance(self.settings, DartsPrime)
        return 1 / (self.settings.ratio + 1)

    def with_reach(self, steps: int) -> GradientSettings:
        """With the learning rate that takes α as far in so many minibatches as in the published ones."""
        images = PUBLISHED_EPOCHS * PUBLISHED_IMAGES * (1 - self.architecture_share)
        factor = images / PUBLISHED_BATCH / steps
        return self.settings.model_copy(update={"learning_rate": round(PUBLISHED_RATE * factor, 6)})


VARIANTS = {
    "darts-prime": Variant("darts-prime", DartsPrime(), "nodes"),
    "darts": Variant("darts", Darts(), "none"),
    "softmax for crb": Variant("darts-prime", DartsPrime(activation="softmax"), "none"),
    "static schedule": Variant("darts-prime", DartsPrime(schedule="static"), "nodes"),
    "no regulariser": Variant("darts-prime", DartsPrime(regulariser="none"), "nodes"),
    "admm for proximity": Variant("darts-prime", DartsPrime(regulariser="admm"), "nodes"),
}


# ------------------------------------------------------------------------------------------------ one search


def task_of(asked: Namespace, share: float, progress: Progress) -> ImageTask:
    settings = {"limit": asked.images, "architecture_share": share}
    return load_task(asked.data, seed=0, settings=settings, progress=progress)


def make_problem(
    asked: Namespace, variant: Variant, task: ImageTask, seed: int, made_from: Mapping[str, str]
) -> SearchProblem:
    """One tier that nothing exceeds."""
    settings = NB201Settings(
        cells=asked.cells,
        channels=asked.channels,
        mixed_norm=variant.mixed_norm,
    )
    space = NB201Space(task.image_shape, len(task.classes), settings)
    costs = SpaceCosts(space, None)
    most = float(costs.of([space.largest])[0, costs.metrics.index("params")])
    evaluator = RelaxedSupernet(
        space,
        task,
        RelaxedSettings(batch_size=asked.batch, order=asked.order),
        total_steps=asked.steps,
        seed=seed,
        device=asked.device,
    )
    return SearchProblem(
        space,
        {"table": costs},
        (Tier("table", "free", (Limit("params", 2 * most, False, "free"),)),),
        evaluator,
        evaluations=asked.steps,
        seed=seed,
        made_from=made_from,
    )


def search(
    asked: Namespace, name: str, seed: int, task: ImageTask, work: RunFolder, progress: Progress
) -> Json:
    """The record of one search, from the work folder where it is finished."""
    variant = VARIANTS[name]
    settings = variant.with_reach(asked.steps)
    stem = f"{name.replace(' ', '-')}-seed{seed}"
    path = work.path(f"{stem}.json")
    described = [*identity(asked), variant.mixed_norm, settings.model_dump()]
    inputs = {"settings": sha256_json(described), "data": task.fingerprint}
    record = work.read_record(path, inputs)
    if record is not None:
        return record
    progress.say(f"{name}, seed {seed}")
    problem = make_problem(asked, variant, task, seed, inputs)
    checkpoint = FileCheckpoint(work.path(f"{stem}.npz"))
    trace = TraceFile(work.path(f"{stem}.jsonl"), checkpoint)
    result = METHODS[variant.method].run(
        problem, settings, checkpoint=checkpoint, trace=trace.write, progress=progress
    )
    assert result.theta_KSC is not None
    record = {
        "choices": result.theta_KSC[0].argmax(axis=1).tolist(),
        "theta": np.round(result.theta_KSC[0], 4).tolist(),
        "learning_rate": settings.learning_rate,
        "steps_of_alpha": result.evaluations,
        "minutes": round(result.seconds / 60, 2),
    }
    work.write_record(path, record, inputs)
    checkpoint.remove()
    return record


def identity(asked: Namespace) -> list[Any]:
    return [getattr(asked, name) for name in IDENTITY]


# -------------------------------------------------------------------------------------------------- judging


class Table:
    """Accuracies in per cent by cell. Raises ConfigError where the table lacks a column."""

    def __init__(self, arrays: Arrays, where: Path) -> None:
        missing = [name for name in ("ops", TRUTH) if name not in arrays]
        if missing:
            raise ConfigError(f"{where}: no column '{missing[0]}'; there are: {', '.join(sorted(arrays))}")
        self.ops_RS = arrays["ops"].astype(np.int64)
        self.truth_R: FloatArray = arrays[TRUTH].astype(float)
        self._row = {tuple(ops): row for row, ops in enumerate(self.ops_RS.tolist())}

    def accuracy(self, choices: Sequence[int]) -> float:
        return float(self.truth_R[self._row[tuple(choices)]])

    def mean_without_none(self) -> float:
        """Of a random cell of operations that bring something: what a search without `none` draws
        blind."""
        return float(np.nanmean(self.truth_R[(self.ops_RS != 0).all(axis=1)]))


def summary(table: Table, records: Sequence[Json]) -> Json:
    accuracy = [table.accuracy(record["choices"]) for record in records]
    return {
        "mean": fmean(accuracy),
        "worst": min(accuracy),
        "accuracy": accuracy,
        "steps_of_alpha": fmean(record["steps_of_alpha"] for record in records),
        "minutes": fmean(record["minutes"] for record in records),
        "records": [{k: v for k, v in r.items() if k not in ("schema", "inputs")} for r in records],
    }


def in_words(choices: Sequence[int], names: Sequence[str]) -> str:
    """`3 conv3 + 2 skip + 1 avg`."""
    counts = Counter(SHORT[names[choice]] for choice in choices)
    return " + ".join(f"{count} {word}" for word, count in counts.most_common())


def result_table(results: dict[str, Json], names: Sequence[str]) -> str:
    headings = ["method", "mean %", "worst %", "per seed %", "cells", "steps of α", "min"]
    rows = [
        [
            name,
            f"{found['mean']:.2f}",
            f"{found['worst']:.2f}",
            ", ".join(f"{value:.2f}" for value in found["accuracy"]),
            "; ".join(in_words(record["choices"], names) for record in found["records"]),
            f"{found['steps_of_alpha']:.0f}",
            f"{found['minutes']:.1f}",
        ]
        for name, found in results.items()
    ]
    return markdown_table(headings, rows)


def targets_of(results: dict[str, Json]) -> list[Target]:
    found = results.get("darts-prime")
    if found is None:
        return []
    return [
        at_least("darts-prime, mean over seeds", found["mean"], 91, " %"),
        at_least("darts-prime, worst seed", found["worst"], 88, " %"),
    ]


# ------------------------------------------------------------------------------------------------- estimate


def estimate(asked: Namespace, names: Sequence[str], progress: Progress) -> str:
    """Seconds per minibatch for the weights and for α, and minutes for all seeds."""
    rows: list[list[str]] = []
    whole = 0.0
    for name in names:
        variant = VARIANTS[name]
        task = task_of(asked, variant.architecture_share, progress)
        problem = make_problem(asked, variant, task, 0, {})
        evaluator = problem.evaluator
        assert isinstance(evaluator, RelaxedSupernet)
        offers_none = variant.mixed_norm != "nodes"
        mask_EO = np.array([[offers_none or op != "none" for op in edge.choices] for edge in evaluator.edges])
        mix_EO = relaxation.shares(mask_EO.astype(float))
        weights_s = seconds_per_call(partial(evaluator.fit, mix_EO), asked.estimate)
        alpha_s = seconds_per_call(partial(evaluator.losses_and_grads, mix_EO), asked.estimate)
        moves = asked.steps * (variant.architecture_share if variant.dynamic else 1)
        minutes = (asked.steps * weights_s + moves * alpha_s) / 60
        whole += minutes * len(asked.seeds)
        rows.append([name, f"{weights_s:.3f}", f"{alpha_s:.3f}", f"{minutes:.1f}"])
    rows.append([f"all, {len(asked.seeds)} seeds", "", "", f"{whole:.0f}"])
    return markdown_table(["method", "s per step of weights", "s per step of α", "minutes"], rows)


def seconds_per_call(call: Any, times: int) -> float:
    """After two that do not count; on a GPU, calls end by reading a number."""
    for step in range(2):
        call(step=step)
    started = time.perf_counter()
    for step in range(2, 2 + times):
        call(step=step)
    return (time.perf_counter() - started) / times


# --------------------------------------------------------------------------------------------------- script


def arguments() -> Namespace:
    parser = parser_for("darts_nb201", __doc__, "--table nb201_cifar10.npz --json darts-nb201.json")
    parser.add_argument("--table", type=Path, required=True, metavar="FILE", help="nb201_cifar10.npz")
    parser.add_argument("--work", type=Path, metavar="DIR", help="default: beside the JSON, named after it")
    parser.add_argument("--data", default="cifar10", help="as of `budgetline run` (default: cifar10)")
    parser.add_argument("--images", type=int, default=10_000, help="for weights and α together")
    parser.add_argument("--methods", default=",".join(VARIANTS), help="with commas between; default: all")
    parser.add_argument("--seeds", type=whole_numbers, default=[0, 1, 2], help="with commas between")
    parser.add_argument("--steps", type=int, default=3900, help="minibatches of each search")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--cells", type=int, default=1, help="per stage")
    parser.add_argument("--channels", type=int, default=8, help="of the first stage")
    parser.add_argument("--order", choices=("first", "second"), default="first")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--estimate", type=int, default=0, metavar="N", help="time N minibatches and stop")
    return parser.parse_args()


def main() -> bool:
    asked = arguments()
    start_tuned("darts_nb201")
    import torch
    from rich.console import Console

    torch.set_flush_denormal(True)
    progress = progress_for(Console(stderr=True))
    names = [name.strip() for name in asked.methods.split(",")]
    for name in names:
        pick(VARIANTS, name, "method")
    if asked.estimate:
        print(estimate(asked, names, progress), flush=True)
        return True
    table = Table(read_arrays(asked.table), asked.table)
    evidence = Evidence("darts_nb201")
    work = RunFolder(asked.work or asked.json.with_suffix(""))
    records: dict[str, list[Json]] = {name: [] for name in names}
    tasks: dict[float, ImageTask] = {}
    with work.locked():
        for seed in asked.seeds:
            for name in names:
                share = VARIANTS[name].architecture_share
                if share not in tasks:
                    tasks[share] = task_of(asked, share, progress)
                record = search(asked, name, seed, tasks[share], work, progress)
                records[name].append(record)
                accuracy = table.accuracy(record["choices"])
                progress.say(f"{name}, seed {seed}: {accuracy:.2f} % after {record['minutes']:.1f} minutes")
    results = {name: summary(table, found) for name, found in records.items()}
    operations = NB201Space.slots[0].choices
    blind = (
        f"A random cell without `none`: {table.mean_without_none():.2f} %; the best of all: "
        f"{np.nanmax(table.truth_R):.2f} %."
    )
    return evidence.finish(
        asked.json,
        seeds=asked.seeds,
        numbers={
            "data": asked.data,
            "asked": dict(zip(IDENTITY, identity(asked), strict=True)),
            "random_without_none": table.mean_without_none(),
            "methods": results,
        },
        targets=targets_of(results),
        table=f"{result_table(results, operations)}\n\n{blind}",
    )


if __name__ == "__main__":
    run_script(main)
