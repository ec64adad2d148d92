"""What a tier's limits do to a mixture of operations: the pressure of an augmented Lagrangian.

Budgets are ours, the papers of the gradient methods have none. Limits enter as in Nocedal and Wright 2006,
chapter 17: with v_l = log(expected cost / limit), the gradient of everything else is joined by
Σ_l max(0, λ_l + μ v_l) ∇v_l, and λ_l ← max(0, λ_l + rate · v_l) after every step of α. Each ∇v_l is scaled
to the length of the rest, so that multipliers mean the same whatever the loss's slope is: at 1 the limit
pulls as hard as the loss. The expected cost is that of architectures drawn by the mixture's shares; where
a cost table is not additive over the edges, a linear fit to drawn architectures stands for it
(`algorithms/relaxation.py`), renewed as the mixture moves. So any metric can be limited, measured latency
too. An undecided mixture can be cheap in expectation and stand for an architecture that is not, so v_l is
by the larger of the two costs.

Axes: L limits of a tier, E edges, O operations, N architectures.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.random import Generator

from pipeline.algorithms import relaxation
from pipeline.algorithms.relaxation import LinearCost
from pipeline.search.nearest import drawn_by
from pipeline.search.problem import SearchProblem
from pipeline.types import Arch, FloatArray, Json, RelaxedEvaluator, Tier


class Pressure:
    """The limits of one tier. `damping` is μ, `rate` that of the multipliers; `samples` architectures are
    drawn for a linear fit of costs that are not additive."""

    def __init__(
        self,
        problem: SearchProblem,
        evaluator: RelaxedEvaluator,
        tier: Tier,
        *,
        damping: float,
        rate: float,
        samples: int,
    ) -> None:
        self._space, self._evaluator, self._samples = problem.space, evaluator, samples
        self._damping, self._rate = damping, rate
        self._table = problem.costs[tier.device]
        self._metrics = [limit.metric for limit in tier.limits]
        self._columns = [self._table.metrics.index(metric) for metric in self._metrics]
        self._limit_L = np.array([limit.value for limit in tier.limits])
        self._known: dict[Arch, FloatArray] = {}

    @property
    def num_limits(self) -> int:
        return len(self._limit_L)

    def of(
        self, costs: LinearCost, mix_EO: FloatArray, chosen: Arch, multiplier_L: FloatArray, length: float
    ) -> tuple[FloatArray, FloatArray]:
        """The limits' part of the gradient by the mixture, the rest of which has this length, and the
        multipliers after this step. `chosen` is what the mixture stands for."""
        cost_L, gradient_LEO = relaxation.expected_cost(costs, mix_EO)
        cost_L = np.maximum(cost_L, self._cost_of(chosen))
        excess_L = np.clip(np.log(np.maximum(cost_L, 1e-12) / self._limit_L), -1.0, 1.0)
        strength_L = np.maximum(multiplier_L + self._damping * excess_L, 0.0)
        norm_L = np.linalg.norm(gradient_LEO, axis=(1, 2))
        scale_L = np.divide(length * strength_L, norm_L, out=np.zeros_like(norm_L), where=norm_L > 0)
        multiplier_L = np.maximum(multiplier_L + self._rate * excess_L, 0.0)
        return (scale_L[:, None, None] * gradient_LEO).sum(axis=0), multiplier_L

    def linear_costs(self, mix_EO: FloatArray, rng: Generator) -> LinearCost:
        """Exact where the table is additive over the edges, else fitted around this mixture."""
        if self._table.additive is not None and tuple(self._evaluator.edges) == tuple(self._space.slots):
            weight_LEO = np.nan_to_num(self._table.additive[self._columns])
            return LinearCost(np.zeros(self.num_limits), weight_LEO, np.ones(weight_LEO.shape[1:]))
        live_EO = np.asarray(mix_EO > 0, dtype=float)
        drawn, others = (
            [drawn_by(self._evaluator, x_EO, 1.0, rng) for _ in range(self._samples // 2)]
            for x_EO in (mix_EO, live_EO)
        )
        return relaxation.fit_linear_cost(
            mix_EO,
            np.stack([self._evaluator.mix_of(arch) for arch in drawn]),
            self._costs_of(drawn),
            np.stack([self._evaluator.mix_of(arch) for arch in others]),
            self._costs_of(others),
        )

    def told(self, costs: LinearCost, mix_EO: FloatArray, chosen: Arch, multiplier_L: FloatArray) -> Json:
        """For a trace: how much of the budgets the mixture is expected to use and its architecture uses."""
        cost_L, _ = relaxation.expected_cost(costs, mix_EO)
        return {
            "usage": float(np.max(cost_L / self._limit_L)),
            "usage_chosen": float(np.max(self._cost_of(chosen) / self._limit_L)),
            "cost": dict(zip(self._metrics, cost_L.tolist(), strict=True)),
            "multiplier": dict(zip(self._metrics, multiplier_L.tolist(), strict=True)),
        }

    def _costs_of(self, archs: Sequence[Arch]) -> FloatArray:
        """Shape (N, L)."""
        return self._table.of([self._space.canonical(arch) for arch in archs])[:, self._columns]

    def _cost_of(self, arch: Arch) -> FloatArray:
        """Shape (L,)."""
        found = self._known.get(arch)
        if found is None:
            found = self._known[arch] = self._costs_of([arch])[0]
        return found
