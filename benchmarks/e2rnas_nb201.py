"""Whether E2RNAS finds cells of NAS-Bench-201 that stand attacks better than those of DARTS and
DARTS-PRIME within the same budgets.

    python -m benchmarks.e2rnas_nb201 --table nb201_cifar10.npz --json FILE [--work DIR] [--seeds 0,1,2]

One search per (method, seed) with a supernet of --cells per stage and --channels, on a part of CIFAR-10,
for --budgets: shares of the way from the smallest to the largest network's parameters, the same for all
methods. All take as many optimiser steps on the weights: --warm-up for all tiers, then --steps for each.
Adam's learning rate, the split of the images and the norms are those of `benchmarks/darts_nb201.py`.
Beside the three methods e2rnas on weights that train on clean images, and darts on adversarial ones:
which half does what.

A tier's cell is the one nearest to its last mixture among those that use 85 % to 100 % of its budget, which
is how a run's `derive` orders them: so cells are compared with others of about their size. The table says
what one is worth after 200 epochs of training on clean images: accuracy as it is and under FGSM and PGD at
--epsilon, and its size. Beside it, what random connected cells of that band have on average and at best, how
many of them are worse, and in how much of a search the budget or the size had a say.

Every (method, seed) is kept in the work folder, also half-way: the same command goes on where it
stopped. With --estimate N nothing is searched: N minibatches of each kind are timed and the whole is
projected.
"""

from __future__ import annotations

import itertools
import json
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from benchmarks.darts_nb201 import Variant, in_words, seconds_per_call, task_of
from benchmarks.record import (
    Evidence,
    Target,
    markdown_table,
    parser_for,
    run_script,
    start_tuned,
    whole_numbers,
)
from pipeline.algorithms import relaxation
from pipeline.artifacts import FileCheckpoint, RunFolder, read_arrays, sha256_json
from pipeline.costs.table import SpaceCosts
from pipeline.data.base import ImageTask
from pipeline.errors import ConfigError
from pipeline.evaluators.adversarial import AdversarialSettings, make_adversarial
from pipeline.evaluators.relaxed import RelaxedSettings, RelaxedSupernet
from pipeline.run import TraceFile
from pipeline.search import METHODS
from pipeline.search.darts import Darts
from pipeline.search.darts_prime import DartsPrime
from pipeline.search.e2rnas import E2rnas
from pipeline.search.nearest import Nearest
from pipeline.search.problem import SearchProblem
from pipeline.settings import pick
from pipeline.spaces.nb201 import NAME, NB201Settings, NB201Space, live_edges
from pipeline.types import Arch, Arrays, FloatArray, Json, Limit, Progress, Tier
from pipeline.ui import progress_for

CLEAN, SIZE = "test_acc_200ep", "params_M"
IDENTITY = (
    "images",
    "cells",
    "channels",
    "batch",
    "budgets",
    "warm_up",
    "steps",
    "order",
    "device",
    "attack_epsilon",
)
"""What a search depends on, beside its method, its seed and the data."""
DEVICE = "table"
BAND = 0.85
"""Cells of a tier use this much of its budget, where there are such."""


@dataclass(frozen=True)
class Contender(Variant):
    """A method, and what its weights train on."""

    adversarial: bool = False


CONTENDERS = {
    "e2rnas": Contender("e2rnas", E2rnas(), "none", adversarial=True),
    "darts": Contender("darts", Darts(), "none"),
    "darts-prime": Contender("darts-prime", DartsPrime(), "nodes"),
    "e2rnas on clean weights": Contender("e2rnas", E2rnas(), "none"),
    "darts on adversarial weights": Contender("darts", Darts(), "none", adversarial=True),
}


# ------------------------------------------------------------------------------------------------ one search


def space_of(asked: Namespace, task: ImageTask, mixed_norm: str = "none") -> NB201Space:
    settings = NB201Settings(cells=asked.cells, channels=asked.channels, mixed_norm=mixed_norm)
    return NB201Space(task.image_shape, len(task.classes), settings)


def tiers_of(asked: Namespace, space: NB201Space, costs: SpaceCosts) -> tuple[Tier, ...]:
    column = costs.metrics.index("params")
    low, high = costs.of([space.smallest, space.largest])[:, column].tolist()

    def tier(share: float) -> Tier:
        name = f"{share:.0%}"
        return Tier(DEVICE, name, (Limit("params", low + share * (high - low), False, name),))

    return tuple(tier(share) for share in asked.budgets)


def make_problem(
    asked: Namespace, contender: Contender, task: ImageTask, seed: int, made_from: Mapping[str, str]
) -> SearchProblem:
    space = space_of(asked, task, contender.mixed_norm)
    costs = SpaceCosts(space, None)
    tiers = tiers_of(asked, space, costs)
    plain = {"batch_size": asked.batch, "order": asked.order}
    make: Any = RelaxedSupernet
    settings: RelaxedSettings = RelaxedSettings(**plain)
    if contender.adversarial:
        make, settings = make_adversarial, AdversarialSettings(**plain, epsilon=asked.attack_epsilon)
    total = asked.warm_up + asked.steps
    return SearchProblem(
        space,
        {DEVICE: costs},
        tiers,
        make(space, task, settings, total_steps=total, seed=seed, device=asked.device),
        evaluations=len(tiers) * asked.steps,
        warm_up=asked.warm_up,
        seed=seed,
        made_from=made_from,
    )


def search(
    asked: Namespace, name: str, seed: int, task: ImageTask, work: RunFolder, progress: Progress
) -> Json:
    """The record of one search, from the work folder where it is finished."""
    contender = CONTENDERS[name]
    settings = contender.with_reach(asked.steps)
    stem = f"{name.replace(' ', '-')}-seed{seed}"
    path = work.path(f"{stem}.json")
    described = [*identity(asked), contender.mixed_norm, contender.adversarial, settings.model_dump()]
    inputs = {"settings": sha256_json(described), "data": task.fingerprint}
    record = work.read_record(path, inputs)
    if record is not None:
        return record
    progress.say(f"{name}, seed {seed}")
    problem = make_problem(asked, contender, task, seed, inputs)
    checkpoint = FileCheckpoint(work.path(f"{stem}.npz"))
    trace = TraceFile(work.path(f"{stem}.jsonl"), checkpoint)
    result = METHODS[contender.method].run(
        problem, settings, checkpoint=checkpoint, trace=trace.write, progress=progress
    )
    assert result.theta_KSC is not None and result.mixes_KEO is not None
    space = problem.space
    assert isinstance(space, NB201Space)
    last = [space.canonical(space.discretise(mix_EO)) for mix_EO in result.mixes_KEO]
    cells = nearest_cells(problem, space, result.mixes_KEO)
    usage_K, last_usage_K = (problem.usage(archs).diagonal().tolist() for archs in (cells, last))
    record = {
        "tiers": [
            {
                "name": tier.name,
                "choices": list(cells[k].choices),
                "usage": usage_K[k],
                "last_mixture": list(last[k].choices),
                "last_usage": last_usage_K[k],
                "pressed": share_pressed(work.path(f"{stem}.jsonl"), tier),
            }
            for k, tier in enumerate(problem.tiers)
        ],
        "theta": np.round(result.theta_KSC, 4).tolist(),
        "learning_rate": settings.learning_rate,
        "minutes": round(result.seconds / 60, 2),
    }
    work.write_record(path, record, inputs)
    checkpoint.remove()
    return record


def nearest_cells(problem: SearchProblem, space: NB201Space, mixes_KEO: FloatArray) -> list[Arch]:
    """Per tier, of all cells in its band."""
    choices = itertools.product(*(range(len(slot.choices)) for slot in space.slots))
    archs = list(dict.fromkeys(space.canonical(Arch(NAME, row)) for row in choices))
    usage_NK = problem.usage(archs)
    found: list[Arch] = []
    for mix_EO, usage_N in zip(mixes_KEO, usage_NK.T, strict=True):
        inside = [archs[row] for row in np.flatnonzero((usage_N >= BAND) & (usage_N <= 1))]
        distance_N = Nearest(space, mix_EO).losses(inside)[:, 0]
        found.append(inside[int(distance_N.argmin())])
    return found


def share_pressed(trace: Path, tier: Tier) -> float:
    """In how many of a tier's steps of α a limit's multiplier or the size's weight was above 0."""
    records = map(json.loads, trace.read_text().splitlines())
    moves = [own for r in records for own in r.get("tiers", ()) if own["tier"] == tier.key and "loss" in own]
    return fmean(
        max(own["multiplier"].values()) > 0 or own.get("objective_weights", [0])[-1] > 0 for own in moves
    )


def identity(asked: Namespace) -> list[Any]:
    return [getattr(asked, name) for name in IDENTITY]


# --------------------------------------------------------------------------------------------------- judging


class Table:
    """What is known of every cell. Raises ConfigError where the table lacks a column."""

    def __init__(self, arrays: Arrays, where: Path, epsilon: int) -> None:
        self.attacks = {name: f"{name}_acc_eps{epsilon}" for name in ("fgsm", "pgd")}
        self.judged = (CLEAN, *self.attacks.values(), SIZE)
        missing = [name for name in ("ops", *self.judged) if name not in arrays]
        if missing:
            raise ConfigError(f"{where}: no column '{missing[0]}'; there are: {', '.join(sorted(arrays))}")
        self.ops_RS = arrays["ops"].astype(np.int64)
        self.columns = {name: arrays[name].astype(float) for name in self.judged}
        self._row = {tuple(ops): row for row, ops in enumerate(self.ops_RS.tolist())}

    def of(self, choices: Sequence[int]) -> dict[str, float]:
        row = self._row[tuple(choices)]
        return {name: float(column[row]) for name, column in self.columns.items()}

    @cached_property
    def connected_R(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        return np.array([any(live_edges(tuple(ops))) for ops in self.ops_RS.tolist()])

    def params_R(self, space: NB201Space, costs: SpaceCosts) -> FloatArray:
        """Of the networks that are searched, which are smaller than the table's."""
        archs = [space.canonical(Arch(NAME, tuple(ops))) for ops in self.ops_RS.tolist()]
        return np.asarray(costs.of(archs)[:, costs.metrics.index("params")])


def reference(table: Table, usage_R: FloatArray) -> Json:
    """Of random cells that use the budget: mean and best of each column."""
    rows = np.flatnonzero(table.connected_R & (usage_R >= BAND) & (usage_R <= 1))
    return {
        "cells": len(rows),
        **{
            name: {"mean": float(np.nanmean(column[rows])), "best": float(np.nanmax(column[rows]))}
            for name, column in table.columns.items()
        },
        "values": {name: table.columns[name][rows] for name in table.judged},
    }


def summary(table: Table, records: Sequence[Json], tier: int, beside: Json) -> Json:
    """Of one method and tier, over its seeds."""
    cells = [record["tiers"][tier] for record in records]
    worth = [table.of(cell["choices"]) for cell in cells]
    return {
        "choices": [cell["choices"] for cell in cells],
        "last_mixture": [cell["last_mixture"] for cell in cells],
        "usage": [cell["usage"] for cell in cells],
        "pressed": fmean(cell["pressed"] for cell in cells),
        "per_seed": worth,
        **{name: fmean(seed[name] for seed in worth) for name in table.judged},
        "better_than": {
            name: fmean(float((beside["values"][name] < seed[name]).mean()) for seed in worth)
            for name in table.judged
            if name != SIZE
        },
    }


def result_table(table: Table, results: dict[str, Json], beside: dict[str, Json]) -> str:
    headings = ["budget", "method", "clean %", "FGSM %", "PGD %", "params M", "better than, clean/FGSM/PGD"]
    headings += ["pressed", "cells"]
    rows: list[list[str]] = []
    names = NB201Space.slots[0].choices
    for tier, found in beside.items():
        for method, tiers in results.items():
            own = tiers[tier]
            better = "/".join(f"{share:.0%}" for share in own["better_than"].values())
            cells = "; ".join(in_words(choices, names) for choices in own["choices"])
            worth = [f"{own[name]:.2f}" for name in table.judged]
            rows.append([tier, method, *worth, better, f"{own['pressed']:.0%}", cells])
        for word in ("mean", "best"):
            values = [f"{found[name][word]:.2f}" for name in table.judged[:-1]]
            rows.append([tier, f"random cells, {word}", *values, f"{found[SIZE]['mean']:.2f}", "", "", ""])
    return markdown_table(headings, rows)


def targets_of(table: Table, results: dict[str, Json]) -> list[Target]:
    """E2RNAS ahead of each rival under each attack, as a mean over budgets and seeds."""

    def mean(method: str, column: str) -> float:
        return fmean(own[column] for own in results[method].values())

    if "e2rnas" not in results:
        return []
    ahead = {
        f"e2rnas over {rival}, {attack.upper()}": mean("e2rnas", column) - mean(rival, column)
        for rival in ("darts", "darts-prime")
        if rival in results
        for attack, column in table.attacks.items()
    }
    return [Target(name, "> 0 %", f"{by:.2f} %", by > 0) for name, by in ahead.items()]


# -------------------------------------------------------------------------------------------------- estimate


def estimate(asked: Namespace, names: Sequence[str], progress: Progress) -> str:
    """Seconds per minibatch for the weights and for α, and minutes for all seeds."""
    rows: list[list[str]] = []
    whole = 0.0
    for name in names:
        contender = CONTENDERS[name]
        problem = make_problem(
            asked, contender, task_of(asked, contender.architecture_share, progress), 0, {}
        )
        evaluator: Any = problem.evaluator
        mask_EO = np.array([[contender.mixed_norm == "none" or op > 0 for op in range(5)]] * 6)
        mix_EO = relaxation.shares(mask_EO.astype(float))
        weights_s = seconds_per_call(partial(evaluator.fit, mix_EO), asked.estimate)
        alpha_s = seconds_per_call(partial(evaluator.losses_and_grads, mix_EO), asked.estimate)
        steps = len(asked.budgets) * asked.steps
        moves = steps * (contender.architecture_share if contender.dynamic else 1)
        minutes = ((asked.warm_up + steps) * weights_s + moves * alpha_s) / 60
        whole += minutes * len(asked.seeds)
        rows.append([name, f"{weights_s:.3f}", f"{alpha_s:.3f}", f"{minutes:.1f}"])
    rows.append([f"all, {len(asked.seeds)} seeds", "", "", f"{whole:.0f}"])
    return markdown_table(["method", "s per step of weights", "s per step of α", "minutes"], rows)


# ---------------------------------------------------------------------------------------------------- script


def shares(text: str) -> list[float]:
    return [float(number) for number in text.split(",")]


def arguments() -> Namespace:
    parser = parser_for("e2rnas_nb201", __doc__, "--table nb201_cifar10.npz --json e2rnas-nb201.json")
    parser.add_argument("--table", type=Path, required=True, metavar="FILE", help="nb201_cifar10.npz")
    parser.add_argument("--work", type=Path, metavar="DIR", help="default: beside the JSON, named after it")
    parser.add_argument("--data", default="cifar10", help="as of `budgetline run` (default: cifar10)")
    parser.add_argument("--images", type=int, default=10_000, help="for weights and α together")
    parser.add_argument("--methods", default=",".join(CONTENDERS), help="with commas between; default: all")
    parser.add_argument("--seeds", type=whole_numbers, default=[0, 1, 2], help="with commas between")
    parser.add_argument("--budgets", type=shares, default=[0.2, 0.4], help="shares of the parameters' range")
    parser.add_argument("--warm-up", type=int, default=500, help="minibatches for all tiers")
    parser.add_argument("--steps", type=int, default=1500, help="minibatches of each tier")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--cells", type=int, default=1, help="per stage")
    parser.add_argument("--channels", type=int, default=8, help="of the first stage")
    parser.add_argument("--order", choices=("first", "second"), default="first")
    parser.add_argument(
        "--attack-epsilon", type=float, default=2.0, help="what weights train against, in 1/255"
    )
    parser.add_argument(
        "--epsilon", type=int, choices=(1, 2, 4), default=2, help="of the table's attacks, in 1/255"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--estimate", type=int, default=0, metavar="N", help="time N minibatches and stop")
    return parser.parse_args()


def judge(
    asked: Namespace, table: Table, task: ImageTask, records: dict[str, list[Json]]
) -> tuple[dict[str, Json], dict[str, Json]]:
    """Per method and tier what was found, and per tier what random cells are worth."""
    space = space_of(asked, task)
    costs = SpaceCosts(space, None)
    tiers = tiers_of(asked, space, costs)
    params_R = table.params_R(space, costs)
    beside = {tier.name: reference(table, params_R / tier.budgets["params"]) for tier in tiers}
    results = {
        method: {tier.name: summary(table, found, k, beside[tier.name]) for k, tier in enumerate(tiers)}
        for method, found in records.items()
    }
    return results, {
        name: {k: v for k, v in found.items() if k != "values"} for name, found in beside.items()
    }


def main() -> bool:
    asked = arguments()
    start_tuned("e2rnas_nb201")
    import torch
    from rich.console import Console

    torch.set_flush_denormal(True)
    progress = progress_for(Console(stderr=True))
    names = [name.strip() for name in asked.methods.split(",")]
    for name in names:
        pick(CONTENDERS, name, "method")
    if asked.estimate:
        print(estimate(asked, names, progress), flush=True)
        return True
    table = Table(read_arrays(asked.table), asked.table, asked.epsilon)
    evidence = Evidence("e2rnas_nb201")
    work = RunFolder(asked.work or asked.json.with_suffix(""))
    records: dict[str, list[Json]] = {name: [] for name in names}
    tasks: dict[float, ImageTask] = {}
    with work.locked():
        for seed in asked.seeds:
            for name in names:
                share = CONTENDERS[name].architecture_share
                task = tasks.setdefault(share, tasks.get(share) or task_of(asked, share, progress))
                record = search(asked, name, seed, task, work, progress)
                records[name].append(record)
                progress.say(f"{name}, seed {seed}: {record['minutes']:.1f} minutes")
    results, beside = judge(asked, table, next(iter(tasks.values())), records)
    return evidence.finish(
        asked.json,
        seeds=asked.seeds,
        numbers={
            "data": asked.data,
            "asked": dict(zip(IDENTITY, identity(asked), strict=True)),
            "epsilon": asked.epsilon,
            "random": beside,
            "methods": results,
            "minutes": {name: [record["minutes"] for record in found] for name, found in records.items()},
        },
        targets=targets_of(table, results),
        table=result_table(table, results, beside),
    )


if __name__ == "__main__":
    run_script(main)
