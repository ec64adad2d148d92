"""Searches that begin with what an earlier one liked."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pipeline.costs.table import SpaceCosts
from pipeline.errors import StaleArtifact
from pipeline.evaluators.tabular import TableSpace, TabularCosts, TabularEvaluator
from pipeline.progress import NoCheckpoint, Silent
from pipeline.search import METHODS
from pipeline.search.problem import SearchProblem
from pipeline.search.start import WEIGHT, favourites, first_distributions
from pipeline.types import Arch, Candidate, Checkpoint, IntArray, Limit, Slot, Tier

SIZES = (4,) * 5
ROWS = np.indices(SIZES).reshape(len(SIZES), -1).T
MS = ROWS.sum(axis=1) + 1.0
LOSS = np.abs(ROWS - np.array([3, 0, 2, 1, 3])).sum(axis=1).astype(float)
SPACE = TableSpace("toy", [Slot(str(i), tuple("abcd")) for i in range(len(SIZES))])
BEST = Arch("toy", (3, 0, 2, 1, 3))
WARM = sorted(name for name, method in METHODS.items() if method.warm_starts)


def problem(*budgets_ms: float, **changed: Any) -> SearchProblem:
    tiers = tuple(Tier("cpu", f"{ms:g}", (Limit("latency_ms", ms, False, ""),)) for ms in budgets_ms)
    costs: dict[str, TabularCosts | SpaceCosts] = {"cpu": TabularCosts(ROWS, {"latency_ms": MS})}
    return SearchProblem(SPACE, costs, tiers, TabularEvaluator(ROWS, LOSS), **{"evaluations": 30, **changed})


def looked_at(rows_NS: IntArray, losses: Any) -> tuple[Candidate, ...]:
    return tuple(
        Candidate(Arch("toy", tuple(row)), float(loss))
        for row, loss in zip(rows_NS.tolist(), losses, strict=True)
    )


def sampled(count: int, seed: int = 0) -> tuple[Candidate, ...]:
    """What a search on a proxy of another unit may have seen."""
    places = np.random.default_rng(seed).choice(len(ROWS), count, replace=False)
    return looked_at(ROWS[places], 1000 + 7 * LOSS[places])


def first_asked(method: str, asked: SearchProblem, checkpoint: Checkpoint | None = None) -> list[Arch]:
    found = METHODS[method].run(
        asked,
        METHODS[method].config(),
        checkpoint=checkpoint or NoCheckpoint(),
        trace=lambda record: None,
        progress=Silent(),
    )
    return [candidate.arch for candidate in found.candidates]


def test_favourites_keep_the_budget_and_come_in_the_order_of_their_loss() -> None:
    asked = problem(8.0, 16.0, earlier=sampled(400))
    loss_of = {candidate.arch.choices: candidate.loss for candidate in asked.earlier}
    for k, rows_NS in enumerate(favourites(asked)):
        usage_N = asked.usage_of(rows_NS)[:, k]
        assert usage_N.max() <= 1 and usage_N.min() >= 0.5
        losses = [loss_of[tuple(row)] for row in rows_NS.tolist()]
        fit = [c.loss for c in asked.earlier if 0.5 <= asked.usage([c.arch])[0, k] <= 1]
        assert losses == sorted(fit)[: len(losses)] and len(losses) == round(len(fit) / 4)


def test_a_tier_that_nothing_fits_has_no_favourites_and_begins_uniform() -> None:
    dear = looked_at(np.array([[3, 3, 3, 3, 3], [3, 3, 3, 3, 2]]), [1.0, 2.0])
    asked = problem(4.0, 16.0, earlier=dear)
    assert [len(rows_NS) for rows_NS in favourites(asked)] == [0, 2]
    theta_KSC = first_distributions(asked)
    np.testing.assert_allclose(theta_KSC[0], 0.25)
    np.testing.assert_allclose(theta_KSC[1, 0], [*[(1 - WEIGHT) / 4] * 3, (1 - WEIGHT) / 4 + WEIGHT])
    np.testing.assert_allclose(theta_KSC.sum(axis=2), 1)


def test_without_an_earlier_search_there_is_nothing_to_begin_with() -> None:
    assert [rows_NS.shape for rows_NS in favourites(problem(8.0))] == [(0, 5)]
    np.testing.assert_array_equal(first_distributions(problem(8.0)), 0.25)


@pytest.mark.parametrize("method", WARM)
def test_what_was_liked_is_found_sooner(method: str) -> None:
    """The tier's optimum, which the earlier search ranked first among forty."""
    places = np.random.default_rng(1).choice(len(ROWS), 40, replace=False)
    earlier = (*looked_at(ROWS[places], 50 + LOSS[places]), Candidate(BEST, 40.0))

    def asked_before(known: tuple[Candidate, ...]) -> int:
        searches = [first_asked(method, problem(10.0, seed=seed, earlier=known)) for seed in range(6)]
        return sum(asked.index(BEST) if BEST in asked else len(asked) for asked in searches)

    assert asked_before(earlier) < asked_before(())


@pytest.mark.parametrize("method", ["importance", "evolution", "nsga2"])
def test_the_best_of_a_tier_is_asked_for_first(method: str) -> None:
    asked = problem(8.0, 16.0, earlier=sampled(200))
    liked = [Arch("toy", tuple(rows_NS[0].tolist())) for rows_NS in favourites(asked)]
    assert set(liked) <= set(first_asked(method, asked)[:4])


def test_a_checkpoint_of_a_search_that_began_elsewhere_is_refused() -> None:
    kept: dict[str, Any] = {}

    class Kept:
        def load(self) -> Any:
            return kept.get("last")

        def save(self, arrays: Any, record: Any) -> None:
            kept["last"] = (arrays, record)

        def remove(self) -> None:
            kept.clear()

    asked = problem(8.0, earlier=sampled(50))
    first_asked("evolution", asked, Kept())
    with pytest.raises(StaleArtifact, match="another search"):
        first_asked("evolution", replace(asked, earlier=sampled(50, seed=1)), Kept())
