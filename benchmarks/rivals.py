"""Each tier's network beside what one could have had without searching, at the same latency and recipe.

For every tier of a run that has been derived:

- random: members of the space drawn uniformly among those predicted to use 93 to 100 % of the budget, the
  first three that keep it when timed; the best on the architecture split counts, as a user would choose.
  With `--random paid` as many as can be trained in the time that search and derive took for the tier, and
  never fewer than three; a training takes what the tier's own took in the run;
- uniform: members that make the same choice everywhere, nearest under the budget by prediction, the first
  two that keep it when timed (further below where none is in that band; `use` says); again the better one;
- MobileNetV2-like: benchmarks/mobilenet.py, the widest that keeps the budget when timed.

With `--contenders N` the searched network is the best of the tier's N best finalists after their training, as
`derive.contenders: N` would choose; `--random paid` pays for the further trainings as well.

All are timed on the run's device against the run's reference network, untrained, and may use the budget to
the full, whereas the searched network left `derive.guard` of it free. All are trained by the run's recipe
from scratch, without distillation (`--epochs` changes it for all, the searched network included; a searched
network that the finished run has trained exactly so is taken from there). Nothing is chosen by the test
split. Results are kept per network: the same command goes on where it stopped.
"""

from __future__ import annotations

import itertools
import tempfile
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np
from numpy.random import Generator
from scipy import stats

from benchmarks.mobilenet import mobilenet, mobilenet_plan, widest_within, write_for_timing
from benchmarks.record import (
    Evidence,
    Target,
    markdown_table,
    parser_for,
    run_script,
    start_tuned,
    whole_numbers,
)
from pipeline.algorithms.evolution import random_choices
from pipeline.artifacts import FileCheckpoint, RunFolder, sha256_json
from pipeline.costs.bench import Bench
from pipeline.costs.budgets import usage_of_budgets
from pipeline.costs.counts import module_flops, module_params
from pipeline.derive import Trial, in_order
from pipeline.devices.hardware import usable_cores
from pipeline.engine import Engine, InProcess, Processes
from pipeline.errors import ConfigError, InfeasibleBudget
from pipeline.run import Run, open_run, prepare_compute
from pipeline.spaces.base import SearchSpace
from pipeline.spaces.mbconv import Plan
from pipeline.stages.jobs import share_of
from pipeline.stages.records import arch_of, find_record, record_of, search_record
from pipeline.train.assess import assess
from pipeline.train.recipe import Recipe
from pipeline.train.retrain import retrain, seeded
from pipeline.types import Arch, FloatArray, Json, Tier
from pipeline.ui import progress_for
from pipeline.units import format_value

if TYPE_CHECKING:
    from torch import nn

BAND = 0.93
LOT, DRAWS = 2_000, 400_000
RANDOM_MEMBERS = 3
SEARCHED, RANDOM, UNIFORM, MOBILENET = "searched", "random", "uniform", "MobileNetV2-like"
RIVALS = (RANDOM, UNIFORM, MOBILENET)


# --------------------------------------------------------------------------------------------------- entrants


@dataclass(frozen=True, slots=True)
class Entrant:
    """A network that stands for a tier: a member of the space (`arch`), or a scaled MobileNetV2 (`width`)."""

    role: str
    latency_ms: float
    arch: Arch | None = None
    width: float | None = None

    def to_json(self) -> Json:
        return {**asdict(self), "arch": None if self.arch is None else self.arch.to_json()}

    @classmethod
    def from_json(cls, record: Json) -> Entrant:
        arch = None if record["arch"] is None else Arch.from_json(record["arch"])
        return cls(record["role"], record["latency_ms"], arch, record["width"])

    def key(self, space: SearchSpace) -> str:
        """What its training is kept under: equal networks of two tiers are trained once."""
        if self.arch is not None:
            return self.arch.key
        return f"mobilenet-{sha256_json(self._plan(space))[:16]}"

    def _plan(self, space: SearchSpace) -> Plan:
        assert self.width is not None
        return mobilenet_plan(space.image_shape, space.num_classes, self.width)

    def build(self, space: SearchSpace, seed: int) -> nn.Module:
        if self.arch is None:
            return mobilenet(self._plan(space), seed)
        with seeded(seed):
            return space.build(self.arch)

    def name(self) -> str:
        return self.role if self.width is None else f"{self.role} ×{self.width:.2f}"


def random_members(
    space: SearchSpace, usage: Callable[[Sequence[Arch]], FloatArray], rng: Generator
) -> Iterator[Arch]:
    """Distinct members of the band, as uniform draws from the space meet them; ends after 400,000 draws."""
    sizes = [len(slot.choices) for slot in space.slots]
    seen: set[Arch] = set()
    for _ in range(DRAWS // LOT):
        rows = random_choices(sizes, LOT, rng).tolist()
        archs = list(dict.fromkeys(space.canonical(Arch(space.name, tuple(row))) for row in rows))
        for arch, use in zip(archs, usage(archs), strict=True):
            if BAND <= use <= 1.0 and arch not in seen:
                seen.add(arch)
                yield arch


def uniform_members(space: SearchSpace, usage: Callable[[Sequence[Arch]], FloatArray]) -> Iterator[Arch]:
    """All that are predicted to keep the budget, the nearest to it first."""
    archs = list(space.uniform())
    predicted = sorted(zip(usage(archs).tolist(), archs, strict=True), reverse=True)
    yield from (arch for use, arch in predicted if use <= 1.0)


def first_that_keep(
    archs: Iterable[Arch],
    count: int,
    latencies_ms: Callable[[Sequence[Arch]], Sequence[float]],
    budget_ms: float,
) -> list[tuple[Arch, float]]:
    """The first `count` whose timed latency keeps the budget, with it; timed in lots."""
    kept: list[tuple[Arch, float]] = []
    waiting = iter(archs)
    while len(kept) < count and (lot := list(itertools.islice(waiting, 2 * (count - len(kept))))):
        timed = zip(lot, latencies_ms(lot), strict=True)
        kept += [(arch, latency_ms) for arch, latency_ms in timed if latency_ms <= budget_ms]
    return kept[:count]


def select_entrants(
    run: Run, tier: Tier, counts: dict[str, int], seed: int
) -> tuple[list[Entrant], dict[str, str]]:
    """The searched network of a tier and its rivals, all timed; and why a rival is missing, by role."""
    bench, budget_ms = run.bench(run.profile(tier.device)), tier.budgets["latency_ms"]
    usage = partial(usage_of_budgets, run.costs[tier.device], tier)
    searched = arch_of(run, tier)

    def latencies_ms(archs: Sequence[Arch]) -> list[float]:
        return [record.latency_ms for record in bench.time(archs)]

    missing: dict[str, str] = {}
    rng = np.random.default_rng([seed, run.tiers.index(tier)])
    entrants = [Entrant(SEARCHED, latencies_ms([searched])[0], searched)]
    for role, archs in (
        (RANDOM, random_members(run.space, usage, rng)),
        (UNIFORM, uniform_members(run.space, usage)),
    ):
        kept = first_that_keep(archs, counts[role], latencies_ms, budget_ms)
        if not kept:
            missing[role] = f"no {role} member was found that keeps the budget"
        entrants += [Entrant(role, latency_ms, arch) for arch, latency_ms in kept]
    try:
        entrants.append(select_mobilenet(run, bench, budget_ms))
    except InfeasibleBudget as unreachable:
        missing[MOBILENET] = str(unreachable)
    return entrants, missing


def further_contenders(run: Run, tier: Tier, count: int) -> list[Entrant]:
    """Beside the tier's own network the finalists that come first by the trials, `count` in all; as derive
    timed them in the form that ships."""
    own = arch_of(run, tier)
    trials = [Trial.from_json(trial) for trial in record_of(run, tier, "derive")["trials"]]
    others = [t for t in in_order(trials, run.config.derive) if t.finalist.arch != own]
    return [
        Entrant(SEARCHED, (t.shipped_usage or t.usage) * tier.budgets["latency_ms"], t.finalist.arch)
        for t in others[: count - 1]
    ]


def select_mobilenet(run: Run, bench: Bench, budget_ms: float) -> Entrant:
    """Widths that round to the same network are timed once."""
    shape = run.space.image_shape
    known: dict[Plan, float] = {}

    def latency_ms_of(width: float) -> float:
        plan = mobilenet_plan(shape, run.space.num_classes, width)
        if plan not in known:
            with tempfile.TemporaryDirectory(prefix="budgetline-rivals-") as folder:
                path = Path(folder, "mobilenet.onnx")
                write_for_timing(plan, path, bench.profile, shape)
                known[plan] = bench.time_files([path])[0].latency_ms
        return known[plan]

    width = widest_within(latency_ms_of, budget_ms)
    return Entrant(MOBILENET, latency_ms_of(width), width=width)


# --------------------------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class Gym:
    """Trains entrants by one recipe and keeps what came of each in the work folder."""

    run: Run
    work: RunFolder
    recipe: Recipe

    def path(self, entrant: Entrant, seed: int) -> Path:
        name = f"{entrant.key(self.run.space)}-{self.recipe.epochs:g}epochs-seed{seed}.json"
        return self.work.path("networks", name)

    def _inputs(self, seed: int) -> dict[str, str]:
        return {
            **self.run.input_hashes,
            "recipe": sha256_json([self.recipe.model_dump(mode="json"), seed]),
        }

    def known(self, entrant: Entrant, seed: int) -> Json | None:
        return self.work.read_record(self.path(entrant, seed), self._inputs(seed))

    def engine(self) -> Engine:
        share = share_of(self.run, len(usable_cores()))
        if share.workers == 1:
            return InProcess(lambda job: JOBS[job["do"]](self.run, job))
        root, cache, progress = self.run.folder.root, self.run.cache, self.run.progress
        return Processes("benchmarks.rivals", root, cache, share, progress)

    def job(self, entrant: Entrant, seed: int, label: str) -> Json:
        return {
            "do": "train",
            "work": str(self.work.root),
            "recipe": self.recipe.model_dump(mode="json"),
            "entrant": entrant.to_json(),
            "seed": seed,
            "label": label,
        }

    def train(self, entrant: Entrant, seed: int, label: str) -> Json:
        network = entrant.build(self.run.space, seed)
        path, device = self.path(entrant, seed), self.run.config.device
        checkpoint = FileCheckpoint(path.with_suffix(".npz"))
        trained = retrain(
            network,
            self.run.task,
            self.recipe,
            seed=seed,
            checkpoint=checkpoint,
            progress=self.run.progress,
            label=label,
            device=device,
        )
        record = {
            "architecture": trained.accuracy,
            "test": assess(network, self.run.task, device=device).accuracy,
            "params": module_params(network),
            "flops": module_flops(network, self.run.space.image_shape),
            "seconds": round(trained.seconds, 1),
            "from_run": False,
        }
        self.work.write_record(path, record, self._inputs(seed))
        checkpoint.remove()
        return record

    def take_from_run(self, tier: Tier, entrant: Entrant, seed: int) -> None:
        """Where the run trained its network by this very recipe and seed, that result is used."""
        if (self.recipe, seed) != (self.run.config.retrain, self.run.config.seed) or self.known(
            entrant, seed
        ):
            return
        measure = find_record(self.run, tier, "measure")
        if measure is None:
            return
        train = record_of(self.run, tier, "retrain")
        export = record_of(self.run, tier, "export")
        measured = measure["measured"]
        record = {
            "architecture": train["accuracy"],
            "test": 100 * export["accuracy"]["test"],
            "params": measured["params"],
            "flops": measured["flops"],
            "seconds": round(train["seconds"], 1),
            "from_run": True,
        }
        self.work.write_record(self.path(entrant, seed), record, self._inputs(seed))


def train_one(run: Run, job: Json) -> Json:
    gym = Gym(run, RunFolder(Path(job["work"])), Recipe.model_validate(job["recipe"]))
    record = gym.train(Entrant.from_json(job["entrant"]), int(job["seed"]), job["label"])
    run.progress.say(f"{job['label']}: {record['architecture']:.2f} % on the architecture split")
    return record


JOBS: dict[str, Callable[[Run, Json], Json]] = {"train": train_one}


def train_all(gym: Gym, entrants: Mapping[Tier, Sequence[Entrant]], seeds: Sequence[int]) -> None:
    """Tier by tier; each network once."""
    todo = {
        gym.path(entrant, seed): (tier, entrant, seed)
        for tier, members in entrants.items()
        for seed in seeds
        for entrant in members
        if gym.known(entrant, seed) is None
    }
    jobs = [
        gym.job(entrant, seed, f"[{number}/{len(todo)}] {tier.name}: {entrant.name()}, seed {seed}")
        for number, (tier, entrant, seed) in enumerate(todo.values(), start=1)
    ]
    with gym.engine() as engine:
        engine.map(f"{len(jobs)} networks", jobs, gym.recipe.steps(len(gym.run.task.splits["weights"])))


def finalists(gym: Gym, members: Sequence[Entrant], seed: int) -> list[Entrant]:
    """Per role the one that the architecture split prefers after this seed's trainings."""

    def accuracy(entrant: Entrant) -> float:
        record = gym.known(entrant, seed)
        assert record is not None
        return float(record["architecture"])

    roles = dict.fromkeys(entrant.role for entrant in members)
    return [max((m for m in members if m.role == role), key=accuracy) for role in roles]


# -------------------------------------------------------------------------------------------------- comparing


def entrant_numbers(entrant: Entrant, budget_ms: float, records: Sequence[Json]) -> Json:
    """One entrant's numbers; accuracies in per cent, the mean over the seeds that it was trained with."""
    return {
        **entrant.to_json(),
        "name": entrant.name(),
        "use": entrant.latency_ms / budget_ms,
        **{key: records[0][key] for key in ("params", "flops")},
        **{key: fmean(record[key] for record in records) for key in ("architecture", "test", "seconds")},
        "test_by_seed": [record["test"] for record in records],
        "from_run": all(record["from_run"] for record in records),
    }


def compare(members: Sequence[Json], best: Mapping[str, Json]) -> Json:
    """The searched network's margin over the best of each role, in points of test accuracy, with its interval
    where there are several seeds; below 0 it loses. A role that nobody stands for has none."""
    searched = best[SEARCHED]
    rivals = {role: best.get(role) for role in RIVALS}
    return {
        "searched": searched,
        "best": rivals,
        "margins": {
            role: None if rival is None else searched["test"] - rival["test"]
            for role, rival in rivals.items()
        },
        "intervals": {
            role: None if rival is None else margin_interval(searched["test_by_seed"], rival["test_by_seed"])
            for role, rival in rivals.items()
        },
        "all": list(members),
    }


def margin_interval(searched: Sequence[float], rival: Sequence[float]) -> tuple[float, float] | None:
    """Welch's 95 % interval of the difference of means; None with fewer than two seeds."""
    if min(len(searched), len(rival)) < 2:
        return None
    interval = stats.ttest_ind(searched, rival, equal_var=False).confidence_interval(0.95)
    return float(interval.low), float(interval.high)


def comparison_targets(tiers: dict[str, Json]) -> list[Target]:
    """By the mean margin. Its interval is of how trainings vary, with one search and one draw of rivals."""
    return [
        Target(
            f"{tier}: searched against {role}",
            "≥ 0 points",
            f"{_shown_margin(margin, result['intervals'].get(role))} points",
            margin >= 0,
        )
        for tier, result in tiers.items()
        for role, margin in result["margins"].items()
        if margin is not None
    ]


def comparison_table(tiers: dict[str, Json]) -> str:
    headings = ["tier", "budget", "network", "use", "params", "FLOPs", "architecture %", "test %", "margin"]
    rows: list[list[str]] = []
    for tier, result in tiers.items():
        shown = [result["searched"], *(rival for rival in result["best"].values() if rival is not None)]
        for number, member in enumerate(shown):
            count = sum(other["role"] == member["role"] for other in result["all"])
            margin = result["margins"].get(member["role"])
            name = member["name"] if count == 1 else f"best of {count} {member['name']}"
            if member["role"] == SEARCHED and result.get("searched_origin") in (RANDOM, UNIFORM):
                name += f", its {result['searched_origin']} finalist"
            rows.append(
                [
                    tier if number == 0 else "",
                    format_value("latency_ms", result["budget_ms"]) if number == 0 else "",
                    name,
                    f"{100 * member['use']:.1f} %",
                    format_value("params", member["params"]),
                    format_value("flops", member["flops"]),
                    f"{member['architecture']:.2f}",
                    f"{member['test']:.2f}",
                    _shown_margin(margin, result["intervals"].get(member["role"])),
                ]
            )
    notes = [f"{tier}: {reason}." for tier, result in tiers.items() for reason in result["missing"].values()]
    return "\n\n".join([markdown_table(headings, rows), *notes])


def _shown_margin(margin: float | None, interval: tuple[float, float] | None) -> str:
    if margin is None:
        return ""
    return f"{margin:+.2f}" + ("" if interval is None else " ({:+.2f} to {:+.2f})".format(*interval))


# ----------------------------------------------------------------------------------------------------- script


def chosen_tiers(run: Run, names: str | None) -> list[Tier]:
    """Those of `--tiers a,b`, all by default; each must limit latency and nothing else."""
    wanted = None if names is None else [name.strip() for name in names.split(",")]
    tiers = [t for t in run.tiers if wanted is None or t.name in wanted or t.key in wanted]
    unknown = [name for name in wanted or [] if not any(name in (t.name, t.key) for t in tiers)]
    if unknown:
        raise ConfigError(
            f"--tiers: no tier '{unknown[0]}'; there are: {', '.join(t.key for t in run.tiers)}"
        )
    for tier in tiers:
        if set(tier.budgets) != {"latency_ms"}:
            raise ConfigError(
                f"tier {tier.key} limits {', '.join(tier.budgets)}; networks are compared at equal latency, "
                "so leave it out with --tiers"
            )
    return tiers


def comparable_recipe(recipe: Recipe, epochs: float | None) -> Recipe:
    """The run's recipe without what only its own networks could have: the supernet's weights, a teacher."""
    changes = {"start": "scratch", "distil": None} | ({} if epochs is None else {"epochs": epochs})
    return Recipe.model_validate({**recipe.model_dump(), **changes})


def selection_of(
    run: Run, work: RunFolder, tier: Tier, counts: dict[str, int], seed: int
) -> tuple[list[Entrant], dict[str, str]]:
    """`select_entrants`, as chosen before where this was started before."""
    path = work.path("entrants", f"{tier.device}-{tier.name}.json")
    arch = record_of(run, tier, "derive")
    inputs = {
        **run.input_hashes,
        "tier": sha256_json([tier.to_json(), arch["key"]]),
        "selection": sha256_json([BAND, counts, seed]),
    }
    record = work.read_record(path, inputs)
    if record is None:
        run.progress.say(f"{tier.key}: choosing rivals by timing them")
        entrants, missing = select_entrants(run, tier, counts, seed)
        record = {"entrants": [entrant.to_json() for entrant in entrants], "missing": missing}
        work.write_record(path, record, inputs)
    return [Entrant.from_json(entrant) for entrant in record["entrants"]], record["missing"]


def origin_of(run: Run, tier: Tier, arch: Json) -> str | None:
    """How a searched network became a finalist: by the search's loss, as a uniform member, or at random."""
    trials = record_of(run, tier, "derive")["trials"]
    return next((str(trial["origin"]) for trial in trials if trial["arch"] == arch), None)


def paid_members(run: Run, tier: Tier, recipe: Recipe, contenders: int) -> int:
    """How many networks could be trained instead of the contenders that the run itself did not train, and in
    the tier's share of the search and what deriving it took, as many at a time as the run trained by default,
    at least `RANDOM_MEMBERS`; a training takes what the tier's own network took."""
    search_s = float(search_record(run)["seconds"])
    derive = record_of(run, tier, "derive")
    at_once = share_of(replace(run, workers=None), len(usable_cores())).workers
    alone_s = at_once * (search_s / len(run.tiers) + float(derive["seconds"])) + float(
        derive["trained_seconds"]
    )
    trainings = round(alone_s / (recipe.epochs * _epoch_seconds(run, tier)))
    return max(RANDOM_MEMBERS, trainings + max(0, contenders - run.config.derive.contenders))


def _epoch_seconds(run: Run, tier: Tier) -> float:
    record = record_of(run, tier, "retrain")
    return float(record["seconds"]) / float(record["epochs"])


def add_workers(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--workers", type=int, metavar="N", help="trainings side by side; default: one a core, 1 on a GPU"
    )


def _number_or_paid(text: str) -> int | None:
    """None for `paid`."""
    return None if text == "paid" else int(text)


def _one_or_more(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"wanted a whole number of at least 1, got '{text}'")
    return int(text)


def arguments() -> Namespace:
    parser = parser_for("rivals", __doc__, "--run-folder exports/cifar10 --json rivals-cifar10.json")
    parser.add_argument(
        "--run-folder", type=Path, required=True, metavar="FOLDER", help="a run, derived at least"
    )
    parser.add_argument("--work", type=Path, metavar="DIR", help="default: FOLDER-rivals, beside FOLDER")
    parser.add_argument("--epochs", type=float, help="for all networks; default: as the run's recipe")
    parser.add_argument("--tiers", help="names with commas between; default: all")
    parser.add_argument(
        "--seeds",
        type=whole_numbers,
        default=[0],
        help="of training, with commas between; the first draws and chooses rivals",
    )
    parser.add_argument(
        "--random",
        type=_number_or_paid,
        default=RANDOM_MEMBERS,
        metavar="N|paid",
        help="random members per tier",
    )
    parser.add_argument("--uniform", type=int, default=2, help="uniform members per tier")
    parser.add_argument(
        "--contenders", type=_one_or_more, default=1, metavar="N", help="finalists per tier; default: 1"
    )
    add_workers(parser)
    return parser.parse_args()


def main() -> bool:
    asked = arguments()
    start_tuned("rivals")
    from rich.console import Console

    evidence = Evidence("rivals")
    folder: Path = asked.run_folder.resolve()
    run = open_run(folder, None, progress_for(Console(stderr=True)))
    run.workers = asked.workers
    prepare_compute(run)
    seeds: list[int] = asked.seeds
    tiers = chosen_tiers(run, asked.tiers)
    work = RunFolder(asked.work or folder.with_name(f"{folder.name}-rivals"))
    gym = Gym(run, work, comparable_recipe(run.config.retrain, asked.epochs))
    with work.locked():
        selected = {
            tier: selection_of(
                run,
                work,
                tier,
                {
                    RANDOM: paid_members(run, tier, gym.recipe, asked.contenders)
                    if asked.random is None
                    else asked.random,
                    UNIFORM: asked.uniform,
                },
                seeds[0],
            )
            for tier in tiers
        }
        entrants = {
            tier: [*members, *further_contenders(run, tier, asked.contenders)]
            for tier, (members, _) in selected.items()
        }
        for tier, seed in itertools.product(tiers, seeds):
            gym.take_from_run(tier, entrants[tier][0], seed)
        train_all(gym, entrants, seeds[:1])
        train_all(gym, {tier: finalists(gym, members, seeds[0]) for tier, members in entrants.items()}, seeds)
        results = {tier.key: _result(gym, tier, entrants[tier], selected[tier][1], seeds) for tier in tiers}
    evidence.finish(
        asked.json,
        seeds=seeds,
        numbers={
            "data": run.task.name,
            "run": folder.name,
            "recipe": gym.recipe.model_dump(mode="json"),
            "band": BAND,
            "tiers": results,
        },
        targets=comparison_targets(results),
        table=comparison_table(results),
    )
    return True  # where the search does not win is said, and is no failure of the comparison


def _result(
    gym: Gym, tier: Tier, entrants: Sequence[Entrant], missing: dict[str, str], seeds: Sequence[int]
) -> Json:
    budget_ms = tier.budgets["latency_ms"]

    def numbers(entrant: Entrant) -> Json:
        records = [record for seed in seeds if (record := gym.known(entrant, seed)) is not None]
        return entrant_numbers(entrant, budget_ms, records)

    best = {entrant.role: numbers(entrant) for entrant in finalists(gym, entrants, seeds[0])}
    return {
        "budget_ms": budget_ms,
        "searched_origin": origin_of(gym.run, tier, best[SEARCHED]["arch"]),
        "missing": missing,
        **compare([numbers(entrant) for entrant in entrants], best),
    }


if __name__ == "__main__":
    run_script(main)
