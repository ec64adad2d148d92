"""How well scores without training rank NAS-Bench-201's cells by their accuracy after 200 epochs.

    python -m benchmarks.proxies_nb201 --table nb201_cifar10.npz --json FILE [--entries NAME:CELLS[:whole],…]

For every entry and seed: Spearman's ρ with the table's test accuracy over the same random connected
cells, ρ over the tenth of them that is truly best, seconds per candidate, and the mean accuracy of the
best-scored cell when as many random cells are scored as fit into --budget-s (all of them at most). An
entry is an evaluator and the number of cells per stage of the networks it looks at, 5 in the table. With
`:whole` it looks at networks as the table's (benchmarks/nb201_whole.py), and where the table has a
column of the same proxy, ρ between the two says whether they agree. The 60 cells that chose eproxy's
defaults, and all that are isomorphic to them, are left out. Scores are kept per cell in the work folder:
the same command goes on where it stopped.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np

from benchmarks.nb201_cells import (
    SAMPLE_SEED,
    CellTable,
    best_found,
    load_cells,
    rank_quality,
    score_kept,
    space_of,
)
from benchmarks.record import (
    Evidence,
    Target,
    at_least,
    markdown_table,
    parser_for,
    run_script,
    start_tuned,
)
from pipeline.artifacts import RunFolder
from pipeline.data import load_task
from pipeline.data.base import ImageTask
from pipeline.errors import ConfigError
from pipeline.evaluators import EVALUATORS
from pipeline.evaluators.correlation import spearman
from pipeline.evaluators.scores import ScoreEvaluator
from pipeline.settings import parse_settings, pick
from pipeline.types import FloatArray, IntArray, Json, Progress
from pipeline.ui import progress_for

ENTRIES = "eproxy:1,eproxy:5,params:5,flops:5,synflow:5,nwot:5,jacov:1,synflow:5:whole,nwot:5:whole"
COLUMNS = {"synflow": "proxy_synflow", "nwot": "proxy_nwot", "jacov": "proxy_jacov"}
FAILED = -1e7
"""The table's proxies put −10⁸ where they failed."""
DEFAULT_RHO, AGREEMENT = 0.75, 0.95


class Entry(NamedTuple):
    """An evaluator, cells per stage, and whether networks are built as the table's."""

    name: str
    cells: int
    whole: bool = False

    def __str__(self) -> str:
        return f"{self.name}, {self.cells} cells per stage{', whole' if self.whole else ''}"

    @property
    def file_name(self) -> str:
        return f"{self.name}-{self.cells}cells{'-whole' if self.whole else ''}"


def parse_entries(text: str) -> list[Entry]:
    """`eproxy:1,nwot:5:whole`. Raises ConfigError."""
    entries = []
    for item in text.split(","):
        found = re.fullmatch(r"([a-z-]+):([1-9][0-9]?)(:whole)?", item.strip())
        if found is None:
            raise ConfigError(f"--entries {item}: expected NAME:CELLS or NAME:CELLS:whole such as eproxy:1")
        entries.append(Entry(found[1], int(found[2]), found[3] is not None))
    return entries


def evaluator_of(entry: Entry, task: ImageTask, seed: int, settings: Json) -> ScoreEvaluator:
    plug_in = pick(EVALUATORS, entry.name, "evaluator")()
    evaluator = plug_in.make(
        space_of(task.image_shape, len(task.classes), entry.cells, entry.whole),
        task,
        parse_settings(plug_in.settings, settings, f"evaluator '{entry.name}'"),
        total_steps=0,
        seed=seed,
        device="cpu",
    )
    if not isinstance(evaluator, ScoreEvaluator):
        raise ConfigError(f"--entries: '{entry.name}' is no score without training")
    return evaluator


def agreement(entry: Entry, loss_N: FloatArray, table: CellTable, rows: IntArray) -> float | None:
    """ρ with the table's own column of this proxy over the cells that have it; None where there is none,
    or where the networks are not the table's."""
    column = table.columns.get(COLUMNS.get(entry.name, ""))
    if column is None or not entry.whole:
        return None
    theirs_N = column[rows].astype(float)
    there = np.isfinite(theirs_N) & (theirs_N > FAILED)
    return spearman(loss_N[there], theirs_N[there]) if there.any() else None


def judge(
    entry: Entry,
    seeds: Sequence[int],
    table: CellTable,
    rows: IntArray,
    task: ImageTask,
    settings: Json,
    work: RunFolder,
    budget_s: float,
    progress: Progress,
) -> Json:
    """One entry's numbers, by seed and their means."""
    archs, truth_N = table.archs(rows), table.truth_R[rows]
    by_seed: list[Json] = []
    for seed in seeds:
        path = work.path(f"{entry.file_name}-seed{seed}.npz")
        evaluator = evaluator_of(entry, task, seed, settings)
        scored = score_kept(evaluator, archs, path, progress, f"{entry}, seed {seed}")
        count = int(budget_s / max(scored.seconds_per_candidate, 1e-9))
        rng = np.random.default_rng([SAMPLE_SEED, seed])
        by_seed.append(
            {
                "seed": seed,
                **rank_quality(scored.loss_N, truth_N),
                "agreement": agreement(entry, scored.loss_N, table, rows),
                "seconds_per_candidate": scored.seconds_per_candidate,
                "failed": scored.failed,
                "looked_at": min(count, len(rows)),
                "best_found": best_found(scored.loss_N, truth_N, max(1, count), rng),
            }
        )
    means = {
        key: None if by_seed[0][key] is None else fmean(record[key] for record in by_seed)
        for key in by_seed[0]
        if key != "seed"
    }
    return {"entry": str(entry), "name": entry.name, **means, "by_seed": by_seed}


def targets_of(results: Sequence[Json]) -> list[Target]:
    targets = [at_least(f"{r['entry']}: ρ", r["rho"], DEFAULT_RHO) for r in results if r["name"] == "eproxy"]
    return targets + [
        at_least(f"{r['entry']}: agrees with the table", r["agreement"], AGREEMENT)
        for r in results
        if r["name"] in ("synflow", "nwot") and r["agreement"] is not None
    ]


def table_of(results: Sequence[Json], budget_s: float) -> str:
    headings = ["proxy", "ρ", "by seed", "ρ in the best tenth", "agrees with the table"]
    headings += ["s per candidate", f"cells in {budget_s:g} s", "best found %"]
    rows = [
        [
            r["entry"],
            f"{r['rho']:.3f}",
            ", ".join(f"{s['rho']:.3f}" for s in r["by_seed"]),
            f"{r['rho_best_tenth']:.3f}",
            "" if r["agreement"] is None else f"{r['agreement']:.3f}",
            f"{r['seconds_per_candidate']:.3g}",
            f"{r['looked_at']:.0f}",
            f"{r['best_found']:.2f}",
        ]
        for r in results
    ]
    return markdown_table(headings, rows)


def arguments() -> Namespace:
    parser = parser_for("proxies_nb201", __doc__, "--table nb201_cifar10.npz --json proxies-nb201.json")
    parser.add_argument("--table", type=Path, required=True)
    parser.add_argument("--data", default="cifar10", help="what the networks look at; default: cifar10")
    parser.add_argument("--work", type=Path, default=Path("exports/proxies-nb201"), metavar="DIR")
    parser.add_argument("--cells", type=int, default=1000, help="how many random cells judge")
    parser.add_argument("--seeds", default="0,1,2", help="of weights, images and targets")
    parser.add_argument("--entries", default=ENTRIES, help=f"default: {ENTRIES}")
    parser.add_argument("--eproxy", type=Path, metavar="FILE", help="a settings file; default: the defaults")
    parser.add_argument("--budget-s", type=float, default=60.0, help="time for the best cell")
    return parser.parse_args()


def main() -> bool:
    asked = arguments()
    start_tuned("proxies_nb201")
    from rich.console import Console

    evidence = Evidence("proxies_nb201")
    progress = progress_for(Console(stderr=True))
    table = load_cells(asked.table)
    entries = parse_entries(asked.entries)
    rows = table.draw(asked.cells, SAMPLE_SEED)
    seeds = [int(seed) for seed in asked.seeds.split(",")]
    task = load_task(asked.data, seed=0, progress=progress)
    work = RunFolder(asked.work)
    tuned = {} if asked.eproxy is None else {"settings_file": str(asked.eproxy)}
    with work.locked():
        results = [
            judge(
                entry,
                seeds,
                table,
                rows,
                task,
                tuned if entry.name == "eproxy" else {},
                work,
                asked.budget_s,
                progress,
            )
            for entry in entries
        ]
    return evidence.finish(
        asked.json,
        seeds=seeds,
        numbers={
            "data": asked.data,
            "cells": asked.cells,
            "sample_seed": SAMPLE_SEED,
            "budget_s": asked.budget_s,
            "eproxy": "defaults" if asked.eproxy is None else str(asked.eproxy),
            "proxies": results,
        },
        targets=targets_of(results),
        table=table_of(results, asked.budget_s),
    )


if __name__ == "__main__":
    run_script(main)
