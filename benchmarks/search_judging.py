"""How searches are compared: what each tier would get after so many evaluations, and what that is worth.

After n evaluations each tier takes, of the networks seen that keep its budget, the best by one of two rules,
the same for every method:

- `answers`: the least mean answer;
- `model`: the least posterior mean of a Gaussian process fitted to the n answers
  (`pipeline/algorithms/surrogate.py`), which sees through noise.

Its regret is what its quality lacks of the best that keeps the budget; a tier with nothing within its budget
regrets the whole range. There are two qualities: `truth`, which is what counts in the end, and `signal`, the
answer without noise, which is all that a search can see. Where the two differ, whoever finds the best signal
keeps a regret in the truth that no search can take away (`floor`).

The claim "below every peer at every count" is that every single comparison holds, so each is tested at 95 %
(paired over seeds, one-sided t on the means over tiers) without a correction: an intersection-union test.
Intervals are 95 % by bootstrap over seeds. Axes: N evaluations, S slots, K tiers, U distinct networks, Z
seeds, E counts, G points of a course.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats

from benchmarks.record import Target, markdown_table
from benchmarks.search_methods import ASNG, OURS
from pipeline.algorithms import pareto, surrogate
from pipeline.search.problem import SearchProblem
from pipeline.types import Arch, Arrays, ChoiceSpace, CostTable, Evaluator, FloatArray, IntArray, Json, Tier

COUNTS = (50, 100, 150, 200, 300, 400, 600, 800)
GRID = 10
"""Evaluations between two points of a course."""
PICKS = ("answers", "model")
ALPHA = 0.05
RESAMPLES = 2_000
WANTED_RATIO = 1 / 3


class Quality(NamedTuple):
    """What networks are worth: `of` maps rows of choices (N, S) to (N,), higher is better, NaN where
    unknown. `best_K` is the best within each tier's budget, `worst` the least of all."""

    of: Callable[[IntArray], FloatArray]
    best_K: FloatArray
    worst: float


@dataclass(frozen=True)
class Contest:
    """A search problem whose optimum is known. `evaluator` makes one with its own noise per seed."""

    space: ChoiceSpace
    costs: CostTable
    tiers: tuple[Tier, ...]
    evaluator: Callable[[int], Evaluator]
    qualities: Mapping[str, Quality]
    """`truth`, and `signal` where it is something else."""
    middle: float
    """Median signal of the space: from there hypervolume is counted."""
    floor: float = 0.0
    """Mean regret in the truth of whoever takes the best signal."""

    @property
    def seen(self) -> str:
        """The quality that a search sees."""
        return "signal" if "signal" in self.qualities else "truth"

    def problem(self, evaluator: Evaluator, evaluations: int, seed: int) -> SearchProblem:
        costs = {tier.device: self.costs for tier in self.tiers}
        return SearchProblem(self.space, costs, self.tiers, evaluator, evaluations, seed=seed)

    def usage(self, choices_NS: IntArray) -> FloatArray:
        """Share of every tier's budget, shape (N, K)."""
        archs = [Arch(self.space.name, tuple(row)) for row in choices_NS.tolist()]
        limits_K = np.array([tier.limits[0].value for tier in self.tiers])
        return np.asarray(self.costs.of(archs)[:, :1] / limits_K)


# ---------------------------------------------------------------------------------------------- one search


class Judged(NamedTuple):
    """One search: regret per (quality, pick), shape (E, K); the course of `answers` per quality, shape (G,);
    hypervolume (E,)."""

    regret: dict[tuple[str, str], FloatArray]
    course: dict[str, FloatArray]
    hypervolume_E: FloatArray

    def to_arrays(self) -> Arrays:
        return {
            **{f"regret/{'/'.join(key)}": value for key, value in self.regret.items()},
            **{f"course/{quality}": value for quality, value in self.course.items()},
            "hypervolume": self.hypervolume_E,
        }

    @classmethod
    def from_arrays(cls, arrays: Arrays) -> Judged:
        regret: dict[tuple[str, str], FloatArray] = {}
        course: dict[str, FloatArray] = {}
        for name, value in arrays.items():
            kind, *parts = name.split("/")
            if kind == "regret":
                regret[parts[0], parts[1]] = value
            elif kind == "course":
                course[parts[0]] = value
        return cls(regret, course, arrays["hypervolume"])


def judge(contest: Contest, asked_NS: IntArray, answers_N: FloatArray) -> Judged:
    """A search that ended early keeps what it had."""
    seen_US, index_N = np.unique(asked_NS, axis=0, return_inverse=True)
    index_N = index_N.reshape(-1)
    seen = _Seen(contest, seen_US)
    counts = [min(count, len(asked_NS)) for count in COUNTS]
    by_answer_EU = [_mean_answers(index_N[:n], answers_N[:n], len(seen_US)) for n in counts]
    by_model_EU = [_smoothed(contest, seen_US, index_N[:n], answers_N[:n]) for n in counts]
    regret = {
        (quality, pick): np.stack([seen.regret_K(quality, score_U) for score_U in scores_EU])
        for quality in contest.qualities
        for pick, scores_EU in zip(PICKS, (by_answer_EU, by_model_EU), strict=True)
    }
    points = [
        _mean_answers(index_N[:n], answers_N[:n], len(seen_US)) for n in range(GRID, len(asked_NS) + 1, GRID)
    ]
    course = {
        quality: np.array([seen.regret_K(quality, score_U).mean() for score_U in points])
        for quality in contest.qualities
    }
    volume_E = np.array([seen.hypervolume(np.isfinite(score_U)) for score_U in by_answer_EU])
    return Judged(regret, course, volume_E)


class _Seen:
    """What all networks that a search has seen cost and are worth."""

    def __init__(self, contest: Contest, seen_US: IntArray) -> None:
        self._contest = contest
        self._usage_UK = contest.usage(seen_US)
        self._quality = {name: quality.of(seen_US) for name, quality in contest.qualities.items()}

    def regret_K(self, name: str, score_U: FloatArray) -> FloatArray:
        """Of the least score that keeps each budget; NaN is no candidate."""
        quality, value_U = self._contest.qualities[name], self._quality[name]
        usable_U = np.isfinite(value_U) & np.isfinite(score_U)
        score_UK = np.where(usable_U[:, None] & (self._usage_UK <= 1), score_U[:, None], np.inf)
        picked_K = score_UK.argmin(axis=0)
        found_K = np.where(np.isfinite(score_UK.min(axis=0)), value_U[picked_K], quality.worst)
        return np.asarray(quality.best_K - found_K)

    def hypervolume(self, known_U: FloatArray) -> float:
        """Of (−signal, share of the largest budget), from the space's median signal and the whole budget."""
        signal_U = self._quality[self._contest.seen]
        points_U2 = np.stack([-signal_U, self._usage_UK.min(axis=1)], axis=1)[np.asarray(known_U, dtype=bool)]
        points_U2 = points_U2[np.isfinite(points_U2).all(axis=1)]
        return pareto.hypervolume(points_U2, np.array([-self._contest.middle, 1.0 + 1e-9]))


def _mean_answers(index_N: IntArray, answers_N: FloatArray, num: int) -> FloatArray:
    """Mean loss answered per network, NaN for those not seen yet, shape (U,)."""
    times_U = np.bincount(index_N, minlength=num)
    total_U = np.bincount(index_N, answers_N, minlength=num)
    return np.asarray(np.divide(total_U, times_U, out=np.full(num, np.nan), where=times_U > 0))


def _smoothed(contest: Contest, seen_US: IntArray, index_N: IntArray, answers_N: FloatArray) -> FloatArray:
    """Posterior mean per network seen, NaN for the others, shape (U,)."""
    process = surrogate.fit(seen_US[index_N], answers_N, contest.space.slots)
    known_U = np.bincount(index_N, minlength=len(seen_US)) > 0
    score_U = np.full(len(seen_US), np.nan)
    score_U[known_U] = surrogate.predict(process, seen_US[known_U])
    return score_U


# ----------------------------------------------------------------------------------------------- all searches


class Results(NamedTuple):
    """A method's searches, seeds first."""

    regret: dict[tuple[str, str], FloatArray]
    """(Z, E, K)"""
    course: dict[str, FloatArray]
    """(Z, G), held at its last point where a search ended early."""
    hypervolume_ZE: FloatArray
    seconds: float


def gather(searches: Sequence[Judged], seconds: float, evaluations: int) -> Results:
    points = evaluations // GRID
    return Results(
        {key: np.stack([search.regret[key] for search in searches]) for key in searches[0].regret},
        {
            quality: np.stack([_held(search.course[quality], points) for search in searches])
            for quality in searches[0].course
        },
        np.stack([search.hypervolume_E for search in searches]),
        seconds,
    )


def _held(course_G: FloatArray, points: int) -> FloatArray:
    return np.concatenate([course_G, np.full(max(points - len(course_G), 0), course_G[-1])])


def interval(values_ZE: FloatArray, seed: int = 0) -> FloatArray:
    """95 % of the mean over seeds, by bootstrap, shape (2, E)."""
    drawn_RZ = np.random.default_rng(seed).integers(0, len(values_ZE), size=(RESAMPLES, len(values_ZE)))
    return np.asarray(np.quantile(values_ZE[drawn_RZ].mean(axis=1), [0.025, 0.975], axis=0))


def p_lower(ours_ZE: FloatArray, theirs_ZE: FloatArray) -> FloatArray:
    """One-sided paired t: the probability of such a lead if ours were not lower; 1 where nothing
    differs."""
    difference_ZE = theirs_ZE - ours_ZE
    error_E = difference_ZE.std(axis=0, ddof=1) / np.sqrt(len(difference_ZE))
    t_E = np.divide(difference_ZE.mean(axis=0), error_E, out=np.zeros_like(error_E), where=error_E > 0)
    return np.where(error_E > 0, stats.t.sf(t_E, len(difference_ZE) - 1), 1.0)


def first_within(course_G: FloatArray, level: float) -> int | None:
    """Evaluations after which a course is at most `level`."""
    reached = np.flatnonzero(course_G <= level)
    return int((reached[0] + 1) * GRID) if len(reached) else None


class Arrival(NamedTuple):
    """Evaluations to a target over all searches, within as many as every method has: the median with its 95 %
    interval by bootstrap over seeds, None where the searches in question never got there; and the share that
    did."""

    median: float | None
    low: float | None
    high: float | None
    reached: float


def to_target(found: Results, target: float) -> Arrival:
    within_ZG = found.course["truth"][:, : COUNTS[-1] // GRID] <= target
    arrived_Z = within_ZG.any(axis=1)
    count_Z = np.where(arrived_Z, (within_ZG.argmax(axis=1) + 1.0) * GRID, np.inf)
    drawn_RZ = np.random.default_rng(0).integers(0, len(count_Z), size=(RESAMPLES, len(count_Z)))
    median_R = np.sort(np.quantile(count_Z[drawn_RZ], 0.5, axis=1, method="higher"))
    low, high = median_R[[int(0.025 * RESAMPLES), int(0.975 * RESAMPLES)]].tolist()
    median = float(np.quantile(count_Z, 0.5, method="higher"))
    return Arrival(_if_finite(median), _if_finite(low), _if_finite(high), float(arrived_Z.mean()))


def _if_finite(number: float) -> float | None:
    return number if np.isfinite(number) else None


class Saving(NamedTuple):
    """What share of ASNG's evaluations ours needs to be as good; with `bound`, ASNG never got there and the
    share is at most this. `upper` ends the 95 % interval of it."""

    evaluations: int
    asng: int | None
    ratio: float
    upper: float
    bound: bool


def savings(ours: Results, asng: Results, quality: str) -> list[Saving]:
    """At every count. Both are means over the same seeds, resampled together for the interval."""
    ours_ZG, asng_ZG = ours.course[quality], asng.course[quality]
    most = asng_ZG.shape[1] * GRID
    drawn_RZ = np.random.default_rng(0).integers(0, len(ours_ZG), size=(RESAMPLES, len(ours_ZG)))
    asng_RG = asng_ZG[drawn_RZ].mean(axis=1)
    found = []
    for count in COUNTS:
        at_Z = ours_ZG[:, count // GRID - 1]
        needed = first_within(asng_ZG.mean(axis=0), float(at_Z.mean()))
        below_RG = asng_RG <= at_Z[drawn_RZ].mean(axis=1)[:, None]
        needed_R = np.where(below_RG.any(axis=1), (below_RG.argmax(axis=1) + 1) * GRID, most)
        upper = float(np.quantile(count / needed_R, 0.975))
        found.append(Saving(count, needed, count / (needed or most), upper, needed is None))
    return found


# --------------------------------------------------------------------------------------------------- verdicts


def summary(results: Mapping[str, Results], target: float) -> Json:
    """All numbers of the comparison, for the record."""
    return {
        "counts": list(COUNTS),
        "target": target,
        "methods": {name: _summary_of(name, found, results[OURS], target) for name, found in results.items()},
        "share_of_asng": {
            quality: [saving._asdict() for saving in savings(results[OURS], results[ASNG], quality)]
            for quality in results[OURS].course
            if ASNG in results
        },
    }


def _summary_of(name: str, found: Results, ours: Results, target: float) -> Json:
    record: Json = {"seconds_per_search": round(found.seconds, 3)}
    for key, regret_ZEK in found.regret.items():
        mean_ZE, ours_ZE = regret_ZEK.mean(axis=2), ours.regret[key].mean(axis=2)
        record[" by ".join(key)] = {
            "regret": _rounded(mean_ZE.mean(axis=0)),
            "interval": _rounded(interval(mean_ZE)),
            "regret_per_tier": _rounded(regret_ZEK.mean(axis=0)),
            **({} if name == OURS else _lead(ours_ZE, mean_ZE)),
        }
    record["evaluations_to_target"] = to_target(found, target)._asdict()
    record["hypervolume"] = _rounded(found.hypervolume_ZE.mean(axis=0))
    record["hypervolume_interval"] = _rounded(interval(found.hypervolume_ZE))
    return record


def _lead(ours_ZE: FloatArray, theirs_ZE: FloatArray) -> Json:
    return {
        "lead_of_importance": _rounded((theirs_ZE - ours_ZE).mean(axis=0)),
        "lead_interval": _rounded(interval(theirs_ZE - ours_ZE)),
        "p_importance_is_lower": _rounded(p_lower(ours_ZE, theirs_ZE), 6),
    }


def _rounded(values: FloatArray, digits: int = 4) -> list[object]:
    return list(np.round(values, digits).tolist())


def targets_of(results: Mapping[str, Results]) -> list[Target]:
    """Below every peer at every count, and at most a third of ASNG's evaluations."""
    ours, targets = results[OURS], []
    for quality, pick in ours.regret:
        ours_ZE = ours.regret[quality, pick].mean(axis=2)
        for name, theirs in results.items():
            if name != OURS:
                p_E = p_lower(ours_ZE, theirs.regret[quality, pick].mean(axis=2))
                targets.append(_below(f"{quality} by {pick}, below {name}", p_E))
    if ASNG in results:
        for quality in ours.course:
            found = savings(ours, results[ASNG], quality)
            worst = max(found, key=lambda saving: saving.ratio)
            share = f"{'<' if worst.bound else ''}{worst.ratio:.2f} (≤ {worst.upper:.2f})"
            targets.append(
                Target(
                    f"{quality}, share of {ASNG}'s evaluations at every count",
                    f"≤ {WANTED_RATIO:.2f}",
                    f"{share} at {worst.evaluations}",
                    worst.ratio <= WANTED_RATIO + 1e-9,
                )
            )
    return targets


def _below(name: str, p_E: FloatArray) -> Target:
    held = [count for count, p in zip(COUNTS, p_E, strict=True) if p < ALPHA]
    missed = [str(count) for count in COUNTS if count not in held]
    came = f"{len(held)} of {len(COUNTS)}" + (f", not at {', '.join(missed)}" if missed else "")
    return Target(name, f"p < {ALPHA} at all {len(COUNTS)}", came, not missed)


def regret_table(results: Mapping[str, Results], quality: str, pick: str) -> str:
    """Mean over tiers and seeds with half its interval, per count; * where ours is lower by the test."""
    ours_ZE = results[OURS].regret[quality, pick].mean(axis=2)
    rows = []
    for name, found in results.items():
        mean_ZE = found.regret[quality, pick].mean(axis=2)
        low_E, high_E = interval(mean_ZE)
        p_E = np.ones(len(COUNTS)) if name == OURS else p_lower(ours_ZE, mean_ZE)
        cells = zip(mean_ZE.mean(axis=0), (high_E - low_E) / 2, p_E, strict=True)
        marks = [f"{mean:.3f} ± {half:.3f}{'*' if p < ALPHA else ''}" for mean, half, p in cells]
        rows.append([name, *marks, f"{found.seconds:.1f}"])
    return markdown_table([f"{quality} by {pick}", *map(str, COUNTS), "s"], rows)


def savings_table(results: Mapping[str, Results]) -> str:
    rows = []
    for quality in results[OURS].course:
        found = savings(results[OURS], results[ASNG], quality)
        rows.append([quality, *(f"{'<' if s.bound else ''}{s.ratio:.2f} (≤ {s.upper:.2f})" for s in found)])
    return markdown_table(["share of ASNG's evaluations", *map(str, COUNTS)], rows)


def hypervolume_table(results: Mapping[str, Results]) -> str:
    rows = [
        [name, *(f"{v:.4g}" for v in found.hypervolume_ZE.mean(axis=0))] for name, found in results.items()
    ]
    return markdown_table(["hypervolume", *map(str, COUNTS)], rows)


def target_table(results: Mapping[str, Results], target: float) -> str:
    def shown(number: float | None) -> str:
        return f"> {COUNTS[-1]}" if number is None else f"{number:.0f}"

    rows = []
    for name, found in results.items():
        median, low, high, reached = to_target(found, target)
        rows.append([name, shown(median), f"{shown(low)} to {shown(high)}", f"{reached:.0%}"])
    return markdown_table(
        [f"evaluations to a regret of {target:g}", "median", "95 %", "searches there"], rows
    )


def plot(results: Mapping[str, Results], floor: float, path: Path) -> None:
    """The courses with their intervals, a panel per quality; written beside the JSON."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    qualities = results[OURS].course
    figure, axes = pyplot.subplots(1, len(qualities), figsize=(6 * len(qualities), 4.5), squeeze=False)
    for axis, quality in zip(axes[0], qualities, strict=True):
        shown = slice(COUNTS[0] // GRID - 1, COUNTS[-1] // GRID)
        at_G = GRID * np.arange(1, COUNTS[-1] // GRID + 1)[shown]
        for name, found in results.items():
            course_ZG = found.course[quality][:, shown]
            low_G, high_G = interval(course_ZG)
            width = 2.5 if name == OURS else 1.2
            (line,) = axis.plot(at_G, course_ZG.mean(axis=0), label=name, linewidth=width)
            axis.fill_between(at_G, low_G, high_G, alpha=0.15, color=line.get_color(), linewidth=0)
        if quality == "truth" and floor > 0:
            axis.axhline(floor, color="grey", linestyle=":", label="best signal taken")
        axis.set(xlabel="evaluations", ylabel=f"mean regret, {quality}", xscale="log", yscale="log")
        axis.set_xlim(COUNTS[0], COUNTS[-1])
        axis.set_xticks(COUNTS, [str(count) for count in COUNTS])
        axis.set_xticks([], minor=True)
        axis.yaxis.set(major_locator=ticker.LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}")
        axis.yaxis.set_minor_formatter("")
        axis.grid(alpha=0.3, which="both")
    axes[0][-1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
