"""E2RNAS: sizes counted on the spaces, one direction of several objectives, and on a toy whose Pareto
front is known what it leads to."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import pytest

from pipeline.algorithms import pareto, relaxation
from pipeline.errors import ConfigError, StaleArtifact
from pipeline.evaluators.tabular import TableSpace, TabularCosts, TabularEvaluator
from pipeline.progress import NoCheckpoint, Silent
from pipeline.search import METHODS
from pipeline.search.e2rnas import E2rnas, Objectives, Size, floor_share, in_degrees, operation_sizes
from pipeline.search.problem import SearchProblem
from pipeline.spaces.base import RelaxedSpace
from pipeline.spaces.cell import CellSettings, CellSpace
from pipeline.spaces.nb201 import NB201Settings, NB201Space
from pipeline.types import (
    Arch,
    Arrays,
    Evaluator,
    FitInfo,
    FloatArray,
    Json,
    Layer,
    Limit,
    SearchResult,
    Slot,
    Tier,
)

# -------------------------------------------------------------------------------------- sizes, on the spaces


def published(operation: str, width: int) -> int:
    return {
        "sep3": 2 * (width**2 + 9 * width),
        "sep5": 2 * (width**2 + 25 * width),
        "dil3": width**2 + 9 * width,
        "dil5": width**2 + 25 * width,
    }.get(operation, 0)


def test_sizes_in_cell_are_the_paper_s() -> None:
    """But for a skip at stride 2, which the paper's formulas leave out: its two 1×1 convolutions have C²
    weights."""
    space = CellSpace((3, 16, 16), 10, CellSettings(layers=8, channels=16))
    widths = {"normal": [16, 16, 32, 32, 64, 64], "reduce": [32, 64]}
    sizes_EO = operation_sizes(space)
    assert sizes_EO.shape == (28, 8)
    for row, edge in enumerate(space.edges):
        kind = edge.name[:6]
        for column, operation in enumerate(edge.choices):
            expected = sum(published(operation, width) for width in widths[kind])
            if operation == "skip" and kind == "reduce" and edge.name.endswith((".0", ".1")):
                expected = sum(width**2 for width in widths[kind])
            assert sizes_EO[row, column] == expected, (edge.name, operation)


def test_sizes_in_nb201_are_those_of_its_convolutions() -> None:
    space = NB201Space((3, 8, 8), 4, NB201Settings(cells=2, channels=4))
    squares = 2 * sum(width**2 for width in (4, 8, 16))
    np.testing.assert_array_equal(operation_sizes(space), np.tile([0, 0, squares, 9 * squares, 0], (6, 1)))


def test_in_degrees_count_the_edges_into_a_node() -> None:
    nb201, cell = NB201Space((3, 8, 8), 4), CellSpace((3, 8, 8), 4)
    np.testing.assert_array_equal(in_degrees(nb201.edges), [1, 2, 2, 3, 3, 3])
    of_a_cell = [2] * 2 + [3] * 3 + [4] * 4 + [5] * 5
    np.testing.assert_array_equal(in_degrees(cell.edges), of_a_cell * 2)


def test_the_size_is_the_formula_summed_by_hand() -> None:
    """Over cells, nodes and their edges, elementwise; skips at stride 2 are taken out first."""
    space = CellSpace((3, 16, 16), 10, CellSettings(layers=6, channels=8, nodes=3))
    alpha_EO = np.random.default_rng(0).normal(size=(len(space.edges), 8))
    share_EO = np.exp(alpha_EO) / np.exp(alpha_EO).sum(axis=1, keepdims=True)
    by_hand = 0.0
    for position in space.positions:
        for node in space.nodes:
            for source in range(node):
                share_O = share_EO[space.rows[position.kind, node, source]]
                by_hand += sum(
                    share * published(name, position.width) / node
                    for share, name in zip(share_O, space.variant.operations, strict=True)
                )
    weight_EO = Size.of(space, "million").weight_EO.copy()
    weight_EO[:, space.variant.operations.index("skip")] = 0.0
    mix_EO = relaxation.softmax(alpha_EO, np.ones_like(alpha_EO, dtype=bool))
    assert Size(weight_EO)(mix_EO) == pytest.approx(by_hand / 1e6, rel=1e-12)


def test_the_size_s_gradient_by_alpha_against_finite_differences() -> None:
    size = Size.of(NB201Space((3, 8, 8), 4, NB201Settings(cells=1, channels=4)))
    alpha_EO = np.random.default_rng(1).normal(size=(6, 5))
    mask_EO = np.ones((6, 5), dtype=bool)
    gradient_EO = relaxation.softmax_pull_back(alpha_EO, mask_EO, size.weight_EO)
    for index in np.ndindex(alpha_EO.shape):
        shift = np.zeros_like(alpha_EO)
        shift[index] = 1e-5
        more, less = (size(relaxation.softmax(alpha_EO + s * shift, mask_EO)) for s in (1, -1))
        assert gradient_EO[index] == pytest.approx((more - less) / 2e-5, abs=1e-9)
    assert gradient_EO.any()


def test_the_largest_size_is_one_in_its_own_unit() -> None:
    space = NB201Space((3, 8, 8), 4, NB201Settings(cells=1, channels=4))
    size = Size.of(space)
    assert size.largest == pytest.approx(1.0)
    assert size(space.mix_of(space.largest)) == pytest.approx(1.0)
    assert Size.of(space, "million").largest == pytest.approx(3 * 9 * (4**2 + 8**2 + 16**2) / 1e6)


# ------------------------------------------------------------------------------------------------------ a toy

NAMES = ("none", "skip", "small", "large")
SLOTS = [Slot(name, NAMES) for name in ("0-1", "0-2", "1-2")]
EDGES = len(SLOTS)
ROWS = np.indices((len(NAMES),) * EDGES).reshape(EDGES, -1).T
LOSS_EO = np.array([[0.9, 0.5, 0.45, 0.1], [0.9, 0.4, 0.1, 0.5], [0.9, 0.6, 0.3, 0.25]])
"""Size pays on the first edge, does harm on the second, and hardly pays on the third."""
OTHER_EO = np.array([[0.2, 0.1, 0.6, 0.7], [0.3, 0.5, 0.2, 0.9], [0.6, 0.7, 0.2, 0.4]])
WEIGHTS_EO = np.array([[0, 0, 4, 12], [0, 0, 6, 18], [0, 0, 2, 20]])
LOSS_R, OTHER_R, WEIGHTS_R = (
    table_EO[np.arange(EDGES), ROWS].sum(axis=1) for table_EO in (LOSS_EO, OTHER_EO, WEIGHTS_EO)
)
BASE = 10


class ToySpace(TableSpace):
    """Every operation is a convolution with so many weights."""

    edges = tuple(SLOTS)
    largest, smallest = Arch("toy", (3, 3, 3)), Arch("toy", (0, 0, 0))

    def __init__(self) -> None:
        super().__init__("toy", SLOTS)

    def layers(self, arch: Arch) -> tuple[Layer, ...]:
        counts = WEIGHTS_EO[np.arange(EDGES), list(arch.choices)].tolist()
        return (Layer("linear", 3, 7), *(Layer("conv", 1, count, 8, 4) for count in counts if count))

    def discretise(self, mix_EO: FloatArray) -> Arch:
        return Arch("toy", tuple(mix_EO.argmax(axis=1).tolist()))

    def mix_of(self, arch: Arch) -> FloatArray:
        return np.eye(len(NAMES))[list(arch.choices)]


SPACE = ToySpace()
SIZE = Size.of(cast(RelaxedSpace, SPACE))
SIZE_R = np.array([float((SIZE.weight_EO * SPACE.mix_of(Arch("toy", tuple(row)))).sum()) for row in ROWS])


class Toy:
    """Losses linear in the mixture, of one or two objectives, with noise on the gradients."""

    noisy = trains = True
    edges = tuple(SLOTS)

    def __init__(self, *losses_EO: FloatArray) -> None:
        self.losses_JEO = np.stack(losses_EO or (LOSS_EO,))
        self.fits = np.zeros(1)

    def losses_and_grads(self, mix_EO: FloatArray, *, step: int) -> tuple[FloatArray, FloatArray]:
        noise_JEO = 0.02 * np.random.default_rng([7, step]).normal(size=self.losses_JEO.shape)
        return (self.losses_JEO * mix_EO).sum(axis=(1, 2)), self.losses_JEO + noise_JEO

    def fit(self, mixed: FloatArray | Sequence[Arch], *, step: int) -> FitInfo:
        self.fits = self.fits + 1
        return FitInfo(1.0, 1.0)

    def losses(self, archs: Sequence[Arch], *, step: int, thorough: bool = False) -> FloatArray:
        rows = np.array([arch.choices for arch in archs])
        return np.asarray(self.losses_JEO[0][np.arange(EDGES), rows].sum(axis=1)[:, None])

    def discretise(self, mix_EO: FloatArray) -> Arch:
        return SPACE.discretise(mix_EO)

    def mix_of(self, arch: Arch) -> FloatArray:
        return SPACE.mix_of(arch)

    def state(self) -> Arrays:
        return {"fits": self.fits.copy()}

    def load_state(self, state: Arrays) -> None:
        self.fits = state["fits"]


def tier(name: str = "free", **limits: float) -> Tier:
    chosen = limits or {"latency_ms": 1e3}
    return Tier("cpu", name, tuple(Limit(metric, value, False, "") for metric, value in chosen.items()))


COSTS = TabularCosts(ROWS, {"params": BASE + WEIGHTS_R.astype(float), "latency_ms": 1 + WEIGHTS_R / 25})


def problem(*tiers: Tier, toy: Any = None, **changed: Any) -> SearchProblem:
    settings: dict[str, Any] = {"evaluations": 500, "warm_up": 3, "save_every_s": 0.0, **changed}
    evaluator = cast(Evaluator, Toy() if toy is None else toy)
    return SearchProblem(SPACE, {"cpu": COSTS}, tiers or (tier(),), evaluator, **settings)


def config(**changed: Any) -> E2rnas:
    return E2rnas(**{"learning_rate": 0.03, "candidates": 6, "cost_samples": 60, **changed})


class Memory:
    """A checkpoint in memory; dies after so many savings."""

    def __init__(self, dies_after: int | None = None) -> None:
        self.kept: tuple[Arrays, Json] | None = None
        self.left = dies_after
        self.saves = 0

    def load(self) -> tuple[Arrays, Json] | None:
        return copy.deepcopy(self.kept)

    def save(self, arrays: Mapping[str, Any], record: Json) -> None:
        self.kept = copy.deepcopy((dict(arrays), record))
        self.saves += 1
        if self.left is not None and self.saves >= self.left:
            raise KeyboardInterrupt


def search(
    asked: SearchProblem, settings: E2rnas, memory: Any = None, trace: list[Json] | None = None
) -> SearchResult:
    memory, trace = memory or NoCheckpoint(), [] if trace is None else trace
    if isinstance(memory, Memory):
        del trace[(memory.kept[1]["iteration"] if memory.kept else 0) :]
    run = METHODS["e2rnas"].run
    return run(asked, settings, checkpoint=memory, trace=trace.append, progress=Silent())


def row_of(result: SearchResult, k: int = 0) -> int:
    """Of the architecture that a tier's last mixture stands for."""
    assert result.theta_KSC is not None
    return int(np.flatnonzero((ROWS == result.theta_KSC[k].argmax(axis=1)).all(axis=1))[0])


# ------------------------------------------------------------------------------------- where the search leads


def test_conflicting_objectives_lead_to_the_pareto_front() -> None:
    """Where they agree, as on the second edge, there is no other choice; where they do not, the front
    has several."""
    on_front_R = pareto.front_ranks(np.stack([LOSS_R, SIZE_R], axis=1)) == 0
    assert 3 <= on_front_R.sum() <= 20
    found = [row_of(search(problem(seed=seed), config(floor=0.0))) for seed in range(4)]
    assert all(on_front_R[row] for row in found)
    assert all(SIZE_R[row] < SIZE_R[LOSS_R.argmin()] for row in found), "size has a say"
    assert all(LOSS_R[row] < LOSS_R[SIZE_R.argmin()] for row in found), "and so has the loss"


def test_three_objectives_lead_to_their_front_too() -> None:
    points = np.stack([LOSS_R, OTHER_R, SIZE_R], axis=1)
    on_front_R = pareto.front_ranks(points) == 0
    assert on_front_R.mean() < 0.5
    trace: list[Json] = []
    row = row_of(search(problem(toy=Toy(LOSS_EO, OTHER_EO)), config(floor=0.0), trace=trace))
    assert on_front_R[row]
    weights = np.array([record["tiers"][0]["objective_weights"] for record in trace[3:]])
    assert weights.shape[1] == 3 and (weights >= 0.001 - 1e-12).all()
    np.testing.assert_allclose(weights.sum(axis=1), 1.0)


def test_below_the_floor_size_is_no_objective() -> None:
    """With the floor at the largest size it is plain DARTS, to the last bit."""
    alone = METHODS["darts"].run(
        problem(),
        METHODS["darts"].config(**config().model_dump(exclude={"floor", "least_weight", "size_unit"})),
        checkpoint=NoCheckpoint(),
        trace=lambda record: None,
        progress=Silent(),
    )
    found = search(problem(), config(floor=1.0))
    assert found.theta_KSC is not None and alone.theta_KSC is not None
    np.testing.assert_array_equal(found.theta_KSC, alone.theta_KSC)
    assert row_of(found) == LOSS_R.argmin()


def test_the_floor_is_respected() -> None:
    """What the mixture stands for stays near it, where without a floor it falls below; and size has no weight
    where both are at it."""
    sizes = {}
    for floor in (0.0, 0.4):
        trace: list[Json] = []
        result = search(problem(), config(floor=floor, weight_decay=0.0), trace=trace)
        assert result.theta_KSC is not None
        sizes[floor] = SIZE_R[row_of(result)]
        for own in (record["tiers"][0] for record in trace[3:]):
            assert own["size_floor"] == floor
            at_floor = max(own["size"], own["size_chosen"]) <= floor
            assert (own["objective_weights"][1] == 0) == at_floor
    assert sizes[0.0] < 0.25 < sizes[0.4]


def test_every_tier_has_its_own_floor_and_network() -> None:
    asked = problem(tier("s", params=BASE + 8.0), tier("l", params=BASE + 40.0), evaluations=1000)
    trace: list[Json] = []
    result = search(asked, config(), trace=trace)
    floors = {own["tier"]: own["size_floor"] for record in trace for own in record.get("tiers", ())}
    assert floors == {"cpu/s": pytest.approx(8 / 50), "cpu/l": pytest.approx(40 / 50)}
    usage_NK = asked.usage([candidate.arch for candidate in result.candidates])
    assert (usage_NK <= 1).any(axis=0).all()
    assert SIZE_R[row_of(result, 0)] < SIZE_R[row_of(result, 1)]
    assert trace[-1]["tiers"][0]["usage"] <= 1.05


def test_the_floor_is_what_the_parameters_may_be_or_else_the_least_of_the_limits() -> None:
    space = cast(RelaxedSpace, SPACE)

    def share(**limits: float) -> float:
        own = tier("t", **limits)
        return floor_share(problem(own), space, own)

    assert share(params=BASE + 10.0, latency_ms=1.0) == pytest.approx(10 / 50)
    assert share(latency_ms=2.0) == pytest.approx(0.5)
    assert share(params=1e6) == 1.0 and share(params=1.0) == 0.0


# ---------------------------------------------------------------------------------------------- one direction


def test_the_direction_is_mgda_s_by_alpha() -> None:
    """Of the two gradients after the softmax, c = (g₂·g₂ − g₁·g₂)/‖g₁ − g₂‖², within its limits."""
    rng = np.random.default_rng(2)
    mask_EO = np.ones((EDGES, len(NAMES)), dtype=bool)
    objectives = Objectives(SIZE, {"cpu/free": 0.0}, 0.001)
    for scale in (0.01, 1.0, 100.0):
        alpha_EO, slope_EO = rng.normal(size=(2, EDGES, len(NAMES)))
        gradient_EO, told = objectives(scale * slope_EO[None], alpha_EO, mask_EO, mask_EO * 0.0, tier())
        one, two = (
            relaxation.softmax_pull_back(alpha_EO, mask_EO, x_EO).ravel()
            for x_EO in (scale * slope_EO, SIZE.weight_EO)
        )
        share = np.clip((two @ two - one @ two) / ((one - two) @ (one - two)), 0.001, 0.999)
        np.testing.assert_allclose(told["objective_weights"], [share, 1 - share])
        expected = share * scale * slope_EO + (1 - share) * SIZE.weight_EO
        np.testing.assert_allclose(gradient_EO, expected)
        mix_EO = relaxation.softmax(alpha_EO, mask_EO)
        assert told["size"] == pytest.approx((SIZE.weight_EO * mix_EO).sum())


def test_size_counts_while_the_mixture_or_what_it_stands_for_is_above_the_floor() -> None:
    mask_EO = np.ones((EDGES, len(NAMES)), dtype=bool)
    alpha_EO, slope_EO = np.zeros(mask_EO.shape), np.ones((1, *mask_EO.shape))
    slope_EO[0, :, 0] = 2.0
    small, large = np.eye(len(NAMES))[[1, 1, 1]], np.eye(len(NAMES))[[3, 3, 3]]
    expected = SIZE(relaxation.softmax(alpha_EO, mask_EO))
    for floor, chosen_EO, counts in (
        (expected - 0.01, small, True),
        (expected + 0.01, small, False),
        (expected + 0.01, large, True),
    ):
        objectives = Objectives(SIZE, {"cpu/free": floor}, 0.001)
        _, told = objectives(slope_EO, alpha_EO, mask_EO, chosen_EO, tier())
        assert (told["objective_weights"][1] > 0) == counts
        assert told["size"] == pytest.approx(expected)


# --------------------------------------------------------------------------------------------------- going on


def test_killed_at_any_checkpoint_it_ends_as_if_nothing_had_been() -> None:
    def asked() -> SearchProblem:
        tiers = tier("s", params=BASE + 8.0), tier("l", params=BASE + 40.0, latency_ms=2.5)
        return problem(*tiers, evaluations=60)

    whole, whole_trace = Memory(), list[Json]()
    expected = search(asked(), config(), whole, whole_trace)
    for kill in (2, 4, 20, 3 + 24, 3 + 25, whole.saves - 1):
        memory, trace = Memory(dies_after=kill), list[Json]()
        with pytest.raises(KeyboardInterrupt):
            search(asked(), config(), memory, trace)
        memory.left = None
        found = search(asked(), config(), memory, trace)
        assert found.candidates == expected.candidates and trace == whole_trace
        assert found.theta_KSC is not None and expected.theta_KSC is not None
        np.testing.assert_array_equal(found.theta_KSC, expected.theta_KSC)


def test_another_floor_is_another_search() -> None:
    memory = Memory()
    search(problem(), config(), memory)
    with pytest.raises(StaleArtifact, match="another search"):
        search(problem(), config(floor=0.1), memory)


# -------------------------------------------------------------------------------------------- what is refused


def test_a_space_that_cannot_count_is_refused_by_name() -> None:
    asked = problem()
    plain = SearchProblem(
        TableSpace("plain", SLOTS), {"cpu": COSTS}, asked.tiers, asked.evaluator, asked.evaluations
    )
    with pytest.raises(ConfigError, match="'e2rnas' counts .* space 'plain' does not list them"):
        search(plain, config())


def test_a_space_without_weights_to_choose_is_refused_by_name() -> None:
    class Weightless(ToySpace):
        def layers(self, arch: Arch) -> tuple[Layer, ...]:
            return (Layer("conv", 1, 5), Layer("pool", 5, 5))

    asked = problem()
    weightless = SearchProblem(Weightless(), {"cpu": COSTS}, asked.tiers, asked.evaluator, asked.evaluations)
    with pytest.raises(ConfigError, match="no operation of space 'toy' has more weights than another"):
        search(weightless, config())


def test_an_evaluator_that_cannot_mix_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="'e2rnas' needs a relaxed evaluator, and TabularEvaluator is none"):
        search(problem(toy=TabularEvaluator(ROWS, LOSS_R)), config())
