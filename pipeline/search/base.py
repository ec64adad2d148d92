"""What a method is, and the one loop that drives every method that samples.

Samplers are `init / ask / tell` on an explicit state, a NamedTuple of arrays; `drive` adds the rest: warm-up,
training, counting, candidates, trace, checkpoints. Axes: K tiers, N architectures, S slots, C choices.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.random import Generator

from pipeline.artifacts import sha256_arrays, sha256_json
from pipeline.errors import DivergedTraining
from pipeline.search.bands import BandSampler
from pipeline.search.checkpoint import arrays_of_candidates, candidates_in, labelled, load_own, under
from pipeline.search.problem import STAGE_ASK, STAGE_TELL, STAGE_WARM_UP, SearchProblem
from pipeline.settings import Settings
from pipeline.types import (
    Arch,
    Candidate,
    Checkpoint,
    FloatArray,
    IntArray,
    Json,
    Progress,
    SearchResult,
)

IDLE_LIMIT = 50
"""Iterations in a row without an unknown architecture after which a search on fixed answers has converged."""

RELAXED = "relaxed"
"""What a method needs, and an evaluator offers, that is a `RelaxedEvaluator` as well."""


class SearchMethod(NamedTuple):
    """An entry of the catalogue.

    `run(problem, config, *, checkpoint, trace, progress)` returns a SearchResult; `trace` takes one JSON
    record per iteration. `needs` names what the evaluator must offer beyond the Evaluator protocol.
    `suggests(config)` gives what a run gets where it states nothing else: the name of an `evaluator`,
    settings of the `space`, as far as it has them, `warm_up`, and `evaluations` of each tier. One that
    `warm_starts` begins with what an earlier search liked. `asks(config, K)` is how many architectures one
    that samples asks for in an iteration for K tiers, where the evaluator trains in it."""

    config: type[Settings]
    run: Run
    needs: frozenset[str] = frozenset()
    suggests: Callable[[Any], Json] = lambda config: {}
    warm_starts: bool = False
    asks: Callable[[Any, int], int] = lambda config, num_tiers: num_tiers


class Run(Protocol):
    """Search. Raises DivergedTraining, InfeasibleBudget, ConfigError, StaleArtifact."""

    def __call__(
        self,
        problem: SearchProblem,
        config: Any,
        *,
        checkpoint: Checkpoint,
        trace: Callable[[Json], None],
        progress: Progress,
    ) -> SearchResult: ...


State = TypeVar("State", bound=tuple[Any, ...])


class Sampler(NamedTuple, Generic[State]):
    """A method that asks for architectures and is told their losses. The state is a NamedTuple of arrays.

    `ask` returns rows of choices such that every beginning of them serves the tiers about equally (the last
    iteration may evaluate no more than that). `tell` and `watch` get those rows, their losses (N,), and
    their usage (N, K); `watch` says what of the state and this iteration is worth tracing, in a record per
    tier. `theta_KSC` shows the state's distributions."""

    init: Callable[[], State]
    ask: Callable[[State, Generator], IntArray]
    tell: Callable[[State, IntArray, FloatArray, FloatArray, Generator], State]
    watch: Callable[[State, IntArray, FloatArray, FloatArray], list[Json]] | None = None
    theta_KSC: Callable[[State], FloatArray] | None = None


def drive(
    method: str,
    problem: SearchProblem,
    config: Settings,
    sampler: Sampler[State],
    *,
    checkpoint: Checkpoint,
    trace: Callable[[Json], None],
    progress: Progress,
    bands: BandSampler | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> SearchResult:
    """Run a sampler to the problem's evaluation limit, from the checkpoint if there is one.

    An iteration asks for architectures, takes one optimiser step on `fit_samples` of them if the evaluator
    trains in the search (as many steps as its learning rate is laid out for), evaluates, and tells.
    Architectures are made canonical; one that is asked for twice in an iteration is computed, and counted,
    once. Where answers are fixed, one that is already known is used again and not counted, and the search
    ends early once nothing unknown is asked for. When fewer evaluations are left than an iteration asks for,
    the first of them are made and the sampler is told no more.

    The trace gets one record per iteration; `iteration` counts all optimiser steps from 0, the warm-up's
    included. A checkpoint's record holds `iteration`, the number finished: before resuming, the caller
    drops trace records from there on, and nothing before it is emitted again. The result is the same, bit
    for bit, as an uninterrupted one's (but for `seconds`). Several ranks must be given the same checkpoint,
    of which only one may write. Raises DivergedTraining at a loss that is not finite, and RanksDisagree
    after an iteration that was not the same on all ranks; the last checkpoint stays."""
    run = _Search(method, problem, config, sampler, checkpoint, clock)
    run.resume()
    run.agree([])
    if problem.evaluator.trains:
        bands = bands or BandSampler(problem)
        with progress.track("warm-up", problem.warm_up, min(run.iteration, problem.warm_up)) as advance:
            while run.iteration < problem.warm_up:
                trace(run.warm_up(bands))
                advance(1, "")
                run.save_if_due()
    with progress.track("search", problem.evaluations, run.evaluations) as advance:
        while run.evaluations < problem.evaluations and run.idle < IDLE_LIMIT:
            before = run.evaluations
            trace(run.iterate())
            advance(run.evaluations - before, "")
            run.save_if_due()
    run.save()
    return run.result()


def in_bands(method: str, sampler: Callable[[SearchProblem, Any, BandSampler], Sampler[Any]]) -> Run:
    """The `run` of a method whose sampler, made from (problem, config, bands), begins in the tiers' bands. It
    raises InfeasibleBudget, and what `drive` does."""

    def run(
        problem: SearchProblem,
        config: Any,
        *,
        checkpoint: Checkpoint,
        trace: Callable[[Json], None],
        progress: Progress,
    ) -> SearchResult:
        bands = BandSampler(problem)
        return drive(
            method,
            problem,
            config,
            sampler(problem, config, bands),
            checkpoint=checkpoint,
            trace=trace,
            progress=progress,
            bands=bands,
        )

    return run


class _Search(Generic[State]):
    """The moving parts of one driven search; all of it that must survive is in `save`."""

    def __init__(
        self,
        method: str,
        problem: SearchProblem,
        config: Settings,
        sampler: Sampler[State],
        checkpoint: Checkpoint,
        clock: Callable[[], float],
    ) -> None:
        self.method, self.problem, self.sampler = method, problem, sampler
        self.checkpoint, self.clock = checkpoint, clock
        self.inputs = sha256_json(
            [method, config.model_dump(mode="json"), problem.seed, problem.sizes]
            + [problem.evaluations, problem.warm_up, problem.fit_samples, problem.train_in_search]
            + [tier.to_json() for tier in problem.tiers]
            + [dict(problem.made_from), [[c.arch.choices, c.loss] for c in problem.earlier]]
        )
        self.state: State = sampler.init()
        self.candidates: dict[Arch, Candidate] = {}
        self.iteration = self.evaluations = self.idle = 0
        self.seconds_before, self.started = 0.0, clock()
        self.saved = self.started

    def rng(self, stage: int) -> Generator:
        return np.random.default_rng([self.problem.seed, stage, self.iteration])

    @property
    def seconds(self) -> float:
        return self.seconds_before + self.clock() - self.started

    # ---------------------------------------------------------------------------------------- one iteration

    def warm_up(self, bands: BandSampler) -> Json:
        num = self.problem.fit_samples
        tiers_N = (self.iteration * num + np.arange(num)) % len(self.problem.tiers)
        archs = self.problem.archs(bands.draw_of(tiers_N.tolist(), self.rng(STAGE_WARM_UP)))
        record: Json = {"iteration": self.iteration, "stage": "warm_up", "fit_loss": self._fit(archs)}
        self.iteration += 1
        self.agree(archs)
        return record

    def iterate(self) -> Json:
        choices_NS = self.sampler.ask(self.state, self.rng(STAGE_ASK))
        archs = self.problem.archs(choices_NS)
        record: Json = {"iteration": self.iteration, "stage": "search"}
        planned = self.problem.warm_up + math.ceil(self.problem.evaluations / len(archs))
        if self.problem.evaluator.trains and self.problem.train_in_search and self.iteration < planned:
            # repeats cost no evaluation: there may be more iterations than the learning rate is laid out for
            record["fit_loss"] = self._fit(archs[: self.problem.fit_samples])
        known = self._evaluate(archs)
        record["evaluations"] = self.evaluations
        if len(known) == len(archs):
            losses_N, usage_NK = np.array(known), self.problem.usage_of(choices_NS)
            if self.sampler.watch is not None:
                record["tiers"] = self._watched(choices_NS, losses_N, usage_NK)
            self.state = self.sampler.tell(self.state, choices_NS, losses_N, usage_NK, self.rng(STAGE_TELL))
        self.iteration += 1
        self.agree(archs)
        return record

    def agree(self, samples: Sequence[Arch]) -> None:
        """All that was decided so far is the same on all ranks. Raises RanksDisagree."""
        if self.problem.ranks.size == 1:
            return
        losses = [candidate.loss for candidate in self.candidates.values()]
        digests = {
            "search": self.inputs,
            "samples": sha256_json([arch.choices for arch in samples]),
            "losses": sha256_arrays({"losses": np.array(losses, dtype=float)}),
            "distributions": sha256_arrays(self.state._asdict()),  # type: ignore[attr-defined]
            "progress": sha256_json([self.iteration, self.evaluations, self.idle]),
        }
        self.problem.ranks.agree(f"search step {self.iteration}", digests)

    def _watched(self, choices_NS: IntArray, losses_N: FloatArray, usage_NK: FloatArray) -> list[Json]:
        assert self.sampler.watch is not None
        own = zip(
            self.sampler.watch(self.state, choices_NS, losses_N, usage_NK), self.problem.tiers, strict=True
        )
        return [{"tier": tier.key, **record} for record, tier in own]

    def _fit(self, archs: Sequence[Arch]) -> float:
        info = self.problem.evaluator.fit(archs, step=self.iteration)
        if not math.isfinite(info.loss):
            raise self._diverged("training loss", info.loss, archs)
        return info.loss

    def _evaluate(self, archs: Sequence[Arch]) -> list[float]:
        """Losses of the architectures, or of the first of them when evaluations run out; candidates are
        kept."""
        evaluator = self.problem.evaluator
        fixed = self.problem.answers_are_fixed
        new = [arch for arch in dict.fromkeys(archs) if not (fixed and arch in self.candidates)]
        new = new[: self.problem.evaluations - self.evaluations]
        losses = {arch: self.candidates[arch].loss for arch in archs if fixed and arch in self.candidates}
        if new:
            losses |= dict(
                zip(
                    new,
                    evaluator.losses(new, step=self._evaluation_step)[:, 0].astype(float).tolist(),
                    strict=True,
                )
            )
        for arch in new:
            if not math.isfinite(losses[arch]):
                raise self._diverged("loss", losses[arch], [arch])
            seen = self.candidates[arch].evaluations if arch in self.candidates else 0
            self.candidates[arch] = Candidate(arch, losses[arch], seen + 1)
        self.evaluations += len(new)
        self.idle = 0 if new else self.idle + 1
        return [losses[arch] for arch in archs] if all(arch in losses for arch in archs) else []

    @property
    def _evaluation_step(self) -> int:
        """A frozen supernet is asked on the same images every time."""
        return self.problem.warm_up if self.problem.is_frozen else self.iteration

    def _diverged(self, what: str, value: float, archs: Sequence[Arch]) -> DivergedTraining:
        names = ", ".join(f"{arch.space}{list(arch.choices)}" for arch in archs)
        return DivergedTraining(
            f"search step {self.iteration}: {what} of {names} is {value}; the last checkpoint is kept: "
            "lower the learning rate, or look for broken images"
        )

    # ------------------------------------------------------------------------------------------ checkpoints

    def save_if_due(self) -> None:
        if self.clock() - self.saved >= self.problem.save_every_s:
            self.save()

    def save(self) -> None:
        arrays = arrays_of_candidates(self.candidates.values(), len(self.problem.sizes))
        arrays |= labelled("sampler.", self.state._asdict())  # type: ignore[attr-defined]
        arrays |= labelled("evaluator.", self.problem.evaluator.state())
        record: Json = {
            name: getattr(self, name) for name in ("method", "inputs", "iteration", "evaluations", "idle")
        }
        self.checkpoint.save(arrays, {**record, "seconds": self.seconds})
        self.saved = self.clock()

    def resume(self) -> None:
        loaded = load_own(self.checkpoint, self.method, self.inputs)
        if loaded is None:
            return
        arrays, record = loaded
        self.state = type(self.state)(**under("sampler.", arrays))
        self.problem.evaluator.load_state(under("evaluator.", arrays))
        self.candidates = candidates_in(arrays, self.problem.space.name)
        self.iteration, self.evaluations = int(record["iteration"]), int(record["evaluations"])
        self.idle, self.seconds_before = int(record["idle"]), float(record["seconds"])

    def result(self) -> SearchResult:
        return SearchResult(
            method=self.method,
            seed=self.problem.seed,
            evaluations=self.evaluations,
            seconds=self.seconds,
            candidates=tuple(self.candidates.values()),
            theta_KSC=None if self.sampler.theta_KSC is None else self.sampler.theta_KSC(self.state),
        )
