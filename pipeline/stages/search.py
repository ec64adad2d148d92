"""One search for all tiers of all devices."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np

from pipeline.artifacts import FileCheckpoint, sha256_json, write_arrays
from pipeline.evaluators.spread import over_ranks
from pipeline.ranks import SharedCheckpoint
from pipeline.run import Run, TraceFile
from pipeline.search import METHODS
from pipeline.search.problem import SearchProblem
from pipeline.stages.lineage import inputs_of_evaluations, inputs_of_search
from pipeline.stages.networks import fresh_evaluator
from pipeline.stages.records import (
    copied_earlier,
    earlier_path,
    earlier_search,
    evaluator_path,
    search_path,
    trace_path,
)
from pipeline.types import Arch, Candidate


def search_stage(run: Run) -> None:
    path = search_path(run)
    config, inputs = run.config, inputs_of_search(run)
    run.ranks.agree("search", inputs)
    if run.folder.read_record(path, inputs) is not None:
        return
    problem = search_problem(run, _earlier(run))
    method = METHODS[config.method.name]
    checkpoint = FileCheckpoint(run.folder.path("search", "state.npz"))
    trace = TraceFile(trace_path(run), checkpoint)
    result = method.run(
        problem,
        config.method.settings,
        checkpoint=SharedCheckpoint(checkpoint, run.ranks),
        trace=trace.write,
        progress=run.progress,
    )
    mixes_KEO = result.mixes_KEO
    if mixes_KEO is None:  # else what was learnt was for mixtures, and judges no architecture
        write_arrays(evaluator_path(run), problem.evaluator.state())
    run.folder.write_record(
        path,
        {
            "method": result.method,
            "seed": result.seed,
            "evaluations": result.evaluations,
            "seconds": round(result.seconds, 3),
            "candidates": [[list(c.arch.choices), c.loss, c.evaluations] for c in result.candidates],
            "theta": None if result.theta_KSC is None else np.round(result.theta_KSC, 6).tolist(),
            "mixes": None if mixes_KEO is None else np.round(mixes_KEO, 6).tolist(),
        },
        inputs,
    )
    checkpoint.remove()


def _earlier(run: Run) -> tuple[Candidate, ...]:
    """What the run named by `search.start_from` looked at. It is read once, and kept beside this search, so
    that the other folder may go. Raises RunFolderError where that has not searched, ConfigError where it
    searched another space."""
    if run.config.search.start_from is None:
        return ()
    path = earlier_path(run)
    if run.ranks.rank == 0 and copied_earlier(run) is None:
        _copy_earlier(run, path)
    content = run.ranks.from_first(path.read_bytes() if run.ranks.rank == 0 else b"")
    return tuple(
        Candidate(Arch(run.space.name, tuple(choices)), loss)
        for choices, loss in json.loads(content)["candidates"]
    )


def _copy_earlier(run: Run, path: Path) -> None:
    found = earlier_search(run)
    candidates = [[choices, loss] for choices, loss, _ in found["candidates"]]
    start_from = sha256_json(run.config.search.start_from)
    inputs = {"space": run.input_hashes["space"], "start_from": start_from}
    run.folder.write_record(path, {"candidates": candidates}, inputs)


def search_problem(run: Run, earlier: tuple[Candidate, ...] = ()) -> SearchProblem:
    search, tiers = run.config.search, run.tiers
    fit_samples = search.fit_samples or len(tiers)
    evaluator = over_ranks(fresh_evaluator(run), run.ranks, partial(_macs, run))
    if evaluator.trains and fit_samples < run.ranks.size:
        run.progress.say(
            f"search: a step trains {fit_samples} architectures, so {run.ranks.size - fit_samples} of "
            f"{run.ranks.size} ranks wait; with search.fit_samples={run.ranks.size} they would not"
        )
    return SearchProblem(
        space=run.space,
        costs=run.costs,
        tiers=tiers,
        evaluator=evaluator,
        evaluations=search.evaluations,
        warm_up=search.warm_up,
        fit_samples=fit_samples,
        train_in_search=search.train_in_search,
        seed=run.config.seed,
        made_from=inputs_of_evaluations(run),
        earlier=earlier,
        ranks=run.ranks,
    )


def _macs(run: Run, arch: Arch) -> float:
    return sum(layer.macs for layer in run.space.layers(arch))
