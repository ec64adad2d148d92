"""Search methods on a table of trained networks: mean regret against the number of evaluations.

    python -m benchmarks.search_tabular --table nb201_cifar10.npz --json FILE [--signal COLUMN] [--truth
    COLUMN] [--cost COLUMN] [--seeds N] [--noise STD]

Five tiers at the 10, 30, 50, 70 and 95 % quantiles of the cost. A method searches on the signal; after so
many evaluations each tier takes the best signal seen within its budget, and its regret is what the truth
then lacks of the best truth within that budget. With noise, every evaluation has fresh Gaussian noise of
that size (in the signal's unit), and the choice is made by each architecture's mean answer.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from pipeline.evaluators.tabular import Benchmark, TabularEvaluator, load_benchmark
from pipeline.progress import NoCheckpoint, Silent
from pipeline.search import METHODS
from pipeline.search.base import SearchProblem
from pipeline.search.importance import Importance
from pipeline.settings import Settings
from pipeline.types import Arch, FitInfo, FloatArray, Json, Limit, Tier

COUNTS = (50, 100, 150, 200, 300, 400, 600, 800)
FIRST_SEED = 1000
"""Lower seeds chose the default settings of `importance` (on `macs_M`), so they cannot judge it."""
QUANTILES = (0.1, 0.3, 0.5, 0.7, 0.95)
COMPETITORS: dict[str, tuple[str, Settings]] = {
    "importance": ("importance", Importance()),
    "importance (weights)": ("importance", Importance(guide="weights")),
    **{name: (name, METHODS[name].config()) for name in ("asng", "random", "evolution")},
}


class Recording:
    """An evaluator that writes down what was asked, in order, and what it answered."""

    def __init__(self, inner: TabularEvaluator) -> None:
        self._inner = inner
        self.noisy, self.trains = inner.noisy, inner.trains
        self.asked: list[Arch] = []
        self.answers: list[float] = []

    def losses(self, archs: Sequence[Arch], *, step: int, thorough: bool = False) -> FloatArray:
        losses = self._inner.losses(archs, step=step, thorough=thorough)
        self.asked += archs
        self.answers += losses[:, 0].tolist()
        return losses

    def fit(self, archs: Sequence[Arch], *, step: int) -> FitInfo:
        return self._inner.fit(archs, step=step)

    def state(self) -> Any:
        return {}

    def load_state(self, state: Any) -> None:
        pass


def tiers_of(table: Benchmark) -> tuple[Tier, ...]:
    (metric,) = table.costs.metrics
    usable = table.cost_R[np.isfinite(table.truth_R)]
    return tuple(
        Tier("table", f"{q:.0%}", (Limit(metric, float(np.quantile(usable, q)), False, f"{q:.0%}"),))
        for q in QUANTILES
    )


def regrets(table: Benchmark, tiers: Sequence[Tier], recording: Recording) -> FloatArray:
    """Regret per count and tier; a tier with nothing within its budget regrets the whole range of the
    truth."""
    row = {tuple(choices): r for r, choices in enumerate(table.choices_RS.tolist())}
    asked_E = np.array([row[arch.choices] for arch in recording.asked])
    answers_E = np.array(recording.answers)
    budgets = [limit.value for tier in tiers for limit in tier.limits]
    return np.array(
        [
            [_regret(table, asked_E[:count], answers_E[:count], budget) for budget in budgets]
            for count in COUNTS
        ]
    )


def _regret(table: Benchmark, asked_E: Any, answers_E: FloatArray, budget: float) -> float:
    within = table.cost_R <= budget
    best = np.nanmax(np.where(within, table.truth_R, np.nan))
    fits_E = within[asked_E] & np.isfinite(table.truth_R[asked_E])
    if not fits_E.any():
        return float(best - np.nanmin(table.truth_R))
    rows, index = np.unique(asked_E[fits_E], return_inverse=True)
    mean_answer = np.bincount(index, answers_E[fits_E]) / np.bincount(index)
    return float(best - table.truth_R[rows[mean_answer.argmin()]])


def measure(table: Benchmark, name: str, seeds: int) -> tuple[FloatArray, float]:
    """Regrets, shape (seeds, counts, tiers), and seconds per search."""
    method, config = COMPETITORS[name]
    tiers, started, all_regrets = tiers_of(table), time.perf_counter(), []
    for seed in range(FIRST_SEED, FIRST_SEED + seeds):
        recording = Recording(table.evaluator)
        costs = {"table": table.costs}
        problem = SearchProblem(table.space, costs, tiers, recording, COUNTS[-1], seed=seed)
        METHODS[method].run(
            problem, config, checkpoint=NoCheckpoint(), trace=lambda record: None, progress=Silent()
        )
        all_regrets.append(regrets(table, tiers, recording))
    return np.array(all_regrets), (time.perf_counter() - started) / seeds


def summary(ours: FloatArray, theirs: FloatArray) -> Json:
    """Mean regret over tiers per count, half the 95 % interval, and the paired test that ours is lower."""
    mean_seeds, ours_seeds = theirs.mean(axis=2), ours.mean(axis=2)
    half = stats.t.ppf(0.975, len(theirs) - 1) * mean_seeds.std(axis=0, ddof=1) / np.sqrt(len(theirs))
    record: Json = {
        "regret": mean_seeds.mean(axis=0).round(4).tolist(),
        "interval": half.round(4).tolist(),
        "regret_per_tier": theirs.mean(axis=0).round(4).tolist(),
    }
    if ours is not theirs:
        test = stats.ttest_rel(ours_seeds, mean_seeds, axis=0, alternative="less")
        record["p_importance_is_lower"] = np.nan_to_num(test.pvalue, nan=1.0).round(5).tolist()
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--table", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--signal", default="val_acc_12ep")
    parser.add_argument("--truth", default="test_acc_200ep")
    parser.add_argument("--cost", default="macs_M")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--noise", type=float, default=0.0)
    asked = parser.parse_args()
    table = load_benchmark(
        asked.table, signal=asked.signal, truth=asked.truth, cost=asked.cost, noise_std=asked.noise
    )
    results: Json = {}
    print(f"{'evaluations':24s}" + "".join(f"{count:>13d}" for count in COUNTS))
    ours, _ = first = measure(table, "importance", asked.seeds)
    for name in COMPETITORS:
        regret, seconds = first if name == "importance" else measure(table, name, asked.seeds)
        results[name] = {**summary(ours, regret), "seconds_per_search": round(seconds, 3)}
        shown = zip(results[name]["regret"], results[name]["interval"], strict=True)
        print(f"{name:24s}" + "".join(f"  {mean:5.2f} ± {half:.2f}" for mean, half in shown), flush=True)
    settings = {name: str(value) for name, value in vars(asked).items()} | {
        "quantiles": QUANTILES,
        "first_seed": FIRST_SEED,
    }
    asked.json.write_text(json.dumps({"settings": settings, "counts": COUNTS, "methods": results}, indent=2))


if __name__ == "__main__":
    main()
