"""All tiers in one search by `importance`, beside a search per tier by `asng`, on real images.

RUN has one device with K tiers that can be counted, and states `search.fit_samples`. Per seed:

1. `together`: a supernet trained in the bands of all tiers, then E evaluations by `importance`. `alone`, per
   tier: a supernet of its own, trained in the tier's band by as many steps of as many paths, then E/K
   evaluations by `asng`. Nothing but a search's own evaluations is looked at: of what keeps a tier's budget,
   the eight best are asked about thoroughly and the best of those is trained by RUN's recipe, which is the
   same on both sides.
2. On the weights of `together`, which say the same whenever they are asked: what other searches find with as
   many evaluations (`asng` per tier with six times as many), so that the method is told from the sharing.
   And how many evaluations a search for one tier by `asng` needs to find what `together` has found for that
   tier: its wall time is that of `alone`'s warm-up and of so many evaluations.
3. How the losses by the weights of `together` rank the networks of `benchmarks/truth_mbconv.csv`, which
   were trained alone, within their bands.

Everything is kept in WORK: the same command goes on where it stopped. Run it on a machine that does nothing
else: seconds are compared.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np
from scipy import stats

from benchmarks.ranking import TABLE, WANTED_RHO, Band, judged, known_bands
from benchmarks.record import (
    Evidence,
    Target,
    at_least,
    at_most,
    markdown_table,
    none_of,
    parser_for,
    run_script,
    start_tuned,
    whole_numbers,
)
from benchmarks.rivals import SEARCHED, Entrant, Gym, comparable_recipe
from benchmarks.timed import Timed
from pipeline.artifacts import FileCheckpoint, RunFolder, read_arrays, sha256_file, sha256_json, write_arrays
from pipeline.config import parse, read_config
from pipeline.costs.budgets import usage_of_budgets
from pipeline.errors import ConfigError
from pipeline.progress import NoCheckpoint
from pipeline.run import Run, prepare_compute
from pipeline.search import METHODS
from pipeline.search.problem import SearchProblem
from pipeline.stages.networks import fresh_evaluator
from pipeline.stages.profile import profile_stage
from pipeline.types import Arch, Arrays, Candidate, Evaluator, FitInfo, FloatArray, Json, Progress, Tier
from pipeline.ui import progress_for

RUN = Path(__file__).with_name("search_one_shot.yaml")
TOGETHER = "together"
WALL_LIMIT = 1.3
TOLERATED_POINTS = 0.3
LOOKS = 8
"""Of a tier's best evaluations, that are asked about thoroughly."""
ASNG_FACTOR = 6
SHARES = (0.25, 0.5, 1.0)
"""Of the evaluations, after which searches on the same weights are compared."""


class Arm(NamedTuple):
    """A search on the weights of `together`."""

    method: str
    settings: Json
    per_tier: bool
    factor: int = 1


ARMS = {
    TOGETHER: Arm("importance", {}, per_tier=False),
    "the same, guide: weights": Arm("importance", {"guide": "weights"}, per_tier=False),
    "importance per tier": Arm("importance", {}, per_tier=True),
    "asng per tier": Arm("asng", {}, per_tier=True, factor=ASNG_FACTOR),
}
ASNG = "asng per tier"


# ------------------------------------------------------------------------------------------------ evaluators


class Known:
    """An evaluator that learns no more, asked about each architecture once, on the images of one step."""

    trains = noisy = True  # a supernet's, as a search sees it that does not train it

    def __init__(self, inner: Evaluator, step: int) -> None:
        self._inner, self._step = inner, step
        self._losses: dict[Arch, float] = {}

    def losses(self, archs: Sequence[Arch], *, step: int, thorough: bool = False) -> FloatArray:
        unknown = [arch for arch in dict.fromkeys(archs) if arch not in self._losses]
        if unknown:
            found = self._inner.losses(unknown, step=self._step)[:, 0].tolist()
            self._losses |= dict(zip(unknown, found, strict=True))
        return np.array([[self._losses[arch]] for arch in archs])

    def fit(self, archs: Sequence[Arch], *, step: int) -> FitInfo:
        raise AssertionError("its weights stay as they are")

    def state(self) -> Arrays:
        return {}

    def load_state(self, state: Arrays) -> None:
        pass


# -------------------------------------------------------------------------------------------------- searches


@dataclass(frozen=True)
class Course:
    """What a search evaluated, in order: losses (N,), and the share of each tier's budget that it takes
    (N, K)."""

    archs: tuple[Arch, ...]
    loss_N: FloatArray
    usage_NK: FloatArray

    def best(self, k: int, count: int | None = None) -> float:
        """The least loss within tier k's budget among the first `count`; inf where none keeps it."""
        keeps_N = self.usage_NK[:count, k] <= 1
        return float(np.where(keeps_N, self.loss_N[:count], np.inf).min(initial=np.inf))

    def first_as_good(self, k: int, loss: float) -> int | None:
        """Evaluations until tier k had such a loss within its budget."""
        reached = np.flatnonzero((self.loss_N <= loss) & (self.usage_NK[:, k] <= 1))
        return int(reached[0]) + 1 if len(reached) else None

    def leaders(self, k: int, count: int) -> list[Arch]:
        """Those of the least losses within tier k's budget, the best first."""
        keeping = np.flatnonzero(self.usage_NK[:, k] <= 1)
        return [self.archs[i] for i in keeping[np.argsort(self.loss_N[keeping], kind="stable")][:count]]


@dataclass(frozen=True)
class Seed:
    """The searches of one seed, kept in the work folder."""

    run: Run
    work: RunFolder
    seed: int

    @property
    def tiers(self) -> tuple[Tier, ...]:
        return self.run.tiers

    @property
    def each(self) -> int:
        """Evaluations of a search for one tier."""
        return self.run.config.search.evaluations // len(self.tiers)

    @cached_property
    def _gym(self) -> Gym:
        return Gym(self.run, self.work, comparable_recipe(self.run.config.retrain, None))

    def together(self) -> Json:
        return self._trained(TOGETHER, self.tiers, "importance", self.run.config.search.evaluations)

    def alone(self, tier: Tier) -> Json:
        return self._trained(f"alone-{tier.name}", (tier,), "asng", self.each)

    def _trained(self, name: str, tiers: tuple[Tier, ...], method: str, evaluations: int) -> Json:
        """A search with a supernet of its own, and per tier the accuracy of what it chose."""
        record = self._searched(name, tiers, method, evaluations)
        for tier, found in zip(tiers, record["tiers"], strict=True):
            if found["arch"] is not None:
                entrant = Entrant(SEARCHED, float("nan"), Arch.from_json(found["arch"]))
                known = self._gym.known(entrant, self.seed)
                label = f"seed {self.seed}, {name}: {tier.name}"
                found["trained"] = known or self._gym.train(entrant, self.seed, label)
        return record

    def _searched(self, name: str, tiers: tuple[Tier, ...], method: str, evaluations: int) -> Json:
        path, inputs = self._path(f"{name}.json"), self._inputs(tiers, method, {}, evaluations)
        record = self.work.read_record(path, inputs)
        if record is not None:
            return record
        self.run.progress.say(f"seed {self.seed}: {name}")
        checkpoint = FileCheckpoint(self._path(f"{name}-state.npz"))
        evaluator = fresh_evaluator(self.run)
        timed = Timed(evaluator)
        problem = self._problem(tiers, timed, evaluations, self.run.config.search.warm_up, inputs)
        result = METHODS[method].run(
            problem,
            METHODS[method].config(),
            checkpoint=checkpoint,
            trace=lambda record: None,
            progress=self.run.progress,
        )
        course = self._course(result.candidates)
        record = {
            "seconds": round(result.seconds, 2),
            "fit_seconds": round(timed.fit_s, 2),
            "seconds_per_evaluation": timed.losses_s / result.evaluations,
            "evaluations": result.evaluations,
            "tiers": [self._chosen(course, tier, evaluator) for tier in tiers],
            "course": _to_json(course),
        }
        if name == TOGETHER:
            write_arrays(self._path(f"{TOGETHER}.npz"), evaluator.state())
        self.work.write_record(path, record, inputs)
        checkpoint.remove()
        return record

    def _chosen(self, course: Course, tier: Tier, evaluator: Evaluator) -> Json:
        """The best of a tier's leaders by the most exact answer; none where nothing keeps the budget."""
        leaders = course.leaders(self.tiers.index(tier), LOOKS)
        if not leaders:
            return {"tier": tier.name, "arch": None, "usage": None}
        loss_N = evaluator.losses(leaders, step=0, thorough=True)[:, 0]
        arch = leaders[int(loss_N.argmin())]
        usage = course.usage_NK[course.archs.index(arch), self.tiers.index(tier)]
        return {"tier": tier.name, "arch": arch.to_json(), "usage": float(usage)}

    def on_the_same_weights(self, name: str) -> list[Course]:
        """The searches of an arm other than `together`: one per tier, or one for all."""
        arm, config = ARMS[name], self.run.config.search
        groups = [(tier,) for tier in self.tiers] if arm.per_tier else [self.tiers]
        evaluations = arm.factor * (self.each if arm.per_tier else config.evaluations)
        path = self._path(f"same-{'-'.join(name.replace(':', '').replace(',', '').split())}.json")
        weights = {"weights": sha256_file(self._path(f"{TOGETHER}.npz"))}
        inputs = self._inputs(self.tiers, arm.method, arm.settings, evaluations) | weights
        record = self.work.read_record(path, inputs)
        if record is None:
            self.run.progress.say(f"seed {self.seed}: {name}, on the weights of {TOGETHER}")
            known = Known(self.weights(), config.warm_up)
            courses = [
                self._course(
                    METHODS[arm.method]
                    .run(
                        self._problem(tiers, known, evaluations, 0, {}),
                        METHODS[arm.method].config(**arm.settings),
                        checkpoint=NoCheckpoint(),
                        trace=lambda record: None,
                        progress=self.run.progress,
                    )
                    .candidates
                )
                for tiers in groups
            ]
            record = {"courses": [_to_json(course) for course in courses]}
            self.work.write_record(path, record, inputs)
        return [self._from_json(course) for course in record["courses"]]

    def weights(self) -> Evaluator:
        """The supernet of `together`, as its search left it."""
        evaluator = fresh_evaluator(self.run)
        evaluator.load_state(read_arrays(self._path(f"{TOGETHER}.npz")))
        return evaluator

    def _problem(
        self,
        tiers: tuple[Tier, ...],
        evaluator: Evaluator,
        evaluations: int,
        warm_up: int,
        made_from: Mapping[str, str],
    ) -> SearchProblem:
        return SearchProblem(
            self.run.space,
            self.run.costs,
            tiers,
            evaluator,
            evaluations,
            warm_up=warm_up,
            fit_samples=self.run.config.search.fit_samples or 1,
            train_in_search=False,
            seed=self.seed,
            made_from=made_from,
        )

    def _course(self, candidates: Sequence[Candidate]) -> Course:
        archs = tuple(candidate.arch for candidate in candidates)
        losses = [candidate.loss for candidate in candidates]
        return Course(archs, np.array(losses), self._usage(archs))

    def _usage(self, archs: Sequence[Arch]) -> FloatArray:
        return np.stack(
            [usage_of_budgets(self.run.costs[tier.device], tier, archs) for tier in self.tiers], axis=1
        )

    def _from_json(self, record: Json) -> Course:
        archs = tuple(Arch(self.run.space.name, tuple(row)) for row in record["choices"])
        return Course(archs, np.array(record["losses"]), self._usage(archs))

    def course_of(self, record: Json) -> Course:
        return self._from_json(record["course"])

    def _path(self, name: str) -> Path:
        return self.work.path(f"seed{self.seed}", name)

    def _inputs(self, tiers: Sequence[Tier], method: str, settings: Json, evaluations: int) -> dict[str, str]:
        config = self.run.config
        return {
            **self.run.input_hashes,
            "search": sha256_json(
                [
                    [tier.to_json() for tier in tiers],
                    [method, settings, evaluations, LOOKS, self.seed],
                    [config.evaluator.to_json(), config.search.model_dump(mode="json"), config.device],
                ]
            ),
        }


def _to_json(course: Course) -> Json:
    return {"choices": [list(arch.choices) for arch in course.archs], "losses": course.loss_N.tolist()}


# --------------------------------------------------------------------------------------------------- judging


def compared(seed: Seed) -> Json:
    """All numbers of one seed."""
    together = seed.together()
    alone = [seed.alone(tier) for tier in seed.tiers]
    found = seed.course_of(together)
    others = {name: seed.on_the_same_weights(name) for name in ARMS if name != TOGETHER}
    courses = {TOGETHER: [found], **others}
    found_after = max(found.first_as_good(k, found.best(k)) or 0 for k in range(len(seed.tiers)))
    return {
        "seed": seed.seed,
        "seconds": together["seconds"],
        "found_after": found_after,
        "found_seconds": seconds_of(together, found_after, found_after),
        "seconds_alone": [each["seconds"] for each in alone],
        "tiers": [
            {
                "tier": tier.name,
                "flops": tier.budgets.get("flops"),
                TOGETHER: _test_of(together["tiers"][k]),
                "alone": _test_of(alone[k]["tiers"][0]),
                "usage": [together["tiers"][k]["usage"], alone[k]["tiers"][0]["usage"]],
                "as_good_after": courses[ASNG][k].first_as_good(k, found.best(k)),
                "as_good_seconds": seconds_of(
                    alone[k], courses[ASNG][k].first_as_good(k, found.best(k)), ASNG_FACTOR * seed.each
                ),
            }
            for k, tier in enumerate(seed.tiers)
        ],
        "excess": excess(courses, len(seed.tiers), seed.run.config.search.evaluations),
    }


def _test_of(found: Json) -> float | None:
    return None if found["arch"] is None else float(found["trained"]["test"])


def seconds_of(search: Json, evaluations: int | None, most: int) -> float:
    """Wall time of a search with this one's warm-up and so many evaluations, at most so many where they were
    not enough."""
    count = most if evaluations is None else evaluations
    return float(search["fit_seconds"] + count * search["seconds_per_evaluation"])


def excess(courses: Mapping[str, Sequence[Course]], num_tiers: int, evaluations: int) -> Json:
    """Per arm: how far the best loss within each tier's budget lies above the best that any arm found,
    as a mean over tiers, after so many evaluations in all; None where a tier had nothing yet."""

    def best(name: str, k: int, total: int) -> float:
        own = courses[name]
        return own[k].best(k, total // num_tiers) if ARMS[name].per_tier else own[0].best(k, total)

    floor_K = [min(best(name, k, 10**9) for name in courses) for k in range(num_tiers)]
    counts = [round(share * evaluations) for share in SHARES]
    return {
        name: {
            str(count): _finite(fmean(best(name, k, count) - floor_K[k] for k in range(num_tiers)))
            for count in [*counts, *([ARMS[name].factor * evaluations] if ARMS[name].factor > 1 else [])]
        }
        for name in courses
    }


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def wall_ratio(seed: Json) -> float:
    """The search for all tiers against the mean of those for one that come to the same losses."""
    return float(seed["seconds"] / fmean(tier["as_good_seconds"] for tier in seed["tiers"]))


def found_ratio(seed: Json) -> float:
    """The same where the search for all, too, is counted until it has what it ends with."""
    return float(seed["found_seconds"] / fmean(tier["as_good_seconds"] for tier in seed["tiers"]))


def gain(seed: Json) -> float:
    """Points of test accuracy that searching together gains, on average over the tiers."""
    gains = [tier[TOGETHER] - tier["alone"] for tier in seed["tiers"] if not _is_missing(tier)]
    return fmean(gains) if gains else float("nan")


def _is_missing(tier: Json) -> bool:
    return tier[TOGETHER] is None or tier["alone"] is None


def mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % t interval of the mean over seeds; tiers of a seed share a supernet, so they count as one."""
    if len(values) < 2:
        return None
    interval = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    return float(interval.low), float(interval.high)


def ranks(seed: Seed, bands: Sequence[Band]) -> Json | None:
    """ρ of the supernet of `together` within the bands, by quick answers, as the search gets, and by
    thorough ones."""
    if not bands:
        return None
    weights = seed.weights()
    found = {
        kind: [weights.losses(band.archs, step=0, thorough=kind == "thorough")[:, 0] for band in bands]
        for kind in ("quick", "thorough")
    }
    return {kind: judged(losses, bands, seed.seed, losses) for kind, losses in found.items()}


def targets_of(seeds: Sequence[Json]) -> list[Target]:
    missing = [f"seed {s['seed']}: {t['tier']}" for s in seeds for t in s["tiers"] if _is_missing(t)]
    found = [
        at_most(
            "wall time of the search for all against one for a tier",
            fmean(map(wall_ratio, seeds)),
            WALL_LIMIT,
        ),
        at_least("mean gain of test accuracy", fmean(map(gain, seeds)), -TOLERATED_POINTS, " points"),
        none_of("tiers without a network", missing),
    ]
    rhos = [seed["ranks"]["thorough"]["rho"] for seed in seeds if seed["ranks"] is not None]
    return [*found, *([at_least("ρ within a band", fmean(rhos), WANTED_RHO)] if rhos else [])]


def table_of(seeds: Sequence[Json]) -> str:
    rows = []
    for tiers in zip(*(seed["tiers"] for seed in seeds), strict=True):
        both = [tier for tier in tiers if not _is_missing(tier)]
        counts = ["> all" if tier["as_good_after"] is None else str(tier["as_good_after"]) for tier in tiers]
        means = [fmean(tier[side] for tier in both) if both else float("nan") for side in (TOGETHER, "alone")]
        rows.append(
            [
                tiers[0]["tier"],
                *(f"{mean:.2f}" for mean in means),
                f"{means[0] - means[1]:+.2f}",
                ", ".join(counts),
                f"{fmean(tier['as_good_seconds'] for tier in tiers):.0f}",
            ]
        )
    headings = ["tier", "together, test %", "alone", "gain", "ASNG as good after", "which takes s"]
    counts = list(dict.fromkeys(count for seed in seeds for arm in seed["excess"].values() for count in arm))
    losses = [
        [name, *(_mean_or_dash([seed["excess"][name].get(count) for seed in seeds]) for count in counts)]
        for name in seeds[0]["excess"]
    ]
    interval = mean_interval([gain(seed) for seed in seeds])
    between = "" if interval is None else " ({:+.2f} to {:+.2f})".format(*interval)
    together_s = fmean(seed["seconds"] for seed in seeds)
    alone_s = fmean(seconds for seed in seeds for seconds in seed["seconds_alone"])
    ratios = ", ".join(f"{wall_ratio(seed):.2f}" for seed in seeds)
    until_found = ", ".join(f"{seed['found_after']} evaluations: {found_ratio(seed):.2f}" for seed in seeds)
    notes = [
        f"Mean gain {fmean(map(gain, seeds)):+.2f} points{between}. One search for all took "
        f"{together_s:.0f} s, one for a tier {alone_s:.0f} s on average; against one for a tier that comes "
        f"to the same loss it took {ratios} times as long, and until it had what it ends with, after "
        f"{until_found}."
    ]
    for seed in seeds:
        if seed["ranks"] is not None:
            shown = [
                f"{kind} {r['rho']:.2f} ({r['interval'][0]:.2f} to {r['interval'][1]:.2f})"
                for kind, r in seed["ranks"].items()
            ]
            notes.append(f"Seed {seed['seed']}: ρ of its supernet within the bands: {', '.join(shown)}.")
    return "\n\n".join(
        [
            markdown_table(headings, rows),
            markdown_table(["loss above the best known, after", *counts], losses),
            *notes,
        ]
    )


def _mean_or_dash(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{fmean(known):.4f}" if len(known) == len(values) else "–"


# ---------------------------------------------------------------------------------------------------- script


def open_seed(config: Json, seed: int, work: RunFolder, progress: Progress) -> Seed:
    """Raises ConfigError where RUN cannot be compared so."""
    parsed = parse(config, "--run")
    if len(parsed.profiles) != 1 or len(parsed.profiles[0].tiers) < 2:
        raise ConfigError(
            "--run: searches for several tiers of one device are compared; name one with several"
        )
    if parsed.search.fit_samples is None or parsed.search.train_in_search:
        raise ConfigError(
            "--run: both sides train as many paths in a step, and none after the warm-up; state "
            "search.fit_samples, and leave search.train_in_search out"
        )
    run = Run(RunFolder(work.path("run")), dataclasses.replace(parsed, seed=seed), progress)
    prepare_compute(run)
    profile_stage(run)
    return Seed(run, work, seed)


def main() -> bool:
    parser = parser_for("search_one_shot", __doc__, "--work one-shot --json search_one_shot.json")
    parser.add_argument("--run", type=Path, default=RUN, metavar="RUN.yaml", help="default: %(default)s")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="where searches are kept")
    parser.add_argument("--seeds", type=whole_numbers, default=[0, 1, 2], help="with commas between")
    parser.add_argument("--table", type=Path, default=TABLE, help="CSV of trainings; default: %(default)s")
    asked = parser.parse_args()
    start_tuned("search_one_shot")
    from rich.console import Console

    evidence, work = Evidence("search_one_shot"), RunFolder(asked.work)
    progress, config = progress_for(Console(stderr=True)), read_config(asked.run)
    seeds = []
    with work.locked():
        for number in asked.seeds:
            seed = open_seed(config, number, work, progress)
            seeds.append(compared(seed) | {"ranks": ranks(seed, known_bands(seed.run, asked.table))})
    return evidence.finish(
        asked.json,
        seeds=asked.seeds,
        numbers={
            "seeds": seeds,
            "gain_interval": mean_interval([gain(seed) for seed in seeds]),
            "wall_ratio_interval": mean_interval([wall_ratio(seed) for seed in seeds]),
        },
        targets=targets_of(seeds),
        table=table_of(seeds),
    )


if __name__ == "__main__":
    run_script(main)
