from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
import pytest

from pipeline.costs.budgets import resolve_tiers
from pipeline.costs.table import SpaceCosts
from pipeline.errors import InfeasibleBudget, ProfileError
from pipeline.spaces.base import SearchSpace
from pipeline.spaces.mbconv import MBConvSpace
from pipeline.types import Arch, FloatArray, Limit, Slot, Tier
from pipeline.units import format_value, parse_limit, parse_value


class Grid:
    """Two slots of ten choices. Named as a space; only what `resolve_tiers` asks for is here."""

    name = "grid"
    slots = (Slot("a", tuple("0123456789")), Slot("b", tuple("0123456789")))
    smallest = Arch("grid", (0, 0))
    largest = Arch("grid", (9, 9))

    def canonical(self, arch: Arch) -> Arch:
        return arch

    def uniform(self) -> Iterator[Arch]:
        return (Arch("grid", (i, i)) for i in range(0, 10, 3))


class Opposed:
    """params rises with the first choice while latency falls with it; the second choice adds to both."""

    metrics = ("params", "latency_ms")
    additive = None

    def of(self, archs: Sequence[Arch]) -> FloatArray:
        rows = [
            (100.0 + 10 * a.choices[0] + a.choices[1], 1.0 - 0.1 * a.choices[0] + a.choices[1]) for a in archs
        ]
        return np.array(rows)


def tier(**limits: str) -> Tier:
    return Tier("here", "small", tuple(parse_limit(name, text, "test") for name, text in limits.items()))


def resolve(*tiers: Tier, **choosing: Any) -> tuple[Tier, ...]:
    return resolve_tiers(tiers, cast(SearchSpace, Grid()), Opposed(), **choosing)


def test_relative_limits_are_shares_of_the_largest_network_and_counts_round_down() -> None:
    space = MBConvSpace((3, 32, 32), 10)
    table = SpaceCosts(space, None)
    largest = dict(zip(table.metrics, table.of([space.largest])[0], strict=True))
    (resolved,) = resolve_tiers([tier(params="33 %", flops="30 M")], space, table)
    params, flops = resolved.limits
    assert params == Limit("params", float(int(0.33 * largest["params"])), False, "33 %")
    assert flops == Limit("flops", 30e6, False, "30 M")
    assert resolved.budgets == {"params": params.value, "flops": 30e6}


def test_the_whole_of_the_largest_network_is_not_rounded_below_it() -> None:
    space = MBConvSpace((3, 32, 32), 10)
    table = SpaceCosts(space, None)
    (resolved,) = resolve_tiers([tier(params="100 %")], space, table)
    assert resolved.budgets["params"] == table.of([space.largest])[0, 0]


def test_a_budget_at_the_smallest_network_is_kept_and_one_below_is_refused() -> None:
    space = MBConvSpace((3, 32, 32), 10)
    table = SpaceCosts(space, None)
    least = table.of([space.smallest])[0, 0]
    resolve_tiers([tier(params=f"{least / 1e3} k")], space, table)
    with pytest.raises(InfeasibleBudget) as caught:
        resolve_tiers([tier(flops="60 M"), tier(params=f"{(least - 1) / 1e3} k")], space, table)
    message = str(caught.value)
    assert "here/small" in message and "params of at most" in message
    named = message.split("below ")[1].split(";")[0]
    assert least <= parse_value("params", named) <= 1.02 * least
    resolve_tiers([tier(params=named)], space, table)


def test_a_relative_budget_is_refused_in_both_forms() -> None:
    space = MBConvSpace((3, 32, 32), 10)
    with pytest.raises(InfeasibleBudget, match=r"1 % \(\S+ k\)"):
        resolve_tiers([tier(params="1 %")], space, SpaceCosts(space, None))


def test_jointly_feasible_only_off_the_smallest_and_uniform_members() -> None:
    exact = {"params": 140.0, "latency_ms": 0.6}
    assert not any(
        (Opposed().of([arch])[0] <= list(exact.values())).all() for arch in [Grid.smallest, *Grid().uniform()]
    )
    (resolved,) = resolve(tier(params="0.141 k", latency="0.601 ms"))
    assert resolved.budgets == pytest.approx({"params": 141.0, "latency_ms": 0.601})


def test_limits_that_conflict_are_named_together() -> None:
    with pytest.raises(InfeasibleBudget) as caught:
        resolve(tier(params="0.12 k", latency="0.4 ms"))
    message = str(caught.value)
    assert "conflict" in message and "0.12 k" in message and "0.4 ms" in message
    assert len(message) < 300


def test_each_limit_alone_is_judged_by_the_whole_space() -> None:
    everything = [Arch("grid", choices) for choices in itertools.product(range(10), repeat=2)]
    fastest = Opposed().of(everything)[:, 1].min()
    resolve(tier(latency=f"{fastest + 1e-6} ms"))
    with pytest.raises(InfeasibleBudget, match="latency_ms of at most") as caught:
        resolve(tier(latency="0.05 ms"))
    assert format_value("latency_ms", fastest * 1.006) in str(caught.value)


def test_a_latency_is_to_be_kept_with_what_choosing_a_network_leaves_free() -> None:
    """Refused before the search, not after it; and what is advised then is enough. Counts are exact."""
    least = 0.1
    with pytest.raises(InfeasibleBudget, match=r"is below (\S+) ms with 2.0% to spare") as caught:
        resolve(tier(latency=f"{least / 0.99} ms"), usable=0.98)
    advised = str(caught.value).split(" is below ")[1].split()[0]
    assert float(advised) >= least / 0.98
    (resolved,) = resolve(tier(latency=f"{advised} ms"), usable=0.98)
    assert resolved.budgets["latency_ms"] == float(advised)
    resolve(tier(params="0.1 k"), usable=0.98)
    both = tier(params="0.14 k", latency="0.601 ms")
    resolve(both)
    with pytest.raises(InfeasibleBudget, match=r"0\.600 ms, and a latency is to be kept with 2\.0% to spare"):
        resolve(both, usable=0.98)


def test_networks_are_judged_by_the_costs_that_choose_them() -> None:
    """Shares of the largest network are of what it is predicted to take, without the margin."""

    class Cautious(Opposed):
        def of(self, archs: Sequence[Arch]) -> FloatArray:
            return super().of(archs) * [1.0, 1.5]

    (resolved,) = resolve(tier(latency="10 %"), chosen_by=Cautious())
    assert resolved.budgets["latency_ms"] == pytest.approx(0.91)
    with pytest.raises(InfeasibleBudget, match="latency_ms of at most"):
        resolve(tier(latency="0.14 ms"), chosen_by=Cautious())


@pytest.mark.parametrize("limits", [{"latency": "0.6 ms"}, {"latency": "30 %"}])
def test_latency_without_a_device_names_the_profile(limits: dict[str, Any]) -> None:
    space = MBConvSpace((3, 32, 32), 10)
    with pytest.raises(ProfileError, match="profile 'here', tier 'small': limits latency_ms"):
        resolve_tiers([tier(**limits)], space, SpaceCosts(space, None))
