"""One architecture per tier, timed on the device and tried briefly."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, cast

import numpy as np

from pipeline.artifacts import FileCheckpoint
from pipeline.costs.budgets import usage_of_budgets
from pipeline.costs.table import LATENCY, CautiousCosts
from pipeline.derive import Deriver, Remembered, Usage
from pipeline.engine import Engine
from pipeline.errors import BudgetMissed, InfeasibleBudget
from pipeline.run import Clock, Run
from pipeline.search.nearest import Nearest, drawn_beside
from pipeline.spaces.base import RelaxedSpace
from pipeline.stages.finalists import contender_path, contender_recipe, trial_path, trial_recipe
from pipeline.stages.jobs import Jobs, engine_for
from pipeline.stages.lineage import current_record, inputs_of_recipe, inputs_of_tier, inputs_of_training
from pipeline.stages.misses import misses_of, misses_path, stricter
from pipeline.stages.networks import searched_evaluator, train_into, train_network
from pipeline.stages.records import (
    chosen_tiers,
    evaluator_path,
    search_path,
    search_record,
    write_record,
)
from pipeline.types import Arch, CostTable, Json, Tier


def derive_stage(run: Run, only: str | None = None) -> None:
    tiers = chosen_tiers(run, only)
    waiting = [t for t in tiers if current_record(run, t, "derive") is None]
    if not waiting:
        return
    ranker_of, pool = _rankers(run), _candidate_pool(run)
    with engine_for(run, __name__, JOBS, _read_by_training) as engine:
        for tier in waiting:
            rng = np.random.default_rng([run.config.seed, 102, run.tiers.index(tier)])
            aim = stricter(run, tier)
            work = _Work(engine)
            deriver = _deriver(run, aim, ranker_of(tier), work)
            with _telling_misses(run, tier):
                arch, timed, trials = deriver.derive(pool, _predicted_usage(run, aim), rng)
            record = {
                "arch": arch.to_json(),
                "key": arch.key,
                "description": run.space.describe(arch),
                "predicted": _predicted(run, tier, arch),
                "timed": None if timed is None else asdict(timed),
                "trials": [trial.to_json() for trial in trials],
                "seconds": work.clock(),
                "trained_seconds": round(work.trained_s, 3),
            }
            write_record(run, tier, "derive", record, inputs_of_tier(run, tier, "derive"))


def _rankers(run: Run) -> Callable[[Tier], Remembered]:
    """Who orders a tier's architectures: the evaluator as the search left it, or the tier's last mixture."""
    mixes = search_record(run)["mixes"]
    if mixes is None:
        shared = Remembered(searched_evaluator(run), run.progress)
        return lambda tier: shared
    space = cast(RelaxedSpace, run.space)
    return lambda tier: Remembered(Nearest(space, np.array(mixes[run.tiers.index(tier)])), run.progress)


@contextmanager
def _telling_misses(run: Run, tier: Tier) -> Iterator[None]:
    """An error tells why the budget was meant to be smaller than it is."""
    try:
        yield
    except (InfeasibleBudget, BudgetMissed) as unkept:
        misses = misses_of(run, tier)
        if not misses:
            raise
        raise type(unkept)(
            f"{unkept}; finished networks of this tier took more than they were chosen for, so its budget "
            f"was taken for smaller: remove {misses_path(run, tier)} to forget that"
        ) from None


class _Work:
    """What a tier takes. Trainings keep their own seconds, whatever interrupts them and however many run side
    by side; the clock stands still meanwhile."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.clock, self.trained_s = engine, Clock(), 0.0

    def accuracies(self, what: str, jobs: Sequence[Json], steps_each: int) -> list[float]:
        """Of trainings, side by side."""
        with self.clock.standing_still():
            answers = self.engine.map(what, jobs, steps_each)
        self.trained_s += sum(answer["seconds"] for answer in answers)
        return [answer["accuracy"] for answer in answers]


def _deriver(run: Run, tier: Tier, ranker: Remembered, work: _Work) -> Deriver:
    def refit(archs: Sequence[Arch], measured_ms: Sequence[float]) -> Usage:
        model = run.costs[tier.device].latency
        assert model is not None
        better = run.costs[tier.device].with_latency(model.with_measurements(run.space, archs, measured_ms))
        return _timed_usage(better, tier)

    def try_accuracies(archs: Sequence[Arch]) -> list[float]:
        jobs = [{"do": "trial", "tier": tier.key, "arch": arch.to_json()} for arch in archs]
        steps = trial_recipe(run).steps(len(run.task.splits["weights"]))
        return work.accuracies(f"trials for {tier.key}", jobs, steps)

    def train_accuracies(archs: Sequence[Arch]) -> list[float]:
        jobs = [{"do": "contender", "tier": tier.key, "arch": arch.to_json()} for arch in archs]
        steps = run.config.retrain.steps(len(run.task.splits["weights"]))
        return work.accuracies(f"contenders for {tier.key}", jobs, steps)

    timed = _can_be_timed(run, tier)
    return Deriver(
        tier=tier,
        space=run.space,
        settings=run.config.derive.below_guard() if timed else run.config.derive,
        ranker=ranker,
        uniform=frozenset(run.space.uniform()),
        device=run.bench(run.profile(tier.device)) if timed else None,
        counted=_usage_within(run.costs[tier.device], tier, lambda metric: metric != LATENCY),
        refit=refit,
        try_accuracies=try_accuracies if run.config.epochs_of_trials > 0 else None,
        train_accuracies=train_accuracies,
        say=run.progress.say,
    )


def _can_be_timed(run: Run, tier: Tier) -> bool:
    return LATENCY in tier.budgets and not run.profile(tier.device).elsewhere


def _predicted_usage(run: Run, tier: Tier) -> Usage:
    """Share of the timed budget. What cannot be timed now, since its device is elsewhere, is predicted with
    a margin: only the files that ship make that journey."""
    costs, profile = run.costs[tier.device], run.profile(tier.device)
    if LATENCY in tier.budgets and profile.elsewhere:
        return _timed_usage(CautiousCosts(costs, run.bench(profile).kept_ms()), tier)
    return _timed_usage(costs, tier)


def _timed_usage(costs: CostTable, tier: Tier) -> Usage:
    return _usage_within(costs, tier, lambda metric: metric == LATENCY)


def _usage_within(costs: CostTable, tier: Tier, counts: Callable[[str], bool]) -> Usage:
    """Share of those budgets alone; 0 where there is none."""
    limits = tuple(limit for limit in tier.limits if counts(limit.metric))
    if not limits:
        return lambda archs: np.zeros(len(archs))
    return partial(usage_of_budgets, costs, replace(tier, limits=limits))


def _candidate_pool(run: Run) -> list[Arch]:
    """What the search has seen, the best first, in turn with what its distributions or mixtures would draw;
    then the uniform members. Of a band with more than can be looked at the first are."""
    record = search_record(run)
    name, settings = run.space.name, run.config.derive
    seen = [Arch(name, tuple(choices)) for choices, _, _ in sorted(record["candidates"], key=itemgetter(1))]
    rng = np.random.default_rng([run.config.seed, 101])
    drawn: list[Arch] = []
    for mix_EO in record["mixes"] or []:
        drawn += drawn_beside(cast(RelaxedSpace, run.space), np.array(mix_EO), settings.samples, rng)
    for theta_SC in [] if record["mixes"] else record["theta"] or []:
        columns = [
            rng.choice(len(slot.choices), size=settings.samples, p=_simplex(theta_C[: len(slot.choices)]))
            for slot, theta_C in zip(run.space.slots, theta_SC, strict=True)
        ]
        drawn += [Arch(name, tuple(row)) for row in np.stack(columns, axis=1).tolist()]
    in_turn = itertools.chain.from_iterable(itertools.zip_longest(seen, drawn))
    pool = [*(arch for arch in in_turn if arch is not None), *run.space.uniform()]
    return list(dict.fromkeys(run.space.canonical(arch) for arch in pool))


def _simplex(weights: Sequence[float]) -> Any:
    share = np.asarray(weights, dtype=float)
    return share / share.sum()


def _predicted(run: Run, tier: Tier, arch: Arch) -> Json:
    table = run.costs[tier.device]
    return dict(zip(table.metrics, table.of([arch])[0].tolist(), strict=True))


def try_one(run: Run, job: Json) -> Json:
    """Accuracy on the architecture split after a brief training; kept on disk, so that it is paid for
    once."""
    arch, recipe = Arch.from_json(job["arch"]), trial_recipe(run)
    inputs, path = inputs_of_recipe(run, recipe), trial_path(run, arch)
    record = run.folder.read_record(path, inputs)
    if record is None:
        checkpoint = FileCheckpoint(path.with_suffix(".npz"))
        label = f"trial for {job['tier']}"
        _, trained = train_network(run, arch, recipe, checkpoint=checkpoint, label=label)
        record = {"arch": arch.to_json(), "accuracy": trained.accuracy / 100, "seconds": trained.seconds}
        run.folder.write_record(path, record, inputs)
        checkpoint.remove()
    return {"accuracy": float(record["accuracy"]), "seconds": float(record["seconds"])}


def train_contender(run: Run, job: Json) -> Json:
    """Accuracy on the architecture split after full training; record and weights are kept on disk, where the
    tier that the architecture is chosen for finds them."""
    arch, recipe = Arch.from_json(job["arch"]), contender_recipe(run)
    inputs = inputs_of_training(run, arch, recipe)
    path = contender_path(run, inputs)
    record = run.folder.read_record(path, inputs)
    if record is None:
        checkpoint = FileCheckpoint(path.with_suffix(".npz"))
        label = f"contender for {job['tier']}"
        weights = path.with_suffix(".safetensors")
        record = train_into(weights, run, arch, recipe, checkpoint=checkpoint, label=label)
        run.folder.write_record(path, record, inputs)
        checkpoint.remove()
    return {"accuracy": float(record["accuracy"]) / 100, "seconds": float(record["seconds"])}


JOBS: Jobs = {"trial": try_one, "contender": train_contender}


def _read_by_training(run: Run, job: Json) -> list[Path]:
    arch, is_trial = Arch.from_json(job["arch"]), job["do"] == "trial"
    recipe = trial_recipe(run) if is_trial else contender_recipe(run)
    full = inputs_of_training(run, arch, recipe)
    kept = trial_path(run, arch) if is_trial else contender_path(run, full)
    reads = [kept, kept.with_suffix(".npz")]
    if recipe.start == "supernet":
        reads += [search_path(run), evaluator_path(run)]
    return reads
