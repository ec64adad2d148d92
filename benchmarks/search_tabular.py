"""Search methods on a table of trained networks: regret per tier against the number of evaluations.

    python -m benchmarks.search_tabular --table nb201_cifar10.npz --json FILE [--signal COLUMN] [--truth
    COLUMN] [--cost COLUMN] [--noise STD] [--seeds N] [--methods NAMES] [--work DIR] [--jobs N]

Five tiers at the 10, 30, 50, 70 and 95 % quantiles of the cost. A method searches on the signal and is
judged by the truth (and, beside it, by the signal without noise): `benchmarks/search_judging.py`. Who takes
part, how, and what counts as an evaluation: `benchmarks/search_methods.py`. With --noise, every evaluation
has fresh Gaussian noise of that size in the signal's unit; 1 per cent is what a minibatch of 1,000 images
brings at 90 %. Any table of the same form serves, its columns named.

Every (method, seed) is kept in the work folder as one JSON; a seed that is there is not searched again, so
the same command goes on where it stopped. Where a method's code has changed, remove its records.
"""

from __future__ import annotations

from argparse import Namespace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from benchmarks.record import run_script
from benchmarks.search_judging import Contest, Quality
from benchmarks.search_runs import compare, parser_of
from pipeline.artifacts import sha256_file
from pipeline.evaluators.tabular import Benchmark, load_benchmark
from pipeline.types import FloatArray, IntArray, Json, Limit, Tier

QUANTILES = (0.1, 0.3, 0.5, 0.7, 0.95)
COLUMNS = ("signal", "truth", "cost")


def contest_of(table: Benchmark) -> Contest:
    """The table as a contest, tiers by quantiles of the usable rows' cost."""
    row_of = {tuple(choices): row for row, choices in enumerate(table.choices_RS.tolist())}
    usable_R = np.isfinite(table.truth_R)
    budgets_K = np.quantile(table.cost_R[usable_R], QUANTILES)
    within_KR = (table.cost_R <= budgets_K[:, None]) & usable_R
    (metric,) = table.costs.metrics

    def column(values_R: FloatArray, choices_NS: IntArray) -> FloatArray:
        return values_R[[row_of[tuple(choices)] for choices in choices_NS.tolist()]]

    def quality(values_R: FloatArray) -> Quality:
        best_K = np.where(within_KR, values_R, -np.inf).max(axis=1)
        return Quality(partial(column, values_R), best_K, float(values_R[usable_R].min()))

    qualities = {"truth": quality(table.truth_R), "signal": quality(table.signal_R)}
    chosen_K = np.where(within_KR, table.signal_R, -np.inf).argmax(axis=1)
    tiers = tuple(
        Tier("table", f"{q:.0%}", (Limit(metric, float(budget), False, f"{q:.0%}"),))
        for q, budget in zip(QUANTILES, budgets_K, strict=True)
    )
    return Contest(
        table.space,
        table.costs,
        tiers,
        table.evaluator.reseeded,
        qualities,
        middle=float(np.median(table.signal_R[usable_R])),
        floor=float((qualities["truth"].best_K - table.truth_R[chosen_K]).mean()),
    )


@lru_cache(maxsize=1)
def load(path: Path, signal: str, truth: str, cost: str, noise: float) -> Contest:
    return contest_of(load_benchmark(path, signal=signal, truth=truth, cost=cost, noise_std=noise))


def same_for_every_seed(path: Path, signal: str, truth: str, cost: str, noise: float, seed: int) -> Contest:
    return load(path, signal, truth, cost, noise)


def identity(asked: Namespace) -> Json:
    """What a search depends on, beside its method and its seed."""
    columns = {name: getattr(asked, name) for name in COLUMNS}
    return {"table": sha256_file(asked.table), "quantiles": list(QUANTILES), **columns, "noise": asked.noise}


def arguments() -> Namespace:
    parser = parser_of("search_tabular", __doc__, "--table nb201_cifar10.npz --json tabular.json", target=0.5)
    parser.add_argument("--table", type=Path, required=True, metavar="FILE", help="nb201_cifar10.npz, say")
    parser.add_argument("--signal", default="val_acc_12ep", metavar="COLUMN", help="what is searched on")
    parser.add_argument("--truth", default="test_acc_200ep", metavar="COLUMN", help="what is judged by")
    parser.add_argument("--cost", default="macs_M", metavar="COLUMN", help="what tiers limit")
    return parser.parse_args()


def main() -> bool:
    asked = arguments()
    make = partial(same_for_every_seed, asked.table, asked.signal, asked.truth, asked.cost, asked.noise)
    return compare("search_tabular", asked, {"table": (make, identity(asked))})


if __name__ == "__main__":
    run_script(main)
