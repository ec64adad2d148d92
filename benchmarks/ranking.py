"""How well what a search could look at ranks networks of equal cost by their accuracy after training alone.

From a run whose search is finished: random members of each chosen tier's band (93 to 100 % of the budget,
as predicted) are retrained by one recipe, the first few with a second seed as well, which bounds what any
ranking can reach. Then every signal ranks them:

- `run`: the run's evaluator as its search left it;
- evaluators of the catalogue that need no training, by name (`--evaluators`);
- `--variants FILE`: name → {evaluator: settings, search: settings}; each trains a supernet as this run's
  warm-up would with these settings;
- `latency`: the predicted latency, and through `flops` and `params` size.

Spearman's ρ with the test accuracy, per band and over the bands together (ranks are within a band), with
95 % bootstrap intervals over networks, also of the difference to the run's evaluator; and the regret of
trusting a signal: the best accuracy of the band less that of its first choice, beside what a random pick
regrets. What was retrained is kept in a CSV table and never trained twice; with `--known` nothing is
trained, and what the table holds of the run's images, space and tiers is ranked, whichever run drew it.
"""

from __future__ import annotations

import itertools
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from benchmarks.record import (
    Evidence,
    Target,
    at_least,
    markdown_table,
    parser_for,
    run_script,
    start_tuned,
    whole_numbers,
)
from benchmarks.rivals import (
    BAND,
    RANDOM,
    Entrant,
    Gym,
    add_workers,
    chosen_tiers,
    comparable_recipe,
    random_members,
    train_all,
)
from benchmarks.truth import Row, add_rows, key_of, read_rows, sha256_of_space
from pipeline.artifacts import FileCheckpoint, RunFolder, read_arrays, read_yaml, sha256_json, write_arrays
from pipeline.config import parse
from pipeline.costs.budgets import usage_of_budgets
from pipeline.errors import ConfigError, RunFolderError
from pipeline.evaluators import EVALUATORS
from pipeline.evaluators.correlation import spearman
from pipeline.progress import NoCheckpoint
from pipeline.run import Run, open_run, prepare_compute
from pipeline.search import METHODS
from pipeline.stages.networks import searched_evaluator
from pipeline.stages.search import search_problem
from pipeline.types import Arch, Evaluator, FloatArray, Json, Tier
from pipeline.ui import progress_for

TABLE = Path(__file__).with_name("truth_mbconv.csv")
RUN_SIGNAL, LATENCY = "run", "latency"
WANTED_RHO = 0.6
LEAST_KNOWN = 8
RESAMPLES = 2000


# -------------------------------------------------------------------------------------------------- the truth


@dataclass(frozen=True)
class Band:
    """Networks of one tier's band and their test accuracies in per cent: by the first seed, and by the second
    for the first few."""

    tier: Tier
    archs: tuple[Arch, ...]
    test_N: FloatArray
    again_R: FloatArray
    name: str


def members_of(run: Run, tier: Tier, count: int, seed: int) -> list[Entrant]:
    """The band's first `count` random members, the same as those that `benchmarks.rivals` draws from."""
    costs = run.costs[tier.device]
    rng = np.random.default_rng([seed, run.tiers.index(tier)])
    archs = list(islice(random_members(run.space, partial(usage_of_budgets, costs, tier), rng), count))
    if len(archs) < count:
        raise ConfigError(f"{tier.key}: its band has {len(archs)} members, and {count} are to be ranked")
    predicted = costs.of(archs)[:, costs.metrics.index("latency_ms")]
    return [Entrant(RANDOM, float(ms), arch) for arch, ms in zip(archs, predicted, strict=True)]


def data_of(run: Run) -> str:
    """The data set's name, and what tells its images from the whole set with default splits."""
    settings = run.config.data.settings
    plain = settings == type(settings)()
    return run.task.name if plain else f"{run.task.name} {sha256_json(settings.model_dump(mode='json'))[:8]}"


def bands_of(
    gym: Gym, tiers: Sequence[Tier], seeds: Sequence[int], count: int, repeats: int, table: Path
) -> list[Band]:
    """Trains what the table does not know yet, and adds it there."""
    run = gym.run
    members = {tier: members_of(run, tier, count, seeds[0]) for tier in tiers}
    wanted = {
        seed: {tier: entrants[: count if place == 0 else repeats] for tier, entrants in members.items()}
        for place, seed in enumerate(seeds[:2])
    }

    def key(entrant: Entrant, seed: int) -> Any:
        assert entrant.arch is not None
        return key_of(data_of(run), run.space, gym.recipe, entrant.arch, seed)

    for seed, entrants in wanted.items():
        known = read_rows(table)
        unknown = {t: [e for e in some if key(e, seed) not in known] for t, some in entrants.items()}
        train_all(gym, unknown, [seed])
        add_rows(table, [_row(gym, t, e, seed) for t, some in unknown.items() for e in some])
    rows = read_rows(table)

    def accuracies(tier: Tier, seed: int) -> FloatArray:
        return np.array([rows[key(entrant, seed)].test for entrant in wanted.get(seed, {}).get(tier, [])])

    return [
        Band(
            tier,
            tuple(entrant.arch for entrant in members[tier] if entrant.arch is not None),
            accuracies(tier, seeds[0]),
            accuracies(tier, seeds[1]) if len(seeds) > 1 else np.zeros(0),
            tier.key,
        )
        for tier in tiers
    ]


def known_bands(run: Run, table: Path, seeds: Sequence[int] = (0,)) -> list[Band]:
    """What the table holds of the run's space and images, in bands of one tier's name, recipe and budget, of
    eight networks at least."""
    of_run = (data_of(run), sha256_of_space(run.space))
    by_name = itertools.groupby(
        sorted(
            (row for row in read_rows(table).values() if (row.data, row.space) == of_run),
            key=lambda row: (row.tier, row.recipe, row.latency_ms),
        ),
        key=lambda row: (row.tier, row.recipe),
    )
    bands = [_known_band(run, some, seeds) for _, rows in by_name for some in _of_equal_cost(list(rows))]
    return [band for band in bands if len(band.archs) >= LEAST_KNOWN]


def _of_equal_cost(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows from the fastest on, apart where they were drawn for different budgets: a band is no wider than
    from 93 to 100 % of one."""
    groups: list[list[Row]] = []
    for row in rows:
        if groups and row.latency_ms <= groups[-1][0].latency_ms / BAND:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def _known_band(run: Run, rows: Sequence[Row], seeds: Sequence[int]) -> Band:
    first, *others = ({row.choices: row.test for row in rows if row.seed == seed} for seed in seeds[:2])
    again = others[0] if others else {}
    both = [choices for choices in first if choices in again]
    order = list(dict.fromkeys([*both, *first]))
    archs = tuple(Arch(run.space.name, tuple(map(int, choices.split()))) for choices in order)
    test_N, again_R = np.array([first[c] for c in order]), np.array([again[c] for c in both])
    device, _, tier = rows[0].tier.partition("/")
    name = f"{rows[0].tier} of {rows[-1].latency_ms:.3g} ms, {rows[0].epochs:g} epochs"
    return Band(Tier(device, tier, ()), archs, test_N, again_R, name)


def _row(gym: Gym, tier: Tier, entrant: Entrant, seed: int) -> Row:
    assert entrant.arch is not None
    record = gym.known(entrant, seed)
    assert record is not None, "it was trained just now"
    key = key_of(data_of(gym.run), gym.run.space, gym.recipe, entrant.arch, seed)
    return Row(
        **key._asdict(),
        epochs=gym.recipe.epochs,
        tier=tier.key,
        latency_ms=round(entrant.latency_ms, 5),
        params=int(record["params"]),
        flops=int(record["flops"]),
        architecture=round(record["architecture"], 3),
        test=round(record["test"], 3),
    )


# ------------------------------------------------------------------------------------------------ the signals


def named_evaluator(run: Run, name: str) -> Evaluator:
    """An evaluator that needs no training, with its default settings."""
    entry = EVALUATORS[name]() if name in EVALUATORS else None
    if entry is None:
        raise ConfigError(f"--evaluators: no evaluator '{name}'; there are: {', '.join(EVALUATORS)}")
    made = entry.make(
        run.space, run.task, entry.settings(), total_steps=1, seed=run.config.seed, device=run.config.device
    )
    if made.trains:
        raise ConfigError(f"--evaluators: '{name}' needs training; describe it in --variants")
    return made


def trained_variant(run: Run, name: str, changes: Json, work: RunFolder) -> Evaluator:
    """A supernet after the warm-up that the run would give it with other settings; kept in the work
    folder."""
    values = run.config.to_json()
    wrong = sorted(set(changes) - {"evaluator", "search"})
    if wrong:
        raise ConfigError(f"--variants: '{name}' has '{wrong[0]}'; expected evaluator and search settings")
    for section, settings in changes.items():
        values[section] = {**values[section], **settings}
    values["search"]["evaluations"] = len(run.tiers)  # a search that ends after its warm-up
    config = parse(values, f"variant {name}")
    changed = replace(run, config=config)
    path = work.path("variants", f"{name}-{sha256_json(config.to_json())[:12]}.npz")
    problem = search_problem(changed)
    if path.is_file():
        problem.evaluator.load_state(read_arrays(path))
        return problem.evaluator
    run.progress.say(f"{name}: training its supernet")
    checkpoint = FileCheckpoint(path.with_name(f"{path.stem}-state.npz"))
    METHODS["random"].run(
        problem,
        METHODS["random"].config(),
        checkpoint=checkpoint if problem.evaluator.trains else NoCheckpoint(),
        trace=lambda record: None,
        progress=run.progress,
    )
    write_arrays(path, problem.evaluator.state())
    checkpoint.remove()
    return problem.evaluator


def losses_of(evaluator: Evaluator, bands: Sequence[Band]) -> list[FloatArray]:
    """The most exact answers per band, shape (N,), lower is better."""
    return [np.asarray(evaluator.losses(band.archs, step=0, thorough=True)[:, 0]) for band in bands]


def latencies_of(run: Run, bands: Sequence[Band]) -> list[FloatArray]:
    """Minus the predicted latency: the slower of a band, the better it should be."""
    tables = [(run.costs[band.tier.device], band) for band in bands]
    return [
        -np.asarray(table.of(band.archs)[:, table.metrics.index("latency_ms")], dtype=float)
        for table, band in tables
    ]


# -------------------------------------------------------------------------------------------------- judging


def pooled(losses: Sequence[FloatArray], truths: Sequence[FloatArray]) -> float:
    """ρ of ranks within bands, all bands together: bands do not rank each other."""
    return spearman(
        np.concatenate(list(map(_centred_ranks, losses))), np.concatenate(list(map(_centred_ranks, truths)))
    )


def _centred_ranks(values_N: FloatArray) -> FloatArray:
    return np.asarray((stats.rankdata(values_N) - 0.5) / len(values_N) - 0.5)


def resampled(losses: Sequence[FloatArray], truths: Sequence[FloatArray], seed: int) -> FloatArray:
    """`pooled` over networks drawn anew within each band, shape (RESAMPLES,); the same seed draws the same
    networks for every signal."""
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(RESAMPLES):
        picks = [rng.integers(len(truth_N), size=len(truth_N)) for truth_N in truths]
        drawn.append(
            pooled(
                [loss_N[pick] for loss_N, pick in zip(losses, picks, strict=True)],
                [truth_N[pick] for truth_N, pick in zip(truths, picks, strict=True)],
            )
        )
    return np.array(drawn)


def interval(losses: Sequence[FloatArray], truths: Sequence[FloatArray], seed: int) -> tuple[float, float]:
    """95 % percentile bootstrap of `pooled` over the networks of each band."""
    return _middle(resampled(losses, truths, seed))


def _middle(drawn_R: FloatArray) -> tuple[float, float]:
    low, high = np.quantile(drawn_R, (0.025, 0.975))
    return float(low), float(high)


def judged(
    losses: Sequence[FloatArray], bands: Sequence[Band], seed: int, mine: Sequence[FloatArray]
) -> Json:
    """ρ and regret (points of test accuracy) of one signal, and how far the run's own is ahead in ρ."""
    truths = [band.test_N for band in bands]
    return {
        "rho": pooled(losses, truths),
        "interval": interval(losses, truths, seed),
        "lead": pooled(mine, truths) - pooled(losses, truths),
        "lead_interval": _middle(resampled(mine, truths, seed) - resampled(losses, truths, seed)),
        "bands": {
            band.name: {
                "rho": spearman(loss_N, band.test_N),
                "interval": interval([loss_N], [band.test_N], seed),
                "regret": float(band.test_N.max() - band.test_N[int(loss_N.argmin())]),
            }
            for band, loss_N in zip(bands, losses, strict=True)
        },
    }


def stability(bands: Sequence[Band]) -> Json | None:
    """How far the truth agrees with itself: ρ between two seeds and the spread of their difference."""
    pairs = [(band.test_N[: len(band.again_R)], band.again_R) for band in bands if len(band.again_R) > 1]
    if not pairs:
        return None
    differences = np.concatenate([first - again for first, again in pairs])
    return {
        "networks": len(differences),
        "rho": pooled([-first for first, _ in pairs], [again for _, again in pairs]),
        "std_of_one_training": float(differences.std(ddof=1) / np.sqrt(2)),
    }


def targets_of(signals: dict[str, Json]) -> list[Target]:
    mine = signals[RUN_SIGNAL]["rho"]
    return [
        at_least("ρ within the bands, the run's evaluator", mine, WANTED_RHO),
        *(_ahead_of(name, signals[name]) for name in ("flops", "params", LATENCY) if name in signals),
    ]


def _ahead_of(name: str, found: Json) -> Target:
    low, high = found["lead_interval"]
    shown = f"{found['lead']:+.2f} ({low:+.2f} to {high:+.2f})"
    return Target(f"ρ above that of {name}", "> 0", shown, found["lead"] > 0)


def table_of(signals: dict[str, Json], bands: Sequence[Band], again: Json | None) -> str:
    keys = [band.name for band in bands]
    headings = ["signal", "ρ", "95 %", *(f"ρ {key}" for key in keys), *(f"regret {key}" for key in keys)]
    rows = [
        [
            name,
            f"{found['rho']:.2f}",
            "{:.2f} … {:.2f}".format(*found["interval"]),
            *(f"{found['bands'][key]['rho']:.2f}" for key in keys),
            *(f"{found['bands'][key]['regret']:.2f}" for key in keys),
        ]
        for name, found in sorted(signals.items(), key=lambda item: -float(item[1]["rho"]))
    ]
    spreads = ", ".join(f"{b.name} {b.test_N.min():.2f}…{b.test_N.max():.2f} %" for b in bands)
    picks = ", ".join(f"{b.name} {b.test_N.max() - b.test_N.mean():.2f}" for b in bands)
    notes = [
        f"{sum(len(band.archs) for band in bands)} networks; test accuracies: {spreads}. "
        f"A random pick regrets {picks} points on average."
    ]
    if again is not None:
        notes.append(
            f"A second seed on {again['networks']}: ρ {again['rho']:.2f} between the two, one training's "
            f"standard deviation {again['std_of_one_training']:.2f} points."
        )
    return "\n\n".join([markdown_table(headings, rows), " ".join(notes)])


# ----------------------------------------------------------------------------------------------------- script


def arguments() -> Namespace:
    parser = parser_for("ranking", __doc__, "--run-folder exports/cifar10 --tiers xs,m --json ranking.json")
    parser.add_argument("--run-folder", type=Path, required=True, metavar="FOLDER", help="a run, searched")
    parser.add_argument("--work", type=Path, metavar="DIR", help="default: FOLDER-rivals, beside FOLDER")
    parser.add_argument("--table", type=Path, default=TABLE, help="CSV of trainings; default: %(default)s")
    parser.add_argument("--tiers", help="names with commas between; default: all")
    parser.add_argument("--networks", type=int, default=16, help="per band")
    parser.add_argument("--repeats", type=int, default=4, help="how many per band get the second seed too")
    parser.add_argument("--epochs", type=float, help="of retraining; default: as the run's recipe")
    parser.add_argument("--seeds", type=whole_numbers, default=[0, 1], help="of retraining")
    parser.add_argument("--known", action="store_true", help="train nothing: rank what the table holds")
    parser.add_argument("--evaluators", default="params,flops,synflow,nwot,jacov,eproxy")
    parser.add_argument(
        "--variants", type=Path, metavar="FILE", help="YAML: name → evaluator, search settings"
    )
    add_workers(parser)
    return parser.parse_args()


def known_bands_of(run: Run, tiers: Sequence[Tier], table: Path, seeds: Sequence[int]) -> list[Band]:
    names = {tier.key for tier in tiers}
    bands = [band for band in known_bands(run, table, seeds) if band.tier.key in names]
    if not bands:
        raise ConfigError(
            f"--known: {table} holds no {LEAST_KNOWN} trainings of {data_of(run)} in this space for "
            f"{' or '.join(sorted(names))}"
        )
    return bands


def signals_of(run: Run, work: RunFolder, bands: Sequence[Band], asked: Namespace) -> dict[str, Json]:
    mine = losses_of(searched_evaluator(run), bands)
    losses = {RUN_SIGNAL: mine, LATENCY: latencies_of(run, bands)}
    for name in filter(None, asked.evaluators.split(",")):
        run.progress.say(f"{name}: scoring")
        losses[name] = losses_of(named_evaluator(run, name), bands)
    for name, changes in (read_yaml(asked.variants) if asked.variants else {}).items():
        losses[name] = losses_of(trained_variant(run, name, changes, work), bands)
    return {name: judged(found, bands, run.config.seed, mine) for name, found in losses.items()}


def main() -> bool:
    asked = arguments()
    start_tuned("ranking")
    from rich.console import Console

    evidence = Evidence("ranking")
    folder: Path = asked.run_folder.resolve()
    if not (folder / "search" / "result.json").is_file():
        raise RunFolderError(
            f"{asked.run_folder}: holds no finished search; finish it with `budgetline search`"
        )
    run = open_run(folder, None, progress_for(Console(stderr=True)))
    run.workers = asked.workers
    prepare_compute(run)
    work = RunFolder(asked.work or folder.with_name(f"{folder.name}-rivals"))
    gym = Gym(run, work, comparable_recipe(run.config.retrain, asked.epochs))
    with work.locked():
        tiers = chosen_tiers(run, asked.tiers)
        if asked.known:
            bands = known_bands_of(run, tiers, asked.table, asked.seeds)
        else:
            bands = bands_of(gym, tiers, asked.seeds, asked.networks, asked.repeats, asked.table)
        signals = signals_of(run, work, bands, asked)
    again = stability(bands)
    return evidence.finish(
        asked.json,
        seeds=asked.seeds,
        numbers={
            "data": run.task.name,
            "recipe": None if asked.known else gym.recipe.model_dump(mode="json"),
            "networks": {band.name: len(band.archs) for band in bands},
            "signals": signals,
            "stability": again,
        },
        targets=targets_of(signals),
        table=table_of(signals, bands, again),
    )


if __name__ == "__main__":
    run_script(main)
