"""Architectures that use most of a tier's budget. Axes: K tiers, N architectures, S slots."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.random import Generator

from pipeline.algorithms import categorical, evolution
from pipeline.algorithms.walk import in_band, walk_into_band
from pipeline.errors import InfeasibleBudget
from pipeline.search.problem import STAGE_POOL, SearchProblem
from pipeline.types import BoolArray, FloatArray, IntArray


class BandSampler:
    """Draws architectures of each tier's cost band: those that take `low` to 1 of its budget.

    Members come from a pool of at most `pool_size` random architectures, the whole space if it is not larger.
    A tier with fewer than `least` members there gets four times as many by random walks from the nearest of
    the pool, and where that brings fewer than `least`, a wider band (`low` falls). Deterministic in the
    problem's seed. Raises InfeasibleBudget when no member is found that keeps a tier's budget."""

    def __init__(
        self, problem: SearchProblem, low: float = 0.85, pool_size: int = 20_000, least: int = 32
    ) -> None:
        self._problem = problem
        self._rng = np.random.default_rng([problem.seed, STAGE_POOL, 0])
        pool_NS = self._pool(pool_size)
        usage_NK = problem.usage_of(pool_NS)
        self.members_KNS = [
            self._members(k, pool_NS, usage_NK[:, k], low, least) for k in range(len(problem.tiers))
        ]

    def draw(self, num_per_tier: int, rng: Generator) -> IntArray:
        """`num_per_tier` members of every band, shape (num_per_tier · K, S), the tiers taking turns."""
        drawn = [
            members_NS[rng.integers(len(members_NS), size=num_per_tier)] for members_NS in self.members_KNS
        ]
        return np.stack(drawn, axis=1).reshape(-1, len(self._problem.sizes))

    def draw_of(self, tiers_N: Sequence[int], rng: Generator) -> IntArray:
        """One member of the band of every tier listed, shape (N, S)."""
        return np.stack([self.members_KNS[k][rng.integers(len(self.members_KNS[k]))] for k in tiers_N])

    def mixed_into(self, theta_KSC: FloatArray, weight: float) -> FloatArray:
        """Distributions with so much of the bands' own frequencies of choices, shape (K, S, C)."""
        num_choices = theta_KSC.shape[-1]
        band_KSC = np.stack(
            [categorical.one_hot(rows_NS, num_choices).mean(axis=0) for rows_NS in self.members_KNS]
        )
        return categorical.with_margin((1 - weight) * theta_KSC + weight * band_KSC, self._problem.sizes)

    def draw_from(
        self, theta_KSC: FloatArray, num: int, low: float, rng: Generator, rounds: int = 4
    ) -> IntArray:
        """`num` samples of every p_k that take `low` to 1 of its budget, by rejection, shape (K, num, S); the
        band's own fill up where p_k has hardly any, and draw it back."""
        num_tiers, num_slots = len(theta_KSC), len(self._problem.sizes)
        found_KNS = np.empty((num_tiers, num, num_slots), dtype=np.int64)
        count_K = np.zeros(num_tiers, dtype=np.int64)
        for _ in range(rounds):
            short = np.flatnonzero(count_K < num)
            if not len(short):
                break
            drawn_TNS = categorical.sample(theta_KSC[short], 2 * num, rng)
            fits_TN = self.fits(drawn_TNS.reshape(-1, num_slots), np.repeat(short, 2 * num), low)
            for k, drawn_NS, fits_N in zip(
                short.tolist(), drawn_TNS, fits_TN.reshape(len(short), -1), strict=True
            ):
                kept_NS = drawn_NS[fits_N][: num - count_K[k]]
                found_KNS[k, count_K[k] : count_K[k] + len(kept_NS)] = kept_NS
                count_K[k] += len(kept_NS)
        for k in np.flatnonzero(count_K < num).tolist():
            found_KNS[k, count_K[k] :] = self.draw_of([k] * (num - int(count_K[k])), rng)
        return found_KNS

    def fits(self, choices_NS: IntArray, tier_N: IntArray, low: float) -> BoolArray:
        """Which rows take `low` to 1 of their tier's budget."""
        usage_N = self._problem.usage_in(choices_NS, tier_N)
        return np.asarray((usage_N >= low) & (usage_N <= 1.0))

    def _pool(self, pool_size: int) -> IntArray:
        sizes = self._problem.sizes
        if math.prod(sizes) <= pool_size:
            rows_NS = np.asarray(np.indices(sizes).reshape(len(sizes), -1).T, dtype=np.int64)
        else:
            rows_NS = evolution.random_choices(sizes, pool_size, self._rng)
        return self._distinct(rows_NS)

    def _distinct(self, rows_NS: IntArray) -> IntArray:
        rows_NS = self._problem.canonical(rows_NS)
        return rows_NS[np.sort(evolution.first_of_each(rows_NS))]

    def _members(self, k: int, pool_NS: IntArray, usage_N: FloatArray, low: float, least: int) -> IntArray:
        enough = min(least, max(1, len(pool_NS) // 10))
        if in_band(usage_N, low).sum() < enough:

            def look(rows_NS: IntArray) -> tuple[IntArray, FloatArray]:
                return self._problem.canonical(rows_NS), self._problem.usage_of(rows_NS)[:, k]

            pool_NS, usage_N = walk_into_band(
                pool_NS, usage_N, look, low=low, enough=4 * enough, sizes=self._problem.sizes, rng=self._rng
            )
        while in_band(usage_N, low).sum() < enough and low > 0.01:
            low *= 0.8
        members_NS = pool_NS[in_band(usage_N, low if low > 0.01 else 0.0)]
        if not len(members_NS):
            raise InfeasibleBudget(
                f"tier {self._problem.tiers[k].key}: no architecture found that keeps its budget; "
                f"the nearest takes {usage_N.min():.3g} times as much: raise the budget by that factor"
            )
        return np.asarray(members_NS)
