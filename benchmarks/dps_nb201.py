"""What tuning eproxy on twenty known cells of NAS-Bench-201 is worth on cells that it never saw.

    python -m benchmarks.dps_nb201 --table nb201_cifar10.npz --json FILE [--draws N]

Each draw takes 20 random connected cells with their 200-epoch test accuracy, searches eproxy's settings
on all of them (`pipeline.evaluators.dps`, nothing held back), and judges the settings found by
Spearman's ρ over other random cells, which are the same for all draws and isomorphic to none of theirs.
Four ways: the default settings and the vote of the tuned ones, each alone and with `jacov` for half of
the vote; the last is the answer of `budgetline dps`. What they vote with is standardised on the twenty.
The 60 cells that chose the defaults are in no part, and the 200 that chose jacov's share (`draw(200, 77)`
of what ten draws and their 1,000 judges leave) judge nothing. Networks have --cells-per-stage cells per
stage, 1 by default; the table trained 5. Every evaluation and every score is kept in the work folder: the
same command goes on where it stopped, and `--only DRAW` does one draw, in a process beside others.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from benchmarks.nb201_cells import (
    SAMPLE_SEED,
    CellTable,
    Scored,
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
from pipeline.artifacts import FileCheckpoint, RunFolder, sha256_json, write_yaml
from pipeline.data import load_task
from pipeline.data.base import ImageTask
from pipeline.evaluators.dps import (
    DpsResult,
    DpsSettings,
    Judge,
    search_settings,
    settings_record,
    with_jacov,
)
from pipeline.evaluators.eproxy import EproxySettings, joined, make_eproxy, standard_of, standardised
from pipeline.evaluators.known import Known
from pipeline.evaluators.proxies import make_jacov
from pipeline.evaluators.scores import ImageScoreSettings
from pipeline.spaces.nb201 import NB201Space
from pipeline.types import Arch, FloatArray, IntArray, Json, Progress
from pipeline.ui import progress_for

DRAW_SEED = 2
TUNED_RHO = 0.88


def known_cells(table: CellTable, rows: IntArray) -> list[Known]:
    """The cells as a user would know them; those that build the same network once."""
    space = NB201Space((3, 32, 32), 10)
    truth: dict[Arch, float] = {}
    for arch, row in zip(table.archs(rows), rows.tolist(), strict=True):
        truth.setdefault(space.canonical(arch), float(table.truth_R[row]))
    return [Known(arch, accuracy) for arch, accuracy in truth.items()]


def search_draw(
    draw: int,
    known: list[Known],
    space: NB201Space,
    task: ImageTask,
    settings: DpsSettings,
    work: RunFolder,
    progress: Progress,
    device: str,
) -> DpsResult:
    """The draw's search, or what it came to before."""
    path = work.path("search.json")
    facts = [[k.arch.to_json(), k.accuracy] for k in known]
    inputs = {
        "space": sha256_json(space.fingerprint()),
        "images": task.fingerprint,
        "search": sha256_json([facts, settings.model_dump(mode="json", exclude={"jacov"}), draw, device]),
    }
    record = work.read_record(path, inputs)
    if record is None:
        assert not settings.jacov, "votes afterwards, here, so that the tuned ones are seen alone"
        checkpoint = FileCheckpoint(path.with_suffix(".npz"))
        progress.say(f"draw {draw}: searching on {len(known)} cells")
        result = search_settings(
            space,
            task,
            known,
            settings,
            EproxySettings(),
            seed=draw,
            checkpoint=checkpoint,
            progress=progress,
            device=device,
        )
        write_yaml(path.with_suffix(".yaml"), settings_record(result.settings))
        work.write_record(path, result.to_json(), inputs)
        checkpoint.remove()
        return result
    return DpsResult.from_json(record)


class Judged:
    """The judging cells' scores of one draw, each asked for once."""

    def __init__(
        self,
        cells: tuple[list[Arch], FloatArray],
        space: NB201Space,
        task: ImageTask,
        seed: int,
        device: str,
        work: RunFolder,
        progress: Progress,
    ) -> None:
        self._archs, self._truth_N = cells
        self._space, self._task, self._seed, self._device = space, task, seed, device
        self._work, self._progress = work, progress

    def eproxy(self, settings: EproxySettings, label: str) -> Scored:
        key = sha256_json([settings_record(settings), self._seed, self._device])[:16]
        return self._kept(make_eproxy, settings, f"judged-{key}.npz", label)

    def correlation(self, settings: ImageScoreSettings) -> Scored:
        """As `Correlation`, on as many images."""
        found = self._kept(make_jacov, settings, f"jacov-{settings.batch_size}-{self._seed}.npz", "jacov")
        return replace(found, loss_N=found.loss_N - settings.batch_size)

    def quality(self, loss_N: FloatArray) -> Json:
        return rank_quality(loss_N, self._truth_N)

    def _kept(self, make: Any, settings: ImageScoreSettings, name: str, label: str) -> Scored:
        evaluator = make(
            self._space, self._task, settings, total_steps=0, seed=self._seed, device=self._device
        )
        path = self._work.path(name)
        return score_kept(evaluator, self._archs, path, self._progress, f"draw {self._seed}: {label}")


def judge_draw(
    found: DpsResult, known: list[Known], base: EproxySettings, judge: Judge, judged: Judged
) -> Json:
    """ρ of the four ways, and what a candidate takes; `base` are the default settings."""
    archs = [k.arch for k in known]
    tuned, default = judged.eproxy(found.settings, "judging tuned"), judged.eproxy(base, "judging default")
    correlation = judged.correlation(ImageScoreSettings(batch_size=base.batch_size))
    standard = with_jacov(found.settings, judge.correlations(archs)).jacov
    assert standard is not None
    default_standard = standard_of(judge.scores(base, archs).tolist())
    default_vote_N = np.array([standardised(loss, default_standard) for loss in default.loss_N.tolist()])

    def with_its_vote(vote_N: FloatArray) -> FloatArray:
        pairs = zip(vote_N.tolist(), correlation.loss_N.tolist(), strict=True)
        return np.array([joined(vote, found, standard) for vote, found in pairs])

    return {
        "default": judged.quality(default.loss_N),
        "default_jacov": judged.quality(with_its_vote(default_vote_N)),
        "tuned": judged.quality(tuned.loss_N),
        "answer": judged.quality(with_its_vote(tuned.loss_N)),
        "seconds_per_candidate": tuned.seconds_per_candidate + correlation.seconds_per_candidate,
        "failed": tuned.failed + default.failed + correlation.failed,
    }


WAYS = {
    "default": "default",
    "default_jacov": "default, jacov",
    "tuned": "tuned",
    "answer": "tuned, jacov",
}


def targets_of(draws: list[Json]) -> list[Target]:
    rho = fmean(draw["answer"]["rho"] for draw in draws)
    return [at_least(f"mean ρ of {len(draws)} draws after tuning", rho, TUNED_RHO)]


def table_of(draws: list[Json]) -> str:
    headings = ["draw", "ρ searched on", *(f"ρ {name}" for name in WAYS.values())]
    headings += ["best tenth, default", "best tenth, answer", "s per candidate", "search s"]
    columns = [
        [
            draw["search_rho"],
            *(draw[way]["rho"] for way in WAYS),
            draw["default"]["rho_best_tenth"],
            draw["answer"]["rho_best_tenth"],
            draw["seconds_per_candidate"],
            draw["seconds"],
        ]
        for draw in draws
    ]

    def row(name: str, numbers: list[float]) -> list[str]:
        *rhos, per_candidate, search_s = numbers
        return [name, *(f"{rho:.3f}" for rho in rhos), f"{per_candidate:.3g}", f"{search_s:.0f}"]

    means = [fmean(column) for column in zip(*columns, strict=True)]
    rows = [row(str(draw["draw"]), numbers) for draw, numbers in zip(draws, columns, strict=True)]
    return markdown_table(headings, [*rows, row("mean", means)])


def arguments() -> Namespace:
    parser = parser_for("dps_nb201", __doc__, "--table nb201_cifar10.npz --json dps-nb201.json")
    parser.add_argument("--table", type=Path, required=True)
    parser.add_argument("--data", default="cifar10", help="what the networks look at; default: cifar10")
    parser.add_argument("--work", type=Path, default=Path("exports/dps-nb201"), metavar="DIR")
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument(
        "--only", type=int, metavar="DRAW", help="this one alone, so that several processes share the work"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--known", type=int, default=20, help="cells of known accuracy per draw")
    parser.add_argument("--judged", type=int, default=1000, help="other cells that judge")
    parser.add_argument("--cells-per-stage", type=int, default=1)
    parser.add_argument("--evaluations", type=int, default=DpsSettings().evaluations)
    parser.add_argument("--members", type=int, default=DpsSettings().members, help="1: as published")
    parser.add_argument("--max-channels", type=int, default=DpsSettings().max_channels)
    return parser.parse_args()


def main() -> bool:
    asked = arguments()
    start_tuned("dps_nb201")
    from rich.console import Console

    evidence = Evidence("dps_nb201")
    progress = progress_for(Console(stderr=True))
    table = load_cells(asked.table)
    task = load_task(asked.data, seed=0, progress=progress)
    space = space_of(task.image_shape, len(task.classes), asked.cells_per_stage)
    known_rows = [table.draw(asked.known, DRAW_SEED, draw) for draw in range(asked.draws)]
    judging_rows = table.draw(asked.judged, SAMPLE_SEED, without=np.concatenate(known_rows))
    settings = DpsSettings(
        held_back=0.0,
        evaluations=asked.evaluations,
        members=asked.members,
        jacov=False,
        max_channels=asked.max_channels,
    )
    cells = table.archs(judging_rows), table.truth_R[judging_rows]
    draws: list[Json] = []
    for draw in range(asked.draws) if asked.only is None else [asked.only]:
        work, known = RunFolder(asked.work / f"draw{draw}"), known_cells(table, known_rows[draw])
        base = EproxySettings()
        judge = Judge(space, task, base, seed=draw, device=asked.device)
        judged = Judged(cells, space, task, draw, asked.device, work, progress)
        with work.locked():
            found = search_draw(draw, known, space, task, settings, work, progress, asked.device)
            draws.append({"draw": draw, **found.to_json(), **judge_draw(found, known, base, judge, judged)})
    return evidence.finish(
        asked.json,
        seeds=[int(draw["draw"]) for draw in draws],
        numbers={
            "data": asked.data,
            "known": asked.known,
            "judged": asked.judged,
            "cells_per_stage": asked.cells_per_stage,
            "search": settings.model_dump(mode="json"),
            "draws": draws,
        },
        targets=targets_of(draws),
        table=table_of(draws),
    )


if __name__ == "__main__":
    run_script(main)
