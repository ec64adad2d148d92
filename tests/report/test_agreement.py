"""How far an order agrees with another inside tiers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from pipeline.report.agreement import rank_correlation

LOSSES = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]


def correlate(*groups: tuple[Sequence[float], Sequence[float]]) -> Mapping[str, Any]:
    return rank_correlation(groups).to_json()


def test_perfect_and_reversed_order() -> None:
    falling = [0.9, 0.85, 0.8, 0.5, 0.4, 0.1]
    assert correlate((LOSSES, falling))["rho"] == pytest.approx(1.0)
    assert correlate((LOSSES, falling[::-1]))["rho"] == pytest.approx(-1.0)


def test_one_tier_is_spearman_with_fishers_interval() -> None:
    from scipy.stats import spearmanr

    accuracies = [0.7, 0.9, 0.8, 0.6, 0.65, 0.2]
    found = correlate((LOSSES, accuracies))
    rho = -float(spearmanr(LOSSES, accuracies).statistic)
    assert found["rho"] == pytest.approx(rho)
    assert found["networks"] == 6
    z, spread = math.atanh(rho), 1.96 / math.sqrt(6 - 3)
    assert (found["low"], found["high"]) == (
        pytest.approx(math.tanh(z - spread)),
        pytest.approx(math.tanh(z + spread)),
    )


def test_differences_between_tiers_do_not_count() -> None:
    """Within both tiers the order is reversed, while the better tier has the lower losses."""
    small = ([0.5, 0.6, 0.7], [0.1, 0.2, 0.3])
    large = ([0.1, 0.2, 0.3], [0.7, 0.8, 0.9])
    assert correlate(small, large)["rho"] == pytest.approx(-1.0)


def test_two_tiers_that_disagree_cancel() -> None:
    found = correlate(([1, 2, 3, 4], [4, 3, 2, 1]), ([1, 2, 3, 4], [1, 2, 3, 4]))
    assert found["rho"] == pytest.approx(0.0, abs=1e-12)
    assert found["low"] == pytest.approx(-found["high"]) and found["networks"] == 8


@pytest.mark.parametrize(
    "groups",
    [
        [],
        [([0.1, 0.2, 0.3], [0.3, 0.2, 0.1])],  # too few
        [([0.1], [0.9])] * 8,  # nothing to compare within a tier
        [(LOSSES, [0.5] * 6)],  # accuracies do not vary
        [([0.3] * 6, LOSSES)],  # losses do not vary
    ],
)
def test_nothing_to_say_is_none_not_nan(groups: list[tuple[list[float], list[float]]]) -> None:
    found = rank_correlation(groups)
    assert (found.rho, found.low, found.high) == (None, None, None)
