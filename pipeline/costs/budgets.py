"""Budgets made absolute, and refused before a search when no network of the space can keep them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from pipeline.costs.memory import MEMORY
from pipeline.costs.table import LATENCY
from pipeline.errors import InfeasibleBudget, ProfileError
from pipeline.spaces.base import SearchSpace
from pipeline.types import Arch, CostTable, FloatArray, Limit, Tier
from pipeline.units import format_value

_COUNTED = ("params", "flops", "weight_bytes", MEMORY)
_SHOWN_MARGIN = 1.006
"""Above the half per cent that three shown digits can round away: asking for the shown value is feasible."""


def resolve_tiers(
    tiers: Sequence[Tier],
    space: SearchSpace,
    table: CostTable,
    *,
    chosen_by: CostTable | None = None,
    usable: float = 1.0,
) -> tuple[Tier, ...]:
    """The same tiers with absolute limits, each kept by at least one network of the space.

    A relative limit is a share of what the space's largest network costs; counts are rounded down. Networks
    will be chosen by the costs in `chosen_by` (by default `table`), which may use the share `usable` of a
    latency limit: what stays free is for what a network that was timed once may take another time. Raises
    ProfileError when a limited metric is not in the cost table (no device, so no latency; a space whose
    memory cannot be told before a network is built), InfeasibleBudget when a tier cannot be kept, naming the
    nearest reachable value or the limits that conflict.
    """
    largest = dict(zip(table.metrics, table.of([space.largest])[0], strict=True))
    resolved = tuple(_absolute(tier, space, largest) for tier in tiers)
    for tier in resolved:
        _check_feasible(tier, space, table if chosen_by is None else chosen_by, usable)
    return resolved


def _absolute(tier: Tier, space: SearchSpace, largest: Mapping[str, float]) -> Tier:
    for limit in tier.limits:
        if limit.metric not in largest:
            advice = "name an execution provider in the profile to measure latency, or limit something else"
            if limit.metric == MEMORY:
                advice = f"space {space.name} does not tell memory before a network is built; limit weights"
            raise ProfileError(
                f"profile '{tier.device}', tier '{tier.name}': limits {limit.metric} to {limit.stated}, but "
                f"only {', '.join(largest)} are known there; {advice}"
            )
    return dataclasses.replace(tier, limits=tuple(_resolved(limit, largest) for limit in tier.limits))


def _resolved(limit: Limit, largest: Mapping[str, float]) -> Limit:
    if not limit.relative:
        return limit
    value = float(limit.value * largest[limit.metric])
    # A share such as 30 % is not a binary fraction: forgive the last bit before rounding down.
    value = math.floor(value * (1 + 1e-12)) if limit.metric in _COUNTED else value
    return dataclasses.replace(limit, value=float(value), relative=False)


def _check_feasible(tier: Tier, space: SearchSpace, table: CostTable, usable: float) -> None:
    shares = {metric: usable if metric == LATENCY else 1.0 for metric in tier.budgets}
    budgets = {metric: limit * shares[metric] for metric, limit in tier.budgets.items()}
    nearest, excess = _cheapest(space, table, budgets)
    if excess <= 1.0:
        return
    for limit in tier.limits:
        metric, share = limit.metric, shares[limit.metric]
        least, excess = _cheapest(space, table, {metric: budgets[metric]})
        if excess > 1.0:
            reachable = format_value(metric, least[metric] / share * _SHOWN_MARGIN)
            raise InfeasibleBudget(
                f"tier '{tier.key}': {metric} of at most {_shown(limit)} was asked, and no network of space "
                f"{space.name} is below {reachable}{_to_spare(share)}; ask for at least that, or take a "
                "smaller space (mbconv: space.size) or input"
            )
    asked = " and ".join(f"{limit.metric} of at most {_shown(limit)}" for limit in tier.limits)
    came = " with ".join(format_value(limit.metric, nearest[limit.metric]) for limit in tier.limits)
    raise InfeasibleBudget(
        f"tier '{tier.key}': its limits conflict: {asked} can each be kept, but not together; the nearest "
        f"network found has {came}{_to_be_kept(shares)}: loosen one of them"
    )


def _to_spare(share: float) -> str:
    return f" with {1 - share:.1%} to spare" if share < 1 else ""


def _to_be_kept(shares: Mapping[str, float]) -> str:
    share = shares.get(LATENCY, 1.0)
    return f", and a latency is to be kept{_to_spare(share)}" if share < 1 else ""


def _shown(limit: Limit) -> str:
    value = format_value(limit.metric, limit.value)
    return f"{limit.stated} ({value})" if "%" in limit.stated else limit.stated


def _cheapest(
    space: SearchSpace, table: CostTable, budgets: Mapping[str, float]
) -> tuple[dict[str, float], float]:
    """Costs of the network whose largest cost-to-budget ratio is least, and that ratio.

    Coordinate descent over slots from the best of the smallest and the uniform members: exact where the costs
    rise along each slot's choices, and for a single metric that is the sum of slots' costs."""
    columns = [table.metrics.index(metric) for metric in budgets]
    limits = list(budgets.values())

    def ratios(archs: Sequence[Arch]) -> FloatArray:
        worst: FloatArray = (table.of(archs)[:, columns] / limits).max(axis=1)
        return worst

    starts = [space.canonical(space.smallest), *space.uniform()]
    excess = ratios(starts)
    best, least = starts[int(excess.argmin())], float(excess.min())
    improved = least > 1.0
    while improved:
        around = _neighbours(space, best)
        excess = ratios(around)
        improved = bool(excess.min() < least)
        if improved:
            best, least = around[int(excess.argmin())], float(excess.min())
    return dict(zip(table.metrics, table.of([best])[0].tolist(), strict=True)), least


def _neighbours(space: SearchSpace, arch: Arch) -> list[Arch]:
    """The architecture itself and all that differ in one choice."""
    return [arch] + [
        space.canonical(
            dataclasses.replace(arch, choices=(*arch.choices[:slot], other, *arch.choices[slot + 1 :]))
        )
        for slot, current in enumerate(arch.choices)
        for other in range(len(space.slots[slot].choices))
        if other != current
    ]


def usage_of_budgets(table: CostTable, tier: Tier, archs: Sequence[Arch]) -> FloatArray:
    """Share of the tier's budget that architectures take, the largest over its limits, shape (N,)."""
    costs_NM = table.of(archs)
    shares = [costs_NM[:, table.metrics.index(metric)] / limit for metric, limit in tier.budgets.items()]
    return np.asarray(np.max(shares, axis=0), dtype=np.float64)
