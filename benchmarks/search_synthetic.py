"""Search methods on large synthetic spaces whose optimum is known: regret per tier against the number of
evaluations, as slots grow.

    python -m benchmarks.search_synthetic --json FILE [--slots 20,30,40] [--kinds additive,interacting]
    [--noise STD] [--seeds N] [--methods NAMES] [--work DIR] [--jobs N]

Every slot has four choices with a cost each (a whole number, 1 to 20) and a merit that goes with the cost
at a correlation of 0.6. `additive`: a network's quality is the sum of its merits. `interacting`: every slot
also has an interaction, as strong as the merits, with one or two others (a chain through all slots in
random order), so the best choice of a slot depends on others'. Both have an optimum for every budget by
dynamic programming over the chain. Quality is in standard deviations over random networks.

Every seed has its own problem. Tiers are at the 10, 30, 50, 70 and 95 % quantiles of random networks' cost.
Who takes part, what counts and how it is judged: `benchmarks/search_methods.py` and
`benchmarks/search_judging.py`. Work folder: as in `search_tabular`.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from benchmarks.record import run_script
from benchmarks.search_judging import Contest, Quality
from benchmarks.search_runs import Make, compare, parser_of
from pipeline.algorithms import evolution
from pipeline.errors import ConfigError
from pipeline.evaluators.tabular import TableSpace
from pipeline.settings import pick
from pipeline.types import Arch, Arrays, FitInfo, FloatArray, IntArray, Json, Limit, Slot, Tier

QUANTILES = (0.1, 0.3, 0.5, 0.7, 0.95)
NUM_CHOICES = 4
MOST_COST = 20
CORRELATION = 0.6
KINDS = {"additive": 0.0, "interacting": 1.0}
"""Standard deviation of an interaction, a merit's being 1."""
DEVICE, METRIC = "synthetic", "cost"


@dataclass(frozen=True)
class Landscape:
    """Costs (S, C), merits (S, C), and interactions (S − 1, C, C) of slots that follow each other in
    `order_S`."""

    cost_SC: IntArray
    merit_SC: FloatArray
    pair_LCC: FloatArray
    order_S: IntArray

    @property
    def sizes(self) -> tuple[int, ...]:
        return (self.cost_SC.shape[1],) * len(self.cost_SC)

    def cost(self, choices_NS: IntArray) -> IntArray:
        return np.asarray(self.cost_SC[np.arange(len(self.cost_SC)), choices_NS].sum(axis=1))

    def quality(self, choices_NS: IntArray) -> FloatArray:
        merit_N = self.merit_SC[np.arange(len(self.merit_SC)), choices_NS].sum(axis=1)
        chain_NS = choices_NS[:, self.order_S]
        links = np.arange(len(self.pair_LCC))
        return np.asarray(merit_N + self.pair_LCC[links, chain_NS[:, :-1], chain_NS[:, 1:]].sum(axis=1))

    def best_by_cost(self) -> FloatArray:
        """The best quality that costs exactly b, −inf where nothing does, for b = 0, 1, … the largest cost.

        Dynamic programming along the chain, over the last slot's choice and the cost so far."""
        total = int(self.cost_SC.max(axis=1).sum())
        first = self.order_S[0]
        best_CB = np.full((self.cost_SC.shape[1], total + 1), -np.inf)
        for choice, cost in enumerate(self.cost_SC[first]):
            best_CB[choice, cost] = self.merit_SC[first, choice]
        for link, slot in enumerate(self.order_S[1:]):
            entered_CB = np.stack(
                [(best_CB + column_C[:, None]).max(axis=0) for column_C in self.pair_LCC[link].T]
            )
            best_CB = np.stack(
                [
                    _later(entered_CB[choice], int(cost)) + self.merit_SC[slot, choice]
                    for choice, cost in enumerate(self.cost_SC[slot])
                ]
            )
        return np.asarray(best_CB.max(axis=0))


def _later(values_B: FloatArray, by: int) -> FloatArray:
    return np.concatenate([np.full(by, -np.inf), values_B[: len(values_B) - by]])


def landscape(num_slots: int, interaction: float, seed: int) -> Landscape:
    """A random one, quality scaled to a standard deviation of 1 over random networks."""
    rng = np.random.default_rng([num_slots, round(1000 * interaction), seed])
    cost_SC = rng.integers(1, MOST_COST + 1, size=(num_slots, NUM_CHOICES))
    scaled_SC = (cost_SC - (MOST_COST + 1) / 2) / np.sqrt((MOST_COST**2 - 1) / 12)
    noise_SC = rng.normal(size=cost_SC.shape)
    merit_SC = CORRELATION * scaled_SC + np.sqrt(1 - CORRELATION**2) * noise_SC
    pair_LCC = interaction * rng.normal(size=(num_slots - 1, NUM_CHOICES, NUM_CHOICES))
    pair_LCC -= pair_LCC.mean(axis=1, keepdims=True)
    pair_LCC -= pair_LCC.mean(axis=2, keepdims=True)
    raw = Landscape(cost_SC, merit_SC, pair_LCC, rng.permutation(num_slots))
    spread = raw.quality(evolution.random_choices(raw.sizes, 5_000, rng)).std()
    return Landscape(cost_SC, merit_SC / spread, pair_LCC / spread, raw.order_S)


# --------------------------------------------------------------------------------------------------- contest


class LandscapeCosts:
    """A CostTable of one additive metric."""

    metrics = (METRIC,)

    def __init__(self, ground: Landscape) -> None:
        self._ground = ground

    def of(self, archs: Sequence[Arch]) -> FloatArray:
        return self._ground.cost(_rows(archs)).astype(float)[:, None]

    @property
    def additive(self) -> FloatArray:
        return self._ground.cost_SC.astype(float)[None]


class LandscapeEvaluator:
    """An Evaluator whose loss is −quality, with fresh Gaussian noise at every step."""

    trains = False

    def __init__(self, ground: Landscape, noise_std: float, seed: int) -> None:
        self._ground, self._noise_std, self._seed = ground, noise_std, seed

    @property
    def noisy(self) -> bool:
        return self._noise_std > 0

    def losses(self, archs: Sequence[Arch], *, step: int, thorough: bool = False) -> FloatArray:
        loss_N = -self._ground.quality(_rows(archs))
        if self.noisy and not thorough:
            noise = np.random.default_rng([self._seed, step])
            loss_N = loss_N + noise.normal(0.0, self._noise_std, len(loss_N))
        return loss_N[:, None]

    def fit(self, archs: Sequence[Arch], *, step: int) -> FitInfo:
        return FitInfo(float(-self._ground.quality(_rows(archs)).mean()))

    def state(self) -> Arrays:
        return {}

    def load_state(self, state: Arrays) -> None:
        pass


def _rows(archs: Sequence[Arch]) -> IntArray:
    return np.array([arch.choices for arch in archs], dtype=np.int64)


def contest(num_slots: int, interaction: float, noise_std: float, seed: int) -> Contest:
    """The seed's landscape as a contest. A choice means something else in every slot."""
    ground = landscape(num_slots, interaction, seed)
    slots = [Slot(str(s), tuple(f"{s}.{c}" for c in range(NUM_CHOICES))) for s in range(num_slots)]
    random_NS = evolution.random_choices(ground.sizes, 20_000, np.random.default_rng(seed))
    budgets_K = np.quantile(ground.cost(random_NS), QUANTILES)
    best_B = ground.best_by_cost()
    quality = Quality(
        ground.quality,
        np.array([best_B[: int(budget) + 1].max() for budget in budgets_K]),
        _worst(ground),
    )
    tiers = tuple(
        Tier(DEVICE, f"{q:.0%}", (Limit(METRIC, float(budget), False, f"{q:.0%}"),))
        for q, budget in zip(QUANTILES, budgets_K, strict=True)
    )
    return Contest(
        TableSpace("synthetic", slots),
        LandscapeCosts(ground),
        tiers,
        partial(LandscapeEvaluator, ground, noise_std),
        {"truth": quality},
        middle=float(np.median(ground.quality(random_NS))),
    )


def _worst(ground: Landscape) -> float:
    upside_down = Landscape(ground.cost_SC, -ground.merit_SC, -ground.pair_LCC, ground.order_S)
    return float(-upside_down.best_by_cost().max())


# ---------------------------------------------------------------------------------------------------- script


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def arguments() -> Namespace:
    parser = parser_of("search_synthetic", __doc__, "--json synthetic.json --slots 20", target=1.0)
    parser.add_argument("--slots", type=numbers, default=[20, 30, 40], help="with commas between")
    parser.add_argument("--kinds", default=",".join(KINDS), help="additive, interacting or both")
    asked = parser.parse_args()
    if min(asked.slots) < 2:
        raise ConfigError(f"--slots: at least 2 each, got {min(asked.slots)}")
    return asked


def main() -> bool:
    asked = arguments()
    contests: dict[str, tuple[Make, Json]] = {}
    for kind in asked.kinds.split(","):
        interaction = pick(KINDS, kind.strip(), "kind")
        for num_slots in asked.slots:
            identity = {"slots": num_slots, "interaction": interaction, "noise": asked.noise}
            make = partial(contest, num_slots, interaction, asked.noise)
            contests[f"{kind.strip()}-{num_slots}"] = (make, identity)
    return compare("search_synthetic", asked, contests)


if __name__ == "__main__":
    run_script(main)
