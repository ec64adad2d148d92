"""Where a search's time goes: the search's own share, how it grows, and what training options bring.

1. Overhead: `importance` on an `mbconv` supernet with 1, 2, 5 and 15 FLOPs tiers, once with a supernet that
   stays as the warm-up left it (the default) and once with one that trains on. All that is not training or
   evaluating (sampling, costs, surrogate, distributions): its mean per iteration, as a share of the median
   training step with as many paths as tiers; judged where there are the most tiers. Every search makes the
   same number of evaluations.
2. Growth: the overhead of an iteration on spaces of other numbers of slots and choices, whose evaluator
   costs nothing, for the same numbers of tiers and evaluations.
3. Options: a training step of one member with channels-last, bf16 or torch.compile switched, each against
   the default right beside it, in alternating order; median ratio with a 95 % interval by bootstrap over
   members and the pairs of each, below 1 is faster.
"""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor
from torch.nn import functional as F

from benchmarks.record import (
    Evidence,
    at_most,
    markdown_table,
    parser_for,
    run_script,
    start_tuned,
    whole_numbers,
)
from benchmarks.step_ratio import RESAMPLES, sampled_paths
from benchmarks.timed import Timed
from pipeline.costs.table import SpaceCosts
from pipeline.data import load_task
from pipeline.data.base import ImageTask
from pipeline.evaluators.one_shot import OneShotEvaluator, OneShotSettings
from pipeline.progress import NoCheckpoint, Silent
from pipeline.search import METHODS
from pipeline.search.problem import SearchProblem
from pipeline.spaces.mbconv import MBConvSpace
from pipeline.train.retrain import seeded
from pipeline.types import Arch, Arrays, FitInfo, FloatArray, IntArray, Json, Limit, Slot, Tier

SHARE_LIMIT = 0.02
GROWTH = ((10, 4), (20, 4), (40, 4), (20, 8))
OPTIONS = ("channels-first", "bf16", "compile")


# ------------------------------------------------------------------------------------------------- overhead


class OwnTime:
    """A trace that tells what iterations take beside `evaluator`'s answers; set-up and warm-up do not
    count."""

    def __init__(self, evaluator: Timed) -> None:
        self._evaluator = evaluator
        self._ends: list[float] = []

    def write(self, record: Json) -> None:
        if record["stage"] == "search":
            self._ends.append(time.perf_counter() - self._evaluator.fit_s - self._evaluator.losses_s)

    @property
    def iterations(self) -> int:
        return len(self._ends)

    @property
    def mean_s(self) -> float:
        """From the end of the first iteration on; among them are those that select a kernel anew."""
        return (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)


def tiers_between(costs: SpaceCosts, smallest: Arch, largest: Arch, count: int) -> tuple[Tier, ...]:
    """FLOPs budgets from 10 to 70 % of the largest network's, evenly spaced in the logarithm."""
    column = costs.metrics.index("flops")
    low, high = costs.of([smallest, largest])[:, column].tolist()
    shares = np.geomspace(0.1, 0.7, count) if count > 1 else np.array([0.3])
    budgets = [max(1.05 * low, float(share) * high) for share in shares]
    return tuple(
        Tier("none", f"t{n}", (Limit("flops", budget, False, f"{budget:.0f}"),))
        for n, budget in enumerate(budgets)
    )


def overhead(space: MBConvSpace, task: ImageTask, count: int, trains_on: bool, asked: Namespace) -> Json:
    """Seconds of the search itself per iteration, and of a training step of `count` paths."""
    costs = SpaceCosts(space, None)
    timed, trace = search(
        SearchProblem(
            space=space,
            costs={"none": costs},
            tiers=tiers_between(costs, space.smallest, space.largest, count),
            evaluator=Timed(
                OneShotEvaluator(
                    space,
                    task,
                    OneShotSettings(),
                    total_steps=asked.warm_up + asked.evaluations,
                    seed=asked.seed,
                )
            ),
            evaluations=asked.evaluations,
            warm_up=asked.warm_up,
            fit_samples=count,
            train_in_search=trains_on,
            seed=asked.seed,
            save_every_s=float("inf"),
        )
    )
    step_s = float(np.median(timed.fit_seconds))
    return {
        "tiers": count,
        "supernet": "trains on" if trains_on else "stays",
        "own_seconds": trace.mean_s,
        "step_seconds": step_s,
        "evaluation_seconds": timed.losses_s / trace.iterations,
        "share": trace.mean_s / step_s,
    }


def search(problem: SearchProblem) -> tuple[Timed, OwnTime]:
    """By `importance`, with nothing kept."""
    timed, method = problem.evaluator, METHODS["importance"]
    assert isinstance(timed, Timed)
    trace = OwnTime(timed)
    method.run(problem, method.config(), checkpoint=NoCheckpoint(), trace=trace.write, progress=Silent())
    return timed, trace


# --------------------------------------------------------------------------------------------------- growth


@dataclass(frozen=True)
class ToySpace:
    """Implements `pipeline.types.ChoiceSpace`: S slots of C choices, each architecture its own canonical
    one."""

    num_slots: int
    num_choices: int
    name: str = "toy"

    @property
    def slots(self) -> tuple[Slot, ...]:
        choices = tuple(map(str, range(self.num_choices)))
        return tuple(Slot(f"slot{n}", choices) for n in range(self.num_slots))

    def canonical(self, arch: Arch) -> Arch:
        return arch


class ToyCosts:
    """An additive cost."""

    metrics = ("cost",)

    def __init__(self, sizes: tuple[int, int], seed: int) -> None:
        self.additive = np.random.default_rng(seed).uniform(1, 4, size=(1, *sizes))

    def of(self, archs: Sequence[Arch]) -> FloatArray:
        rows_NS: IntArray = np.array([arch.choices for arch in archs], dtype=np.int64)
        return np.asarray(self.additive[0][np.arange(rows_NS.shape[1]), rows_NS].sum(axis=1, keepdims=True))


class ToyEvaluator:
    """Random merits, added up; knows its answers at once."""

    noisy = False
    trains = False

    def __init__(self, sizes: tuple[int, int], seed: int) -> None:
        self._merit_SC = np.random.default_rng([seed, 1]).normal(size=sizes)

    def losses(self, archs: Sequence[Arch], *, step: int, thorough: bool = False) -> FloatArray:
        rows_NS = np.array([arch.choices for arch in archs], dtype=np.int64)
        return np.asarray(self._merit_SC[np.arange(rows_NS.shape[1]), rows_NS].sum(axis=1, keepdims=True))

    def fit(self, archs: Sequence[Arch], *, step: int) -> FitInfo:
        return FitInfo(0.0)

    def state(self) -> Arrays:
        return {}

    def load_state(self, state: Arrays) -> None:
        pass


def growth(slots: int, choices: int, tiers: int, evaluations: int, seed: int) -> Json:
    """Seconds of an iteration of `importance` that has nothing to wait for."""
    sizes = (slots, choices)
    costs = ToyCosts(sizes, seed)
    largest = float(costs.additive.max(axis=2).sum())
    _, trace = search(
        SearchProblem(
            space=ToySpace(slots, choices),
            costs={"toy": costs},
            tiers=tuple(
                Tier("toy", f"t{n}", (Limit("cost", share * largest, False, "share"),))
                for n, share in enumerate(np.linspace(0.5, 0.8, tiers).tolist())
            ),
            evaluator=Timed(ToyEvaluator(sizes, seed)),
            evaluations=evaluations,
            seed=seed,
            save_every_s=float("inf"),
        )
    )
    return {"slots": slots, "choices": choices, "tiers": tiers, "own_seconds": trace.mean_s}


# -------------------------------------------------------------------------------------------------- options


def training_step(
    space: MBConvSpace, arch: Arch, images: Tensor, labels: Tensor, option: str
) -> Callable[[], float]:
    """Takes one SGD step with an option and returns its seconds; the option "" is the default."""
    layout = torch.contiguous_format if option == "channels-first" else torch.channels_last
    with seeded(0):
        network = space.build(arch).train()
    network.to(images.device, memory_format=layout)  # type: ignore[call-overload]
    compute: Callable[[Tensor], Tensor] = torch.compile(network) if option == "compile" else network
    batch = images.to(memory_format=layout)
    optimiser = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, fused=True)
    autocast = partial(torch.autocast, images.device.type, torch.bfloat16, enabled=option == "bf16")

    def step() -> float:
        _finish(images)
        began = time.perf_counter()
        with autocast():
            logits = compute(batch)
        optimiser.zero_grad(set_to_none=True)
        F.cross_entropy(logits.float(), labels).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        _finish(images)
        return time.perf_counter() - began

    return step


def _finish(images: Tensor) -> None:
    if images.is_cuda:
        torch.cuda.synchronize(images.device)


def option_ratio(
    space: MBConvSpace, archs: Sequence[Arch], images: Tensor, labels: Tensor, option: str, pairs: int
) -> Json:
    """Step time with the option against the default."""
    ratios_MP = np.ones((len(archs), pairs))
    for ratios_P, arch in zip(ratios_MP, archs, strict=True):
        with_option = training_step(space, arch, images, labels, option)
        default = training_step(space, arch, images, labels, "")
        for _ in range(3):
            with_option(), default()
        for number in range(pairs):
            if number % 2:
                own = with_option()
                ratios_P[number] = own / default()
            else:
                other = default()
                ratios_P[number] = with_option() / other
    low, high = nested_interval(ratios_MP, np.random.default_rng(0))
    return {"option": option, "median": float(np.median(ratios_MP)), "low": low, "high": high}


def nested_interval(ratios_MP: FloatArray, rng: Generator) -> tuple[float, float]:
    """95 % of the median, by a percentile bootstrap over members and over the pairs of each."""
    num, pairs = ratios_MP.shape
    members_RM = rng.integers(num, size=(RESAMPLES, num))
    pairs_RMP = rng.integers(pairs, size=(RESAMPLES, num, pairs))
    medians_R = np.median(ratios_MP[members_RM[:, :, None], pairs_RMP], axis=(1, 2))
    low, high = np.quantile(medians_R, (0.025, 0.975))
    return float(low), float(high)


# --------------------------------------------------------------------------------------------------- script


def arguments() -> Namespace:
    parser = parser_for("throughput", __doc__, "--json throughput.json")
    parser.add_argument("--data", default="fashion-mnist", help="whose images networks train on")
    parser.add_argument("--tiers", type=whole_numbers, default=[1, 2, 5, 15])
    parser.add_argument("--evaluations", type=int, default=400, help="of every search")
    parser.add_argument("--warm-up", type=int, default=30, help="steps before every search on a supernet")
    parser.add_argument("--members", type=int, default=6, help="networks that options are tried on")
    parser.add_argument("--pairs", type=int, default=10, help="of steps, per network and option")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--options", default=",".join(OPTIONS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> bool:
    asked = arguments()
    start_tuned("throughput")
    evidence = Evidence("throughput")
    torch.set_flush_denormal(True)
    task = load_task(asked.data, seed=0, progress=Silent())
    space = MBConvSpace(task.image_shape, len(task.classes))
    shares = [
        overhead(space, task, count, trains_on, asked) for trains_on in (False, True) for count in asked.tiers
    ]
    grown = [
        growth(slots, choices, count, asked.evaluations, asked.seed)
        for slots, choices in GROWTH
        for count in asked.tiers
    ]
    options = _options(asked, space)
    return evidence.finish(
        asked.json,
        seeds=[asked.seed],
        numbers={"overhead": shares, "growth": grown, "options": options, "threads": torch.get_num_threads()},
        targets=[
            at_most(
                f"own share of a step, {n['tiers']} tiers, supernet {n['supernet']}", n["share"], SHARE_LIMIT
            )
            for n in shares
            if n["tiers"] == max(asked.tiers)
        ],
        table=_tables(shares, grown, options),
    )


def _options(asked: Namespace, space: MBConvSpace) -> list[Json]:
    archs = sampled_paths(space, asked.members, np.random.default_rng(asked.seed))
    channels, height, width = space.image_shape
    with seeded(asked.seed):
        images = torch.randn(asked.batch, channels, height, width, device=asked.device)
        labels = torch.randint(space.num_classes, (asked.batch,), device=asked.device)
    names = filter(None, asked.options.split(","))
    return [option_ratio(space, archs, images, labels, name, asked.pairs) for name in names]


def _tables(shares: Sequence[Json], grown: Sequence[Json], options: Sequence[Json]) -> str:
    overheads = [
        [
            n["supernet"],
            n["tiers"],
            f"{1e3 * n['own_seconds']:.2f} ms",
            f"{1e3 * n['step_seconds']:.0f} ms",
            f"{1e3 * n['evaluation_seconds']:.0f} ms",
            f"{100 * n['share']:.2f} %",
        ]
        for n in shares
    ]
    sizes = [
        [f"{n['slots']} × {n['choices']}", n["tiers"], f"{1e3 * n['own_seconds']:.2f} ms"] for n in grown
    ]
    ratios = [[n["option"], f"{n['median']:.3f} ({n['low']:.3f} to {n['high']:.3f})"] for n in options]
    return "\n\n".join(
        [
            markdown_table(
                ["supernet", "tiers", "own time", "training step", "evaluations", "share of a step"],
                overheads,
            ),
            markdown_table(["slots × choices", "tiers", "own time"], sizes),
            markdown_table(["option", "step against the default"], ratios),
        ]
    )


if __name__ == "__main__":
    run_script(main)
