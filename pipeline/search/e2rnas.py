"""E2RNAS: a mixture that is to be accurate and small at once, on weights that train on adversarial
images.

Z. Yue, B. Lin, X. Huang, Y. Zhang, "Effective, Efficient and Robust Neural Architecture Search", 2020,
arXiv 2011.09820. As in plain DARTS, every minibatch moves α, by softmax over each edge's operations. The
direction is that of the multiple-gradient descent algorithm (`algorithms/min_norm.py`), by α, over all
losses of the evaluator and the size max(N(α), L):

    N(α) = Σ over edges of (1 / in-degree of the edge's node) Σ_o softmax(α)_o · u_o

elementwise (the authors' code multiplies matrices there), where u is an operation's weights in all cells
together. Their robustness comes from the lower level, the evaluator `relaxed-adversarial`; with
`relaxed` in its place weights train on clean images.

Ours: u is counted on the space (norms left out, as published). N is in units of its largest value, since
the method equalises differences of its objectives, and a loss in nats stays what it is when networks get
wider. An objective at its floor is left out, not kept at the least weight: nothing is gained by its zero
gradient, and the loss would hardly count. L is a tier's: the share of the range from the smallest to the
largest network that its parameters may use, or, where these are not limited, the least share of what is.
Size is at its floor when both N and the size of the architecture that the mixture stands for are: while a
mixture is undecided its expected size is small whatever is derived from it. All limits are budgets as
well, as in `gradient.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
from pydantic import Field

from pipeline.algorithms import min_norm, relaxation
from pipeline.algorithms.relaxation import Mask
from pipeline.errors import ConfigError
from pipeline.search.base import RELAXED, SearchMethod
from pipeline.search.gradient import descend
from pipeline.search.gradient_rules import WARM_UP, GradientSettings, NoPull, Rules
from pipeline.search.nearest import NONE
from pipeline.search.problem import SearchProblem
from pipeline.spaces.base import RelaxedSpace
from pipeline.types import Arch, Checkpoint, FloatArray, Json, Limit, Progress, SearchResult, Slot, Tier

RULES = Rules(relaxation.SOFTMAX, pace=None, pull=NoPull())


class E2rnas(GradientSettings):
    """Settings of `e2rnas`."""

    least_weight: float = Field(default=0.001, ge=0, le=0.1)
    """No objective that is not at its floor weighs less; of two, none more than one minus this."""
    size_unit: Literal["largest", "million"] = "largest"
    """What N is counted in: its own largest value, or millions of weights."""
    floor: float | None = Field(default=None, ge=0, le=1)
    """L as a share of N's largest value, for all tiers; by default a tier's limits say it."""


# ----------------------------------------------------------------------------------------------------- size


def operation_sizes(space: RelaxedSpace) -> FloatArray:
    """u, shape (E, O): the weights of convolutions that an operation on an edge brings, over all cells,
    more than the cheapest one there; 0 for `none`."""
    sizes_EO = np.zeros((len(space.edges), max(len(edge.choices) for edge in space.edges)))
    for row, edge in enumerate(space.edges):
        some = [column for column, name in enumerate(edge.choices) if name != NONE]
        sizes_EO[row, some] = [_conv_weights(space, _with(space, row, column)) for column in some]
        sizes_EO[row, some] -= sizes_EO[row, some].min()
    return sizes_EO


def _with(space: RelaxedSpace, row: int, column: int) -> Arch:
    """A member with this operation on this edge, and elsewhere the same whatever that operation is."""
    mix_EO = np.zeros((len(space.edges), max(len(edge.choices) for edge in space.edges)))
    for other, edge in enumerate(space.edges):
        mix_EO[other, next(c for c, name in enumerate(edge.choices) if name != NONE)] = 0.5
    mix_EO[row] = 0.0
    mix_EO[row, column] = 1.0
    arch = space.discretise(mix_EO)
    assert space.mix_of(arch)[row, column] == 1, f"{arch} lacks operation {column} on edge {row}"
    return arch


def _conv_weights(space: RelaxedSpace, arch: Arch) -> int:
    convolutions = (layer for layer in space.layers(arch) if layer.kind == "conv")
    return sum(layer.macs // layer.size_out**2 for layer in convolutions)


def in_degrees(edges: Sequence[Slot]) -> FloatArray:
    """How many edges lead into the node of each, shape (E,). An edge's name says its node: `node.source`
    or `source-node`."""
    nodes = [
        edge.name.partition(".")[0] if "." in edge.name else edge.name.partition("-")[2] for edge in edges
    ]
    count = Counter(nodes)
    return np.array([count[node] for node in nodes], dtype=float)


@dataclass(frozen=True)
class Size:
    """N as a function of the mixture; `weight_EO` is its gradient, since N is linear."""

    weight_EO: FloatArray

    @classmethod
    def of(cls, space: RelaxedSpace, unit: Literal["largest", "million"] = "largest") -> Size:
        """Raises ConfigError for a space without any weights to choose."""
        weight_EO = operation_sizes(space) / in_degrees(space.edges)[:, None]
        if not weight_EO.any():
            raise ConfigError(
                f"method 'e2rnas' makes networks small, and no operation of space '{space.name}' has more "
                "weights than another; take another space, or method: darts"
            )
        return cls(weight_EO / (weight_EO.max(axis=1).sum() if unit == "largest" else 1e6))

    @property
    def largest(self) -> float:
        return float(self.weight_EO.max(axis=1).sum())

    def __call__(self, mix_EO: FloatArray) -> float:
        return float((self.weight_EO * mix_EO).sum())


# -------------------------------------------------------------------------------------------------- the floor


def floor_share(problem: SearchProblem, space: RelaxedSpace, tier: Tier) -> float:
    """L as a share of N's largest value, 0 to 1: how much of the way from the smallest to the largest
    network the tier's parameters may go; by its other limits, the least of them, where it has none on
    those."""
    limits = [limit for limit in tier.limits if limit.metric == "params"] or tier.limits
    return min(_share_of_range(problem, space, tier, limit) for limit in limits)


def _share_of_range(problem: SearchProblem, space: RelaxedSpace, tier: Tier, limit: Limit) -> float:
    table = problem.costs[tier.device]
    ends_2 = table.of([space.smallest, space.largest])[:, table.metrics.index(limit.metric)]
    low, high = ends_2.tolist()
    return 1.0 if high <= low else float(np.clip((limit.value - low) / (high - low), 0.0, 1.0))


# ------------------------------------------------------------------------------------------------- the method


@dataclass(frozen=True)
class Objectives:
    """All losses and the size, as one. Implements `pipeline.search.gradient_rules.Combine`; `floors` are L by
    a tier's key, in the unit of N."""

    size: Size
    floors: Mapping[str, float]
    least: float

    def __call__(
        self,
        gradients_JEO: FloatArray,
        alpha_EO: FloatArray,
        mask_EO: Mask,
        chosen_EO: FloatArray,
        tier: Tier,
    ) -> tuple[FloatArray, Json]:
        floor = self.floors[tier.key]
        size, chosen_size = self.size(relaxation.softmax(alpha_EO, mask_EO)), self.size(chosen_EO)
        counts = max(size, chosen_size) > floor
        gradients_JEO = np.concatenate([gradients_JEO, counts * self.size.weight_EO[None]])
        by_alpha = [relaxation.softmax_pull_back(alpha_EO, mask_EO, x_EO) for x_EO in gradients_JEO]
        weights_J = min_norm.weights(np.stack([x_EO.ravel() for x_EO in by_alpha]), self.least)
        told = {
            "size": size,
            "size_chosen": chosen_size,
            "size_floor": floor,
            "objective_weights": weights_J.tolist(),
        }
        return np.tensordot(weights_J, gradients_JEO, 1), told


def counted_space(problem: SearchProblem) -> RelaxedSpace:
    """The problem's space as one that can say how large its operations are. Raises ConfigError."""
    if not all(hasattr(problem.space, name) for name in ("layers", "edges")):
        raise ConfigError(
            f"method 'e2rnas' counts the weights of operations, and space '{problem.space.name}' does not "
            "list them; take a space of cells, such as nb201"
        )
    return cast(RelaxedSpace, problem.space)


def run(
    problem: SearchProblem,
    config: E2rnas,
    *,
    checkpoint: Checkpoint,
    trace: Callable[[Json], None],
    progress: Progress,
) -> SearchResult:
    """One search per tier; what is raised, see `descend`, and ConfigError for a space whose operations
    cannot be counted."""
    space = counted_space(problem)
    size = Size.of(space, config.size_unit)
    shares = {
        tier.key: floor_share(problem, space, tier) if config.floor is None else config.floor
        for tier in problem.tiers
    }
    floors = {key: size.largest * share for key, share in shares.items()}
    rules = RULES._replace(combine=Objectives(size, floors, config.least_weight))
    return descend("e2rnas", problem, config, rules, checkpoint=checkpoint, trace=trace, progress=progress)


def suggests(config: E2rnas) -> Json:
    return {
        "evaluator": "relaxed-adversarial",
        "space": {"mixed_norm": "pools"},
        "evaluations": RULES.enough,
        "warm_up": WARM_UP,
    }


METHOD = SearchMethod(E2rnas, run, frozenset({RELAXED}), suggests)
