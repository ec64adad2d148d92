"""DARTS-PRIME: an activation without competition, a pull towards discreteness, and a schedule that
moves α when the weights have settled.

K. Maile, E. Lecarpentier, H. Luga, D. G. Wilson, "DARTS-PRIME: Regularization and Scheduling Improve
Constrained Optimization in Differentiable NAS", 2021, arXiv 2106.11655. Formulas:
`algorithms/relaxation.py`. What they constrain is discreteness; limits on cost are ours
(`gradient.py`).

Disc(·), the nearest architecture, is by the space's rule: per node the two strongest edges in `cell`, as
published; the strongest operation of every edge in `nb201`, whose cells keep all edges.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from pipeline.algorithms import relaxation
from pipeline.algorithms.relaxation import Activation, Admm, AdmmForm, Mask, Pace
from pipeline.search.base import RELAXED, SearchMethod
from pipeline.search.gradient import descend
from pipeline.search.gradient_rules import WARM_UP, GradientSettings, NoPull, Pull, Rules, Where
from pipeline.search.problem import SearchProblem
from pipeline.types import Checkpoint, FloatArray, Json, Progress, SearchResult


class DartsPrime(GradientSettings):
    """Settings of `darts-prime`: the paper's, each part of which can be switched off."""

    activation: Literal["crb", "softmax"] = "crb"
    regulariser: Literal["proximity", "admm", "none"] = "proximity"
    schedule: Literal["dynamic", "static"] = "dynamic"
    rho: float = Field(default=0.1, ge=0)
    """ρ, the weight of the regulariser; that of proximity grows to it over the search."""
    admm_form: AdmmForm = "textbook"
    """`published`: as the authors' code has it, with a norm that is not squared and a dual of α."""
    admm_every: int = Field(default=10, ge=1)
    """Steps of α between updates of Z and U."""
    ratio: float = Field(default=10.0, gt=0)
    """r of the dynamic schedule: in the long run one minibatch in r + 1 moves α."""
    factor: float = Field(default=1.05, gt=1)
    """By which the schedule's threshold moves."""
    smoothing: float = Field(default=0.2, gt=0, le=1)
    """Weight of the newest squared gradient norm in the smoothed one."""


@dataclass(frozen=True)
class Proximity(NoPull):
    """(t/T)(ρ/2) Σ over cells of ‖act(α) − disc(act(α))‖_F. Implements `Pull`."""

    rho: float

    def gradient(
        self, mix_EO: FloatArray, mask_EO: Mask, memory: Admm, at: Where
    ) -> tuple[float, FloatArray]:
        value, slope_EO = relaxation.distance(mix_EO, at.disc(mix_EO, mask_EO), at.cell_E)
        weight = at.share * self.rho / 2
        return weight * value, weight * slope_EO


@dataclass(frozen=True)
class AdmmPull:
    """(ρ/2) times ADMM's distance, with Z and U renewed after every so many steps. Implements `Pull`."""

    rho: float
    every: int
    form: AdmmForm

    def gradient(
        self, mix_EO: FloatArray, mask_EO: Mask, memory: Admm, at: Where
    ) -> tuple[float, FloatArray]:
        value, slope_EO = relaxation.admm_distance(mix_EO, mask_EO, memory, self.form, at.cell_E)
        return self.rho / 2 * value, self.rho / 2 * slope_EO

    def start(self, alpha_EO: FloatArray, mask_EO: Mask, activation: Activation) -> Admm:
        return relaxation.admm_start(alpha_EO, mask_EO, activation, self.form)

    def remember(
        self, memory: Admm, alpha_EO: FloatArray, mask_EO: Mask, activation: Activation, at: Where
    ) -> Admm:
        if at.moves % self.every:
            return memory
        return relaxation.admm_update(memory, alpha_EO, mask_EO, activation, at.disc, self.form)


def rules_of(config: DartsPrime) -> Rules:
    pulls: dict[str, Pull] = {
        "proximity": Proximity(config.rho),
        "admm": AdmmPull(config.rho, config.admm_every, config.admm_form),
        "none": NoPull(),
    }
    return Rules(
        relaxation.CRB if config.activation == "crb" else relaxation.SOFTMAX,
        Pace(config.ratio, config.factor, config.smoothing) if config.schedule == "dynamic" else None,
        pulls[config.regulariser],
    )


def run(
    problem: SearchProblem,
    config: DartsPrime,
    *,
    checkpoint: Checkpoint,
    trace: Callable[[Json], None],
    progress: Progress,
) -> SearchResult:
    """One search per tier; what is raised, see `descend`."""
    return descend(
        "darts-prime",
        problem,
        config,
        rules_of(config),
        checkpoint=checkpoint,
        trace=trace,
        progress=progress,
    )


def suggests(config: DartsPrime) -> Json:
    """CRB's weights into a node may have any sum, so that sum is normalised."""
    norm = "nodes" if config.activation == "crb" else "pools"
    enough = rules_of(config).enough
    return {"evaluator": RELAXED, "space": {"mixed_norm": norm}, "evaluations": enough, "warm_up": WARM_UP}


METHOD = SearchMethod(DartsPrime, run, frozenset({RELAXED}), suggests)
