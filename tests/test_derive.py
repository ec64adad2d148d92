"""Which architecture a tier gets: bands, finalists, order, refitting, and the refusals."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from pipeline.derive import (
    LOOKED_AT,
    REFITS,
    Deriver,
    DeriveSettings,
    Finalist,
    Remembered,
    Trial,
    Usage,
    band,
    choose_finalists,
    in_order,
)
from pipeline.errors import BudgetMissed, InfeasibleBudget
from pipeline.evaluators.tabular import TableSpace, TabularEvaluator
from pipeline.progress import Silent
from pipeline.types import Arch, FloatArray, LatencyRecord, Limit, Slot, Tier

BUDGET_MS = 2.0
ARCHS = [Arch("t", (i,)) for i in range(40)]
LOSS = np.array([(7 * i) % 40 for i in range(40)], dtype=float)  # every value once, in no order
SETTINGS = DeriveSettings(low=0.95, least=0.92, rescored=6, best=2, random=1, uniform=1)


def record(latency_ms: float) -> LatencyRecord:
    return LatencyRecord(latency_ms, latency_ms, latency_ms, 0.0, 9, 3, 0, latency_ms, 1.0, "0" * 64)


def finalist(number: int, loss: float = 1.0, usage: float = 0.97) -> Finalist:
    return Finalist(ARCHS[number], loss, usage, "search")


# ------------------------------------------------------------------------------------------------- the pieces


def test_the_band_is_what_uses_nearly_all_of_the_budget() -> None:
    usage_N = np.array([0.5, 0.95, 0.97, 0.985, 0.99, 1.2, 0.96])
    assert band(usage_N, usage_N <= 0.985, 0.95, least=2).tolist() == [1, 2, 3, 6]


def test_the_band_widens_downwards_to_the_nearest() -> None:
    usage_N = np.array([0.5, 0.97, 0.9, 0.8, 0.99, 1.2])
    fits_N = usage_N <= 0.985
    assert band(usage_N, fits_N, 0.95, least=3).tolist() == [1, 2, 3]
    assert band(usage_N, fits_N, 0.95, least=9).tolist() == [0, 1, 2, 3]
    assert band(usage_N, np.zeros(6, dtype=bool), 0.95, least=1).tolist() == []


def test_finalists_are_the_best_the_best_uniform_and_a_random_one() -> None:
    archs, losses_N, usage_N = ARCHS[:8], LOSS[:8], np.linspace(0.95, 0.98, 8)
    uniform = frozenset([ARCHS[0], ARCHS[5], ARCHS[7]])  # losses 0, 35, 9
    chosen = choose_finalists(archs, losses_N, usage_N, usage_N / 2, np.arange(8.0), uniform, SETTINGS)
    assert [(f.arch.choices[0], f.origin) for f in chosen[:3]] == [
        (0, "search"),
        (6, "search"),  # 42 mod 40 = 2
        (7, "uniform"),  # the best uniform one that is not there already
    ]
    assert chosen[3].origin == "random" and len({f.arch for f in chosen}) == 4
    assert chosen[1] == Finalist(ARCHS[6], 2.0, usage_N[6], "search", usage_N[6] / 2)


def test_random_finalists_follow_the_generator() -> None:
    def drawn(seed: int) -> tuple[Finalist, ...]:
        luck_N = np.random.default_rng(seed).random(40)
        return choose_finalists(ARCHS, LOSS, np.full(40, 0.97), np.zeros(40), luck_N, frozenset(), SETTINGS)

    assert drawn(1) == drawn(1)
    assert len({drawn(seed)[-1].arch for seed in range(9)}) > 1


def test_fewer_candidates_than_finalists_are_all_taken_once() -> None:
    chosen = choose_finalists(
        ARCHS[:2], LOSS[:2], np.full(2, 0.96), np.zeros(2), np.zeros(2), frozenset(ARCHS), SETTINGS
    )
    assert sorted(f.arch.choices[0] for f in chosen) == [0, 1]


def test_order_is_accuracy_among_those_that_use_their_budget() -> None:
    trials = [
        Trial(finalist(0), measured_usage=0.97, accuracy=0.8),
        Trial(finalist(1), measured_usage=0.96, accuracy=0.9),
        Trial(finalist(2), measured_usage=0.80, accuracy=0.99),  # leaves a fifth of the budget unused
        Trial(finalist(3), measured_usage=0.995, accuracy=1.0),  # inside the guard
        Trial(finalist(4), measured_usage=1.1, accuracy=1.0),
    ]
    assert [t.finalist.arch.choices[0] for t in in_order(trials, SETTINGS)] == [1, 0, 2]


def test_a_larger_guard_moves_the_band_down() -> None:
    """Nothing that is aimed at would keep it otherwise."""
    moved = DeriveSettings(guard=0.03).below_guard()
    assert (moved.high, moved.low, moved.least) == pytest.approx((0.97, 0.96, 0.955))
    assert DeriveSettings().below_guard() == DeriveSettings()


def test_untried_finalists_are_ordered_by_loss_and_need_no_guard_where_nothing_is_timed() -> None:
    trials = [Trial(finalist(0, 0.5, 0.999)), Trial(finalist(1, 0.4, 0.98)), Trial(finalist(2, 0.1, 1.01))]
    assert [t.finalist.arch.choices[0] for t in in_order(trials, SETTINGS)] == [1, 0]


def test_trials_survive_json() -> None:
    whole = Trial(Finalist(ARCHS[3], 1.0, 0.97, "random", 0.5), 0.96, 0.75, 0.965)
    for trial in (Trial(finalist(3)), whole):
        assert Trial.from_json(trial.to_json()) == trial


# ----------------------------------------------------------------------------------------------- a whole tier


@dataclass
class FakeDevice:
    """Latencies by rule, and what was asked for."""

    ms: Callable[[Arch], float]
    shipped_ms: Callable[[Arch], float] | None = None
    timed: list[Arch] = field(default_factory=list)
    shipped: list[Arch] = field(default_factory=list)

    def time(self, archs: Sequence[Arch]) -> list[LatencyRecord]:
        self.timed += archs
        return [record(self.ms(arch)) for arch in archs]

    def time_as_shipped(self, archs: Sequence[Arch]) -> list[LatencyRecord]:
        self.shipped += archs
        return [record((self.shipped_ms or self.ms)(arch)) for arch in archs]


def usage_of(ms: Callable[[Arch], float]) -> Usage:
    def usage(archs: Sequence[Arch]) -> FloatArray:
        return np.array([ms(arch) / BUDGET_MS for arch in archs])

    return usage


def true_ms(arch: Arch) -> float:
    """From 0.05 ms to 2 ms."""
    return 0.05 * (arch.choices[0] + 1)


def no_refit(archs: Sequence[Arch], measured_ms: Sequence[float]) -> Usage:
    raise AssertionError("there was no need to fit again")


def nobody_is_trained(archs: Sequence[Arch]) -> list[float]:
    raise AssertionError("nobody was to be trained in full")


def deriver(**changed: Any) -> Deriver:
    rows = np.arange(40).reshape(-1, 1)
    tier = Tier("cpu", "s", (Limit("latency_ms", BUDGET_MS, False, "2 ms"),))
    made: dict[str, Any] = {
        "tier": tier,
        "space": TableSpace("t", [Slot("only", tuple(map(str, range(40))))]),
        "settings": SETTINGS,
        "ranker": Remembered(TabularEvaluator(rows, LOSS), Silent()),
        "uniform": frozenset(ARCHS[::10]),
        "device": FakeDevice(true_ms),
        "counted": lambda archs: np.zeros(len(archs)),
        "refit": no_refit,
        "try_accuracies": None,
        "train_accuracies": nobody_is_trained,
        "say": lambda message: None,
    }
    return Deriver(**{**made, **changed})


def test_an_evaluator_is_asked_about_each_architecture_once() -> None:
    asked: list[tuple[Arch, bool]] = []

    class Listens(TabularEvaluator):
        def losses(self, archs: Sequence[Arch], *, step: int, thorough: bool = False) -> FloatArray:
            asked.extend((arch, thorough) for arch in archs)
            return super().losses(archs, step=step, thorough=thorough)

    known = Remembered(Listens(np.arange(40).reshape(-1, 1), LOSS), Silent())
    np.testing.assert_array_equal(known.quick([ARCHS[3], ARCHS[1], ARCHS[3]]), [LOSS[3], LOSS[1], LOSS[3]])
    np.testing.assert_array_equal(known.quick(ARCHS[:4]), LOSS[:4])
    np.testing.assert_array_equal(known.thorough(ARCHS[:2]), LOSS[:2])
    assert known.quick([]).shape == (0,)
    assert len(asked) == len(set(asked)) == 6


def test_a_long_list_is_judged_in_lots_and_the_answers_keep_their_order() -> None:
    shown: list[tuple[str, int, list[int]]] = []

    class Shows(Silent):
        @contextmanager
        def track(self, label: str, total: int, done: int = 0) -> Iterator[Callable[[int, str], None]]:
            lots: list[int] = []
            shown.append((label, total, lots))
            yield lambda steps, note: lots.append(steps)

    known = Remembered(TabularEvaluator(np.arange(40).reshape(-1, 1), LOSS), Shows())
    np.testing.assert_array_equal(known.quick(ARCHS[::-1]), LOSS[::-1])
    np.testing.assert_array_equal(known.quick(ARCHS), LOSS)
    assert shown == [("rank", 40, [16, 16, 8])]


PARAMS = Tier("params", "s", (Limit("params", 100.0, False, "100"),))


def nothing(archs: Sequence[Arch]) -> FloatArray:
    """The share of a budget that there is not."""
    return np.zeros(len(archs))


def rng() -> np.random.Generator:
    return np.random.default_rng(3)


def test_the_best_by_loss_of_the_band_wins_where_nobody_trains() -> None:
    device = FakeDevice(true_ms)
    arch, timed, trials = deriver(device=device).derive(ARCHS, usage_of(true_ms), rng())
    # Six candidates are rescored: 34..38 use 0.875..0.975 of the budget, 33 widens the band.
    members = {33, 34, 35, 36, 37, 38}
    in_use = [t for t in trials if t.usage >= SETTINGS.least]
    assert {t.finalist.arch.choices[0] for t in trials} <= members
    assert arch == min(in_use, key=lambda t: t.finalist.loss).finalist.arch
    assert timed is not None and timed.latency_ms == true_ms(arch) and device.shipped == [arch]


def test_brief_training_overrules_the_evaluator() -> None:
    tried: list[Arch] = []

    def accuracy(archs: Sequence[Arch]) -> list[float]:
        tried.extend(archs)
        return [arch.choices[0] / 100 for arch in archs]

    content = SETTINGS.model_copy(update={"least": 0.8})
    made = deriver(settings=content, try_accuracies=accuracy)
    arch, _, trials = made.derive(ARCHS, usage_of(true_ms), rng())
    assert arch == max(t.finalist.arch for t in trials)
    assert sorted(tried) == sorted(t.finalist.arch for t in trials) and len(tried) > 2


@pytest.mark.parametrize("tried", [True, False])
def test_full_training_of_the_best_few_overrules_what_they_were_chosen_by(tried: bool) -> None:
    trained: list[Arch] = []

    def brief(archs: Sequence[Arch]) -> list[float]:
        return [arch.choices[0] / 100 for arch in archs]

    def full(archs: Sequence[Arch]) -> list[float]:
        trained.extend(archs)
        return [0.9 - 0.01 * place for place in reversed(range(len(archs)))]  # the last is the best

    device = FakeDevice(true_ms)
    settings = SETTINGS.model_copy(update={"least": 0.8, "contenders": 2})
    made = deriver(
        settings=settings, device=device, try_accuracies=brief if tried else None, train_accuracies=full
    )
    arch, timed, trials = made.derive(ARCHS, usage_of(true_ms), rng())
    by_brief = sorted((t.finalist.arch for t in trials), reverse=True)
    by_loss = [t.finalist.arch for t in sorted(trials, key=lambda t: t.finalist.loss)]
    assert len(trials) > 2 and trained == (by_brief if tried else by_loss)[:2]
    assert arch == trained[-1] and timed is not None
    assert {t.finalist.arch for t in trials if t.full_accuracy is not None} == set(trained)
    assert set(trained) <= set(device.shipped)
    assert [Trial.from_json(trial.to_json()) for trial in trials] == trials


def test_without_a_device_nothing_is_timed_and_prediction_counts() -> None:
    made = deriver(tier=PARAMS, device=None, counted=usage_of(true_ms))
    arch, timed, trials = made.derive(ARCHS, nothing, rng())
    assert timed is None and all(t.measured_usage is None for t in trials)
    assert arch in [t.finalist.arch for t in trials]


@pytest.mark.parametrize("device", [None, FakeDevice(lambda arch: 0.5 * true_ms(arch))])
def test_what_is_counted_is_exact_and_may_be_used_up(device: FakeDevice | None) -> None:
    """Alone, and beside a latency of which half is used."""
    one = {"low": 0.98, "high": 0.985, "rescored": 1, "best": 1, "random": 0, "uniform": 0}
    only = SETTINGS.model_copy(update=one)
    timed = usage_of(device.ms) if device else nothing
    tier = {} if device else {"tier": PARAMS}
    made = deriver(device=device, settings=only, counted=usage_of(true_ms), **tier)
    arch, _, [trial] = made.derive(ARCHS, timed, rng())
    assert arch == ARCHS[39] and trial.usage == 1.0
    over = deriver(device=device, counted=lambda archs: 1.0005 * usage_of(true_ms)(archs), **tier)
    _, _, trials = over.derive(ARCHS, timed, rng())
    assert all(trial.usage <= 1 for trial in trials) and ARCHS[39] not in {t.finalist.arch for t in trials}


def test_a_band_that_the_search_left_empty_is_filled_by_walking() -> None:
    """All that the search has seen takes half of the budget; the space has what takes nearly all of it."""
    arch, timed, trials = deriver().derive(ARCHS[:20], usage_of(true_ms), rng())
    assert timed is not None and SETTINGS.least <= timed.latency_ms / BUDGET_MS <= 0.985
    assert arch not in ARCHS[:20] and all(trial.keeps_budget(0.0) for trial in trials)


def test_many_of_a_band_are_looked_at_and_most_that_are_timed_are_its_best() -> None:
    """Every network takes the same, so the band is the space."""
    device = FakeDevice(lambda arch: 0.98 * BUDGET_MS)
    settings = SETTINGS.model_copy(update={"rescored": 8, "best": 8, "random": 0, "uniform": 0})
    made = deriver(device=device, settings=settings)
    made.derive(ARCHS[:20], usage_of(device.ms), rng())
    looked_at, found = LOOKED_AT * settings.rescored, {arch.choices[0] for arch in device.timed}
    assert looked_at > 20, "the pool alone must be too small"
    best_of_pool = sorted(range(20), key=lambda i: LOSS[i])[:6]
    assert len(found & set(best_of_pool)) < 6, "walking must have found better ones"
    assert len({i for i in found if LOSS[i] < 10}) >= 6


def test_a_band_without_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"low \(0\.97\) must be below high \(0\.96\)"):
        DeriveSettings(low=0.97, high=0.96)


def test_a_prediction_that_misses_is_fitted_again_with_what_was_timed() -> None:
    """Networks are 1.3 times as slow as predicted, which a fit to the first finalists finds out."""
    device = FakeDevice(lambda arch: 1.3 * true_ms(arch))
    known: dict[Arch, float] = {}

    def refit(archs: Sequence[Arch], measured_ms: Sequence[float]) -> Usage:
        known.update(zip(archs, measured_ms, strict=True))
        slope = np.mean([ms / true_ms(arch) for arch, ms in known.items()])
        return usage_of(lambda arch: float(slope) * true_ms(arch))

    arch, timed, _ = deriver(device=device, refit=refit).derive(ARCHS, usage_of(true_ms), rng())
    assert timed is not None and 0.9 * BUDGET_MS <= timed.latency_ms <= 0.99 * BUDGET_MS
    assert known and arch not in known
    assert len(device.timed) == len(set(device.timed)), "a network was timed twice"


def test_the_device_is_asked_before_the_evaluator() -> None:
    """Networks are 1.3 times as slow as predicted: the evaluator, which takes its time, hears of none that
    is over the budget."""
    asked: set[Arch] = set()

    class Listens(TabularEvaluator):
        def losses(self, archs: Sequence[Arch], *, step: int, thorough: bool = False) -> FloatArray:
            asked.update(archs)
            return super().losses(archs, step=step, thorough=thorough)

    device = FakeDevice(lambda arch: 1.3 * true_ms(arch))
    listens = Remembered(Listens(np.arange(40).reshape(-1, 1), LOSS), Silent())
    made = deriver(device=device, ranker=listens, refit=lambda archs, ms: usage_of(device.ms))
    made.derive(ARCHS, usage_of(true_ms), rng())
    assert asked and all(device.ms(arch) <= BUDGET_MS for arch in asked)


def test_a_budget_that_would_stay_unused_is_a_miss_too() -> None:
    """Networks are 0.8 times as slow as predicted: those that really use the budget are found, and only they
    are trained."""
    device = FakeDevice(lambda arch: 0.8 * true_ms(arch))
    tried: list[Arch] = []

    def accuracies(archs: Sequence[Arch]) -> list[float]:
        tried.extend(archs)
        return [0.5] * len(archs)

    def refit(archs: Sequence[Arch], measured_ms: Sequence[float]) -> Usage:
        slope = np.mean([ms / true_ms(arch) for arch, ms in zip(archs, measured_ms, strict=True)])
        return usage_of(lambda arch: float(slope) * true_ms(arch))

    longer = Tier("cpu", "s", (Limit("latency_ms", 0.75 * BUDGET_MS, False, "1.5 ms"),))
    made = deriver(tier=longer, device=device, refit=refit, try_accuracies=accuracies)
    arch, timed, _ = made.derive(ARCHS, lambda archs: usage_of(true_ms)(archs) / 0.75, rng())
    assert timed is not None and timed.latency_ms >= SETTINGS.least * 0.75 * BUDGET_MS
    assert all(device.ms(arch) >= SETTINGS.least * 0.75 * BUDGET_MS for arch in tried) and arch in tried


def test_where_another_budget_binds_latency_may_stay_unused() -> None:
    """Half of the latency is used, all of the parameters: nothing is fitted again, nothing comes last."""
    device = FakeDevice(lambda arch: 0.5 * true_ms(arch))
    made = deriver(device=device, counted=usage_of(true_ms))
    _, _, trials = made.derive(ARCHS, usage_of(device.ms), rng())
    assert all(trial.usage == trial.finalist.usage for trial in trials)


def test_a_device_that_no_prediction_fits_is_given_up() -> None:
    fits = itertools.count()

    def refit(archs: Sequence[Arch], measured_ms: Sequence[float]) -> Usage:
        next(fits)
        return usage_of(true_ms)

    device = FakeDevice(lambda arch: 2 * BUDGET_MS)
    with pytest.raises(BudgetMissed, match=r"tier cpu/s: every finalist was timed over its budget"):
        deriver(device=device, refit=refit).derive(ARCHS, usage_of(true_ms), rng())
    assert next(fits) <= REFITS and device.shipped == []


def test_finalists_over_budget_are_not_trained() -> None:
    def accuracy(archs: Sequence[Arch]) -> list[float]:
        assert all(true_ms(arch) <= BUDGET_MS for arch in archs)
        return [0.5] * len(archs)

    slow = ARCHS[37]
    device = FakeDevice(lambda arch: 9.0 if arch == slow else true_ms(arch))
    made = deriver(device=device, try_accuracies=accuracy, refit=lambda archs, ms: usage_of(true_ms))
    _, _, trials = made.derive(ARCHS, usage_of(true_ms), rng())
    assert {t.accuracy for t in trials if t.finalist.arch == slow} <= {None}


def test_the_next_one_is_taken_when_the_form_that_ships_misses() -> None:
    said: list[str] = []
    device = FakeDevice(true_ms)
    expected = deriver(device=device).derive(ARCHS, usage_of(true_ms), rng())
    first = device.shipped[0]
    second = FakeDevice(true_ms, lambda arch: 2.1 if arch == first else true_ms(arch))
    arch, timed, trials = deriver(device=second, say=said.append).derive(ARCHS, usage_of(true_ms), rng())
    assert second.shipped == [first, arch] and arch != expected[0]
    over, *others = trials
    assert over.finalist == expected[2][0].finalist and over.shipped_usage == pytest.approx(1.05)
    assert others and all(t.keeps_budget(SETTINGS.guard) for t in others)
    assert timed is not None and timed.latency_ms <= BUDGET_MS
    assert said == [
        "tier cpu/s: a finalist took 2.10 ms of 2.00 ms as it would ship; taking the next one",
    ]


def test_trials_are_for_what_keeps_the_budget_as_it_would_ship() -> None:
    """Odd ones take more in the form that ships; others take their places, and all is timed together."""
    lots: list[int] = []
    tried: list[Arch] = []

    class Lots(FakeDevice):
        def time_as_shipped(self, archs: Sequence[Arch]) -> list[LatencyRecord]:
            lots.append(len(archs))
            return super().time_as_shipped(archs)

    def accuracy(archs: Sequence[Arch]) -> list[float]:
        tried.extend(archs)
        return [arch.choices[0] / 100 for arch in archs]

    device = Lots(
        lambda arch: 0.98 * BUDGET_MS, lambda arch: (1.0 if arch.choices[0] % 2 else 0.97) * BUDGET_MS
    )
    made = deriver(
        device=device, try_accuracies=accuracy, settings=SETTINGS.model_copy(update={"rescored": 12})
    )
    arch, timed, trials = made.derive(ARCHS, usage_of(device.ms), rng())
    assert lots[0] >= SETTINGS.best + SETTINGS.random
    assert tried and all(arch.choices[0] % 2 == 0 for arch in tried) and arch == max(tried)
    assert timed == record(0.97 * BUDGET_MS)
    missed = [t for t in trials if t.finalist.arch.choices[0] % 2]
    assert missed and all(t.accuracy is None and t.shipped_usage == 1.0 for t in missed)
    assert len(device.shipped) == len(set(device.shipped)), "a network was timed twice as it would ship"


@pytest.mark.parametrize(("others", "taken"), [(1.0, 1), (0.5, 0)])
def test_a_form_that_ships_and_leaves_much_unused_waits_for_the_others(others: float, taken: int) -> None:
    """The first finalist takes 0.7 times what it was timed at; others what they were, or still less."""
    said: list[str] = []
    expected = FakeDevice(true_ms)
    deriver(device=expected).derive(ARCHS, usage_of(true_ms), rng())
    first = expected.shipped[0]
    device = FakeDevice(true_ms, lambda arch: (0.7 if arch == first else others) * true_ms(arch))
    arch, timed, _ = deriver(device=device, say=said.append).derive(ARCHS, usage_of(true_ms), rng())
    assert timed is not None and timed.latency_ms == device.shipped_ms(arch)  # type: ignore[misc]
    assert device.shipped[0] == first and (arch != first) == bool(taken)
    assert len(said) == (1 if taken else len(device.shipped))
    assert (
        "a finalist took only 1." in said[0] and "of 2.00 ms as it would ship; taking the next one" in said[0]
    )


@pytest.mark.parametrize("tries", [True, False])
def test_where_all_forms_that_ship_leave_much_unused_the_one_that_uses_most_is_taken(tries: bool) -> None:
    """It is neither the first by loss nor the most accurate."""
    device = FakeDevice(
        lambda arch: 0.98 * BUDGET_MS, lambda arch: (0.8 if arch == ARCHS[9] else 0.5) * BUDGET_MS
    )
    few = TableSpace("t", [Slot("only", tuple(map(str, range(6, 10))))])
    accuracy = (lambda archs: [1.0 - arch.choices[0] / 100 for arch in archs]) if tries else None
    made = deriver(device=device, space=few, try_accuracies=accuracy)
    arch, timed, trials = made.derive(ARCHS[6:10], usage_of(device.ms), rng())
    assert arch == ARCHS[9] and timed == record(0.8 * BUDGET_MS)
    assert [t.finalist.arch for t in trials if t.accuracy is not None] == ([arch] if tries else [])


def test_trials_are_not_for_what_leaves_much_unused_either() -> None:
    tried: list[Arch] = []

    def accuracy(archs: Sequence[Arch]) -> list[float]:
        tried.extend(archs)
        return [0.5] * len(archs)

    device = FakeDevice(
        lambda arch: 0.98 * BUDGET_MS, lambda arch: (0.5 if LOSS[arch.choices[0]] < 3 else 0.97) * 2
    )
    made = deriver(device=device, try_accuracies=accuracy)
    _, timed, trials = made.derive(ARCHS, usage_of(device.ms), rng())
    assert timed == record(0.97 * BUDGET_MS) and tried and all(LOSS[arch.choices[0]] >= 3 for arch in tried)
    assert min(LOSS[t.finalist.arch.choices[0]] for t in trials) < 3, "it was a finalist, and told"


def test_what_uses_less_is_taken_where_nothing_else_is_left_to_look_for() -> None:
    """Three are predicted alike. One is slower, one faster, so others are looked for, and there are none. The
    one that hits is over as it would ship."""
    few = TableSpace("t", [Slot("only", tuple(map(str, range(3))))])
    timed, shipped = (0.98, 1.06, 0.90), (1.1, 1.2, 0.91)
    device = FakeDevice(
        lambda arch: timed[arch.choices[0]] * BUDGET_MS, lambda arch: shipped[arch.choices[0]] * BUDGET_MS
    )
    made = deriver(device=device, space=few, refit=lambda archs, ms: usage_of(device.ms))
    arch, latency, _ = made.derive(ARCHS[:3], usage_of(lambda arch: 0.98 * BUDGET_MS), rng())
    assert arch == ARCHS[2] and latency == record(0.91 * BUDGET_MS) and device.shipped == [ARCHS[0], arch]


def test_a_random_finalist_stays_when_others_are_gone() -> None:
    """Odd ones take more as they would ship. Who is timed so is a finalist, or was one."""
    device = FakeDevice(
        lambda arch: 0.98 * BUDGET_MS, lambda arch: (1.0 if arch.choices[0] % 2 else 0.97) * BUDGET_MS
    )
    settings = SETTINGS.model_copy(update={"rescored": 24, "best": 4, "random": 2})
    made = deriver(device=device, settings=settings, try_accuracies=lambda archs: [0.5] * len(archs))
    _, _, trials = made.derive(ARCHS, usage_of(device.ms), rng())
    assert {trial.finalist.arch for trial in trials} == set(device.shipped)


def test_no_form_that_ships_keeps_the_budget() -> None:
    device = FakeDevice(true_ms, lambda arch: 0.995 * BUDGET_MS)  # inside the guard
    with pytest.raises(BudgetMissed, match="derive.low and derive.high lower"):
        deriver(device=device, refit=lambda archs, ms: usage_of(true_ms)).derive(
            ARCHS, usage_of(true_ms), rng()
        )
    assert len(device.shipped) == len(set(device.shipped)) > 4, "a network was timed twice as it would ship"


def test_where_all_forms_that_ship_miss_others_that_use_less_are_found() -> None:
    """What ships takes 4 % more than what was timed."""
    device = FakeDevice(true_ms, lambda arch: 1.04 * true_ms(arch))
    made = deriver(
        device=device,
        settings=SETTINGS.model_copy(update={"rescored": 2, "best": 2}),
        refit=lambda archs, ms: usage_of(true_ms),
    )
    arch, timed, trials = made.derive(ARCHS, usage_of(true_ms), rng())
    assert timed is not None and 0.9 * BUDGET_MS <= timed.latency_ms <= 0.985 * BUDGET_MS
    assert len(device.shipped) > 1 and {arch, *device.shipped} <= {trial.finalist.arch for trial in trials}


def test_prediction_that_no_fit_mends_is_scaled_to_what_was_timed() -> None:
    """Whatever is predicted to fit takes 5 % more than that."""
    device = FakeDevice(lambda arch: 1.05 * true_ms(arch))
    made = deriver(device=device, refit=lambda archs, ms: usage_of(true_ms))
    _, timed, trials = made.derive(ARCHS, usage_of(true_ms), rng())
    assert timed is not None and SETTINGS.least <= timed.latency_ms / BUDGET_MS <= 0.985
    assert len(device.timed) == len(set(device.timed)) >= len(trials), "a network was timed twice"


def test_a_space_whose_members_were_all_timed_is_given_up() -> None:
    device = FakeDevice(lambda arch: 1.2 * BUDGET_MS)
    few = TableSpace("t", [Slot("only", tuple(map(str, range(36, 39))))])
    made = deriver(device=device, space=few, refit=lambda archs, ms: usage_of(true_ms))
    with pytest.raises(BudgetMissed, match="every finalist was timed over its budget"):
        made.derive(ARCHS[36:39], usage_of(true_ms), rng())
    assert device.shipped == []


def test_a_budget_below_everything_says_how_near_the_best_came() -> None:
    with pytest.raises(InfeasibleBudget, match=r"tier cpu/s: .* the nearest takes 1\.2 times"):
        deriver().derive(ARCHS, usage_of(lambda arch: 2.4 + true_ms(arch) - 0.05), rng())
