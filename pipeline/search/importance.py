"""K tiers in one search: a distribution over architectures per tier, and every evaluation serves all of them.

Y. Noda, S. Saito, S. Shirakawa, "Efficient Search of Multiple Neural Architectures with Different
Complexities via Importance Sampling", 2022, arXiv 2207.10334, on ASNG (arXiv 1905.08537;
`algorithms/categorical.py`).

`mode: coefficients` minimises loss + ε_k · R/R_max per tier as published, with the ε_k given. `mode:
budgets` is ours: limits instead of coefficients. Two estimates of each tier's natural gradient are offered:

- `guide: weights`, the published one: the iteration's samples, weighted by p_k over the mixture of all p_j.
  Their utilities go by quantiles of the tier's weight; ranks over the whole pool collapse once tiers
  separate. With budgets, the pressure ε_k on log(cost/budget) rises while a tier is over its budget and
  falls below (dual ascent).
- `guide: surrogate`, ours and the default with budgets (`guided.py`): a Gaussian process fitted to the
  evaluations of all tiers predicts the losses of many more samples, drawn within the tier's budget (costs
  are known for free). Evaluations are shared through the process, which goes on when tiers have separated
  and weights have become 0.

How much the surrogate saves on look-up tables: `benchmarks/search_tabular.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
from numpy.random import Generator
from pydantic import Field, model_validator

from pipeline.algorithms import categorical
from pipeline.algorithms.categorical import Adaptive
from pipeline.errors import ConfigError
from pipeline.search import guided
from pipeline.search.base import Sampler, SearchMethod, drive
from pipeline.search.problem import SearchProblem
from pipeline.search.start import first_distributions
from pipeline.settings import Settings
from pipeline.types import Checkpoint, FloatArray, IntArray, Json, Progress, SearchResult


class StepSettings(Settings):
    """How distributions are sampled and moved by weighted samples."""

    samples_per_tier: int = Field(default=4, ge=2)
    delta0: float = Field(default=0.3, gt=0)
    """First length of a step (Fisher norm). ASNG's own 1 commits to violations before any loss is known."""
    alpha: float = Field(default=1.5, gt=0)
    quantile: float = Field(default=0.25, gt=0, le=0.5)
    """Share of a tier's weight that counts as best, and as worst."""
    pressure: float = Field(default=1.0, ge=0)
    """First ε_k: what a factor e in cost weighs against one standard deviation of the loss."""
    pressure_rate: float = Field(default=0.3, ge=0)
    """Change of ε_k per iteration and unit of mean log(cost/budget)."""


class Importance(Settings):
    """Settings of `importance`."""

    mode: Literal["budgets", "coefficients"] = "budgets"
    guide: Literal["surrogate", "weights"] | None = None
    """None: `surrogate` with budgets, `weights` with coefficients."""
    coefficients: tuple[float, ...] = ()
    """ε_k, one per tier, for `mode: coefficients`."""
    weights: StepSettings = StepSettings()
    surrogate: guided.GuideSettings = guided.GuideSettings()

    @model_validator(mode="after")
    def _consistent(self) -> Importance:
        if self.mode == "coefficients" and self.guide == "surrogate":
            raise ValueError("'guide: surrogate' works with 'mode: budgets'; use 'guide: weights'")
        if self.mode == "budgets" and self.coefficients:
            raise ValueError("'coefficients' has no effect with 'mode: budgets'; set 'mode: coefficients'")
        return self

    @property
    def uses_surrogate(self) -> bool:
        return self.mode == "budgets" and self.guide != "weights"

    @property
    def samples_per_tier(self) -> int:
        """In an iteration in which the evaluator trains."""
        if self.uses_surrogate:
            return self.surrogate.samples_per_tier or guided.SEVERAL
        return self.weights.samples_per_tier


class Distributions(NamedTuple):
    """`Adaptive` and the pressure ε_k of every tier."""

    theta_KSC: FloatArray
    slowdown_K: FloatArray
    gamma_K: FloatArray
    path_KSC: FloatArray
    pressure_K: FloatArray


def run(
    problem: SearchProblem,
    config: Importance,
    *,
    checkpoint: Checkpoint,
    trace: Callable[[Json], None],
    progress: Progress,
) -> SearchResult:
    """One search for all tiers. Raises ConfigError when there is not one coefficient per tier."""
    if config.uses_surrogate:
        sampler, bands = guided.sampler(problem, config.surrogate)
        return drive(
            "importance",
            problem,
            config,
            sampler,
            checkpoint=checkpoint,
            trace=trace,
            progress=progress,
            bands=bands,
        )
    if config.mode == "coefficients" and len(config.coefficients) != len(problem.tiers):
        raise ConfigError(
            f"importance: 'coefficients' needs one number per tier ({len(problem.tiers)} tiers), "
            f"got {len(config.coefficients)}"
        )
    coefficients = config.coefficients if config.mode == "coefficients" else None
    return drive(
        "importance",
        problem,
        config,
        weighted_sampler(problem, config.weights, mixture_of, coefficients),
        checkpoint=checkpoint,
        trace=trace,
        progress=progress,
    )


Weighing = Callable[[FloatArray, IntArray], FloatArray]


def mixture_of(theta_KSC: FloatArray, choices_NS: IntArray) -> FloatArray:
    """Importance weights against the mixture of all tiers' distributions, shape (K, N)."""
    return categorical.mixture_weights(categorical.log_prob(theta_KSC, choices_NS))


def weighted_sampler(
    problem: SearchProblem,
    config: StepSettings,
    weigh: Weighing,
    coefficients: tuple[float, ...] | None = None,
) -> Sampler[Distributions]:
    """The natural-gradient sampler; `weigh` says how much each sample counts for each tier."""
    sizes, num_tiers = problem.sizes, len(problem.tiers)

    def init() -> Distributions:
        start = categorical.adaptive_start(first_distributions(problem))
        return Distributions(*start, pressure_K=np.full(num_tiers, config.pressure))

    def ask(state: Distributions, rng: Generator) -> IntArray:
        drawn_KNS = categorical.sample(state.theta_KSC, config.samples_per_tier, rng)
        return drawn_KNS.transpose(1, 0, 2).reshape(-1, len(sizes))

    def tell(
        state: Distributions, choices_NS: IntArray, losses_N: FloatArray, usage_NK: FloatArray, rng: Generator
    ) -> Distributions:
        weights_KN = weigh(state.theta_KSC, choices_NS)
        pressure_K = state.pressure_K
        if coefficients is None:
            log_usage_KN = np.log(np.maximum(usage_NK.T, 1e-12))
            objective_KN = losses_N / _spread(losses_N, weights_KN) + pressure_K[:, None] * log_usage_KN
            excess_K = np.clip(_mean(log_usage_KN, weights_KN), -1.0, 1.0)
            pressure_K = np.maximum(pressure_K + config.pressure_rate * excess_K, 0.0)
        else:
            shares_KN = problem.reference_costs(problem.archs(choices_NS)).T
            objective_KN = losses_N + np.asarray(coefficients)[:, None] * shares_KN
        moved = ascend(state, choices_NS, objective_KN, weights_KN, problem, config)
        return Distributions(*moved, pressure_K=pressure_K)

    def watch(
        state: Distributions, choices_NS: IntArray, losses_N: FloatArray, usage_NK: FloatArray
    ) -> list[Json]:
        weights_KN = weigh(state.theta_KSC, choices_NS)
        records = watch_tiers(state.theta_KSC, weights_KN, losses_N, usage_NK)
        if coefficients is None:
            for record, pressure in zip(records, state.pressure_K.tolist(), strict=True):
                record["pressure"] = pressure
        return records

    return Sampler(init, ask, tell, watch, lambda state: state.theta_KSC)


def ascend(
    state: Distributions,
    choices_NS: IntArray,
    objective_KN: FloatArray,
    weights_KN: FloatArray,
    problem: SearchProblem,
    config: StepSettings,
) -> Adaptive:
    """One adaptive step of every tier towards what is better on its own objective, by weighted quantiles."""
    utility_KN = categorical.quantile_utility(objective_KN, weights_KN, config.quantile)
    gradient_KSC = categorical.natural_gradient(state.theta_KSC, choices_NS, utility_KN)
    adaptive = Adaptive(state.theta_KSC, state.slowdown_K, state.gamma_K, state.path_KSC)
    return categorical.adaptive_step(adaptive, gradient_KSC, problem.sizes, config.delta0, config.alpha)


def watch_tiers(
    theta_KSC: FloatArray, weights_KN: FloatArray, losses_N: FloatArray, usage_NK: FloatArray
) -> list[Json]:
    """Per tier: expected usage and loss by its weights, entropy, and the effective sample size."""
    columns = {
        "usage": _mean(usage_NK.T, weights_KN),
        "loss": _mean(np.broadcast_to(losses_N, weights_KN.shape), weights_KN),
        "entropy": categorical.entropy(theta_KSC),
        "effective_sample_size": categorical.effective_sample_size(weights_KN),
    }
    return [{name: float(column[k]) for name, column in columns.items()} for k in range(len(theta_KSC))]


def _mean(values_KN: FloatArray, weights_KN: FloatArray) -> FloatArray:
    return np.asarray((values_KN * weights_KN).sum(axis=1) / weights_KN.sum(axis=1))


def _spread(losses_N: FloatArray, weights_KN: FloatArray) -> FloatArray:
    """Weighted standard deviation per tier, shape (K, 1); 1 where all losses are the same."""
    deviation_KN = losses_N - _mean(np.broadcast_to(losses_N, weights_KN.shape), weights_KN)[:, None]
    spread_K = np.sqrt(_mean(deviation_KN**2, weights_KN))
    return np.where(spread_K > 0, spread_K, 1.0)[:, None]


METHOD = SearchMethod(
    Importance, run, warm_starts=True, asks=lambda config, num_tiers: config.samples_per_tier * num_tiers
)
