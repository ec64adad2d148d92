"""Gradient methods on a toy whose answer is known: they find it, keep budgets, and go on where they
stopped."""

from __future__ import annotations

import copy
import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import pytest

from pipeline.algorithms import relaxation
from pipeline.errors import ConfigError, DivergedTraining, InfeasibleBudget, StaleArtifact
from pipeline.evaluators.tabular import TableSpace, TabularCosts, TabularEvaluator
from pipeline.progress import NoCheckpoint, Silent
from pipeline.search import METHODS
from pipeline.search.darts import Darts
from pipeline.search.darts_prime import AdmmPull, DartsPrime, Proximity, rules_of
from pipeline.search.gradient import _cells
from pipeline.search.gradient_rules import GradientSettings, Where
from pipeline.search.problem import SearchProblem
from pipeline.types import Arch, Arrays, Evaluator, FitInfo, FloatArray, Json, Limit, SearchResult, Slot, Tier

EDGES, NAMES = 4, ("none", "skip", "conv", "pool")
SLOTS = [Slot(f"e{i}", NAMES) for i in range(EDGES)]
SPACE = TableSpace("toy", SLOTS)
ROWS = np.indices((len(NAMES),) * EDGES).reshape(EDGES, -1).T
LOSS_EO = np.array([[0.9, 0.5, 0.1, 0.4], [0.9, 0.2, 0.6, 0.4], [0.9, 0.5, 0.3, 0.7], [0.9, 0.8, 0.4, 0.1]])
BEST = Arch("toy", tuple(LOSS_EO.argmin(axis=1).tolist()))
COST_EO = np.array([0.0, 1.0, 5.0, 2.0]) * np.array([[1.0], [1.2], [0.8], [1.1]]) + 0.5
COST_R = COST_EO[np.arange(EDGES), ROWS].sum(axis=1)
LOSS_R = LOSS_EO[np.arange(EDGES), ROWS].sum(axis=1)


class Toy:
    """Losses are linear in the shares, so weights count by their ratios, as with normalised nodes. `fit`
    lowers all losses and settles; its gradients' norms are noisy."""

    noisy = trains = True
    edges = tuple(SLOTS)

    def __init__(self) -> None:
        self.fits = np.zeros(1)
        self.log: Counter[str] = Counter()
        self.steps: list[tuple[str, int]] = []

    def _base(self) -> float:
        return math.exp(-float(self.fits[0]) / 50)

    def _note(self, what: str, step: int) -> None:
        self.log[what] += 1
        self.steps.append((what, step))

    def losses_and_grads(self, mix_EO: FloatArray, *, step: int) -> tuple[FloatArray, FloatArray]:
        self._note("grads", step)
        loss = float((LOSS_EO * relaxation.shares(mix_EO)).sum()) + self._base()
        noise_EO = 0.05 * np.random.default_rng([7, step]).normal(size=LOSS_EO.shape)
        return np.array([loss]), relaxation.shares_pull_back(mix_EO, LOSS_EO + noise_EO)[None]

    def fit(self, mixed: FloatArray | Sequence[Arch], *, step: int) -> FitInfo:
        self._note("fit", step)
        self.fits = self.fits + 1
        noise = float(np.random.default_rng([8, step]).lognormal(0, 0.3))
        return FitInfo(self._base(), noise * (0.5 + 4 * self._base()))

    def losses(self, archs: Sequence[Arch], *, step: int, thorough: bool = False) -> FloatArray:
        self._note("losses", step)
        rows = np.array([arch.choices for arch in archs])
        return np.asarray(LOSS_EO[np.arange(EDGES), rows].sum(axis=1)[:, None] + self._base())

    def discretise(self, mix_EO: FloatArray) -> Arch:
        return Arch("toy", tuple(mix_EO.argmax(axis=1).tolist()))

    def mix_of(self, arch: Arch) -> FloatArray:
        return np.eye(len(NAMES))[list(arch.choices)]

    def state(self) -> Arrays:
        return {"fits": self.fits.copy()}

    def load_state(self, state: Arrays) -> None:
        self.fits = state["fits"]


class Additive(TabularCosts):
    """The same costs, and the table that they are the sums of."""

    additive = COST_EO[None]  # type: ignore[assignment]


def tier(name: str, value: float) -> Tier:
    return Tier("cpu", name, (Limit("latency_ms", value, False, ""),))


def problem(*tiers: Tier, toy: Any = None, additive: bool = True, **changed: Any) -> SearchProblem:
    table = (Additive if additive else TabularCosts)(ROWS, {"latency_ms": COST_R})
    settings: dict[str, Any] = {"evaluations": 400, "warm_up": 5, "save_every_s": 0.0, **changed}
    evaluator = cast(Evaluator, Toy() if toy is None else toy)
    return SearchProblem(SPACE, {"cpu": table}, tiers or (tier("free", 1e3),), evaluator, **settings)


QUICK: dict[str, Any] = {"learning_rate": 0.03, "candidates": 12, "cost_samples": 200}
CONFIGS: dict[str, GradientSettings] = {
    "darts": Darts(**QUICK),
    "darts-prime": DartsPrime(**QUICK, ratio=2.0),
    "softmax": DartsPrime(**QUICK, activation="softmax", schedule="static"),
    "admm": DartsPrime(**QUICK, regulariser="admm", ratio=2.0),
    "admm as published": DartsPrime(**QUICK, regulariser="admm", admm_form="published", schedule="static"),
    "none": DartsPrime(**QUICK, regulariser="none", schedule="static"),
}
every_config = pytest.mark.parametrize("name", CONFIGS)


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
    asked: SearchProblem, name: str = "darts-prime", memory: Any = None, trace: list[Json] | None = None
) -> SearchResult:
    config = CONFIGS[name]
    memory, trace = memory or NoCheckpoint(), [] if trace is None else trace
    if isinstance(memory, Memory):
        del trace[(memory.kept[1]["iteration"] if memory.kept else 0) :]
    method = METHODS["darts" if isinstance(config, Darts) else "darts-prime"]
    return method.run(asked, config, checkpoint=memory, trace=trace.append, progress=Silent())


def chosen(result: SearchResult, k: int = 0) -> Arch:
    """What a tier's last mixture stands for."""
    assert result.theta_KSC is not None
    return Arch("toy", tuple(result.theta_KSC[k].argmax(axis=1).tolist()))


def best_within(budget: float) -> float:
    return float(LOSS_R[COST_R <= budget].min())


# --------------------------------------------------------------------------------------------- what they find


@every_config
def test_without_a_budget_that_binds_the_best_is_found(name: str) -> None:
    result = search(problem(), name)
    assert chosen(result) == BEST
    assert min(result.candidates, key=lambda candidate: candidate.loss).arch == BEST
    assert result.method == ("darts" if name == "darts" else "darts-prime")


@pytest.mark.parametrize("additive", [True, False], ids=["exact", "fitted"])
@pytest.mark.parametrize("name", ["darts", "darts-prime", "admm"])
def test_a_tier_s_budget_is_kept(name: str, additive: bool) -> None:
    """Nearly so in expectation; the best network within the budget is among the candidates."""
    budget, trace = 9.0, list[Json]()
    asked = problem(tier("t", budget), additive=additive, evaluations=1500)
    result = search(asked, name, trace=trace)
    assert result.theta_KSC is not None
    assert float((COST_EO * result.theta_KSC[0]).sum()) <= 1.05 * budget
    last = trace[-1]["tiers"][0]
    assert last["usage"] == pytest.approx((COST_EO * result.theta_KSC[0]).sum() / budget, rel=0.05)
    usage_N = asked.usage([candidate.arch for candidate in result.candidates])[:, 0]
    keeping = [c.arch.choices for c, usage in zip(result.candidates, usage_N, strict=True) if usage <= 1]
    assert len(keeping) >= 3
    found = min(LOSS_EO[np.arange(EDGES), choices].sum() for choices in keeping)
    assert found == pytest.approx(best_within(budget))
    assert best_within(budget) > LOSS_R.min() + 0.15, "the budget binds"


def test_a_loose_budget_is_no_pressure_and_a_tight_one_is() -> None:
    loose, tight = list[Json](), list[Json]()
    search(problem(tier("t", 1e3)), trace=loose)
    search(problem(tier("t", 7.0)), trace=tight)
    assert all(record["tiers"][0]["multiplier"]["latency_ms"] == 0 for record in loose[5:])
    assert tight[30]["tiers"][0]["multiplier"]["latency_ms"] > 0
    assert tight[-1]["tiers"][0]["usage"] <= 1 < tight[5]["tiers"][0]["usage"]


def test_every_tier_gets_its_own_network_from_the_same_warm_up() -> None:
    toy = Toy()
    asked = problem(tier("s", 5.0), tier("l", 30.0), toy=toy, evaluations=900)
    trace: list[Json] = []
    result = search(asked, trace=trace)
    assert result.theta_KSC is not None and result.theta_KSC.shape == (2, EDGES, len(NAMES))
    assert chosen(result, 1) == BEST and chosen(result, 0) != BEST
    steps = 450
    fits = [step for what, step in toy.steps if what == "fit"]
    assert fits == [*range(5), *range(5, 5 + steps), *range(5, 5 + steps)], "the same images for every tier"
    first_of_tier = [record["fit_loss"] for record in trace[5::steps]]
    assert first_of_tier[0] == first_of_tier[1] == math.exp(-6 / 50)
    keeps = asked.usage([candidate.arch for candidate in result.candidates]) <= 1
    assert keeps.any(axis=0).all()


def test_tiers_without_a_warm_up_begin_with_the_same_fresh_weights() -> None:
    trace: list[Json] = []
    search(problem(tier("s", 5.0), tier("l", 30.0), warm_up=0, evaluations=80), trace=trace)
    assert trace[0]["fit_loss"] == trace[40]["fit_loss"] == math.exp(-1 / 50)


def test_candidates_are_ordered_by_their_distance_to_the_last_mixture() -> None:
    result = search(problem(tier("s", 9.0), tier("l", 30.0), evaluations=900))
    assert result.mixes_KEO is not None
    rows_NEO = np.stack([np.eye(len(NAMES))[list(c.arch.choices)] for c in result.candidates])
    off_NK = np.stack([((rows_NEO - mix_EO) ** 2).sum(axis=(1, 2)) for mix_EO in result.mixes_KEO], axis=1)
    for candidate, off_K in zip(result.candidates, off_NK, strict=True):
        assert any(candidate.loss == pytest.approx(off) for off in off_K)
    for mix_EO, off_N in zip(result.mixes_KEO, off_NK.T, strict=True):
        nearest = result.candidates[int(off_N.argmin())].arch
        assert nearest == Toy().discretise(mix_EO), "what a mixture stands for is nearest to it"


def test_a_limit_is_felt_by_an_undecided_mixture_that_stands_for_too_much() -> None:
    """Its expected cost is far below the limit, that of its strongest operations above."""
    asked = problem(tier("t", 13.0), evaluations=40)
    trace: list[Json] = []
    search(asked, "darts", trace=trace)
    over = [own for r in trace[5:] for own in r["tiers"] if own["usage_chosen"] > 1]
    assert over and all(own["usage"] < 1 for own in over)
    assert over[-1]["multiplier"]["latency_ms"] > 0


def test_a_budget_that_the_mixture_never_comes_near_still_has_candidates() -> None:
    """Only the cheapest architecture keeps it, and that is of operations which `crb` never offers."""
    asked = problem(tier("t", float(COST_R.min())), evaluations=60)
    result = search(asked)
    keeping = [c.arch for c in result.candidates if asked.usage([c.arch])[0, 0] <= 1]
    assert keeping == [Arch("toy", (0,) * EDGES)]


# ----------------------------------------------------------------------------------------------- what they do


def test_crb_never_offers_none_and_masks_for_good() -> None:
    trace: list[Json] = []
    toy = Toy()
    alive: list[np.ndarray[Any, Any]] = []
    fit = toy.fit
    toy.fit = lambda mixed, *, step: (alive.append(np.asarray(mixed) > 0), fit(mixed, step=step))[1]  # type: ignore[method-assign,assignment,func-returns-value]
    result = search(problem(toy=toy, evaluations=800), trace=trace)
    assert result.theta_KSC is not None and not result.theta_KSC[:, :, 0].any()
    assert not any(live[:, 0].any() for live in alive)
    assert all((after <= before).all() for before, after in itertools.pairwise(alive)), "none comes back"
    assert alive[-1].sum() < alive[0].sum() == 3 * EDGES
    assert trace[-1]["tiers"][0]["operations"] <= alive[-1].sum()


def test_softmax_offers_none_and_drops_nothing() -> None:
    result = search(problem(), "darts")
    assert result.theta_KSC is not None and (result.theta_KSC > 0).all()


def test_the_static_schedule_moves_with_every_minibatch_and_the_dynamic_one_less() -> None:
    for name, share in (("none", 1.0), ("darts-prime", 1 / 3)):
        toy = Toy()
        search(problem(toy=toy, evaluations=1000), name)
        assert toy.log["fit"] == 5 + 1000
        assert toy.log["grads"] / 1000 == pytest.approx(share, rel=0.05)


def test_a_dynamic_step_of_alpha_comes_before_the_weights_of_the_same_minibatch() -> None:
    toy = Toy()
    search(problem(toy=toy))
    order = [(what, step) for what, step in toy.steps if what != "losses"]
    moves = [index for index, (what, _) in enumerate(order) if what == "grads"]
    assert moves and all(order[index + 1] == ("fit", order[index][1]) for index in moves)
    assert order[:6] == [("fit", step) for step in range(6)], "the first minibatch has seen no norm yet"


@every_config
def test_losses_asked_for_are_counted_and_limited(name: str) -> None:
    toy = Toy()
    result = search(problem(toy=toy), name)
    assert result.evaluations == toy.log["grads"] <= 400
    assert toy.log["losses"] == 0 and 1 <= len(result.candidates) <= 12


def test_every_minibatch_is_traced() -> None:
    trace: list[Json] = []
    search(problem(tier("a", 9.0), tier("b", 20.0)), trace=trace)
    assert [record["iteration"] for record in trace] == list(range(5 + 400))
    assert [record["stage"] for record in trace[4:6]] == ["warm_up", "search"]
    assert {record["tiers"][0]["tier"] for record in trace[5:]} == {"cpu/a", "cpu/b"}
    last = trace[-1]
    assert {"fit_loss", "grad_sq_norm", "tau", "smoothed_grad_sq_norm", "evaluations"} <= last.keys()
    own = last["tiers"][0]
    assert {"usage", "cost", "multiplier", "entropy", "operations", "choices"} <= own.keys()
    assert any("loss" in record["tiers"][0] for record in trace[5:])
    assert 0 <= own["entropy"] <= 1 and own["cost"]["latency_ms"] / 20 == pytest.approx(own["usage"])


def where(share: float = 0.5, moves: int = 10) -> Where:
    toy = Toy()

    def disc(values_EO: FloatArray, mask_EO: relaxation.Mask) -> FloatArray:
        return np.where(mask_EO, toy.mix_of(toy.discretise(relaxation.above_zero(values_EO, mask_EO))), 0.0)

    return Where(share, moves, disc, np.zeros(EDGES, dtype=np.int64))


@pytest.mark.parametrize(
    "pull",
    [Proximity(0.4), AdmmPull(0.4, 5, "textbook"), AdmmPull(0.4, 5, "published")],
    ids=["proximity", "admm", "admm as published"],
)
def test_pulls_are_the_gradients_of_their_values(pull: Any) -> None:
    mask = np.ones((EDGES, len(NAMES)), dtype=bool)
    mix = np.random.default_rng(0).uniform(0.1, 0.9, mask.shape)
    memory = pull.remember(pull.start(mix, mask, relaxation.CRB), mix, mask, relaxation.CRB, where())
    _, gradient = pull.gradient(mix, mask, memory, where())
    for index in np.ndindex(mask.shape):
        shift = np.zeros(mask.shape)
        shift[index] = 1e-6
        sides = [pull.gradient(mix + s * shift, mask, memory, where())[0] for s in (1, -1)]
        assert gradient[index] == pytest.approx((sides[0] - sides[1]) / 2e-6, abs=1e-7)


def test_proximity_grows_over_the_search() -> None:
    mask = np.ones((EDGES, len(NAMES)), dtype=bool)
    mix = np.full(mask.shape, 0.5)
    memory = relaxation.Admm(mix, mix)
    values = [Proximity(0.1).gradient(mix, mask, memory, where(share))[0] for share in (0.0, 0.5, 1.0)]
    assert values[0] == 0 and values[2] == pytest.approx(2 * values[1])
    assert values[2] == pytest.approx(0.05 * math.sqrt(16 * 0.25))


def test_admm_s_memory_is_renewed_when_it_is_due() -> None:
    pull, mask = AdmmPull(0.1, 10, "textbook"), np.ones((EDGES, len(NAMES)), dtype=bool)
    mix = np.random.default_rng(0).uniform(0.1, 0.9, mask.shape)
    memory = pull.start(mix, mask, relaxation.CRB)
    assert pull.remember(memory, mix, mask, relaxation.CRB, where(moves=9)) is memory
    assert pull.remember(memory, mix, mask, relaxation.CRB, where(moves=20)) is not memory


def test_the_parts_that_are_switched_off() -> None:
    assert rules_of(DartsPrime()).activation is relaxation.CRB
    assert rules_of(DartsPrime()).pace == relaxation.Pace(10, 1.05, 0.2)
    assert rules_of(DartsPrime()).pull == Proximity(0.1)
    assert rules_of(DartsPrime(activation="softmax")).activation is relaxation.SOFTMAX
    assert rules_of(DartsPrime(schedule="static")).pace is None
    assert rules_of(DartsPrime(regulariser="admm")).pull == AdmmPull(0.1, 10, "textbook")


def test_edges_are_told_apart_by_the_cell_in_their_name() -> None:
    assert len(set(_cells(["0-1", "0-2", "2-3"]))) == 1
    cells = _cells(["normal2.0", "normal2.1", "normal3.0", "reduce2.0", "reduce10.4"])
    np.testing.assert_array_equal(cells == cells[0], [True, True, True, False, False])


# --------------------------------------------------------------------------------------------------- going on


def assert_same(left: SearchResult, right: SearchResult) -> None:
    assert left.candidates == right.candidates and left.evaluations == right.evaluations
    assert left.theta_KSC is not None and right.theta_KSC is not None
    np.testing.assert_array_equal(left.theta_KSC, right.theta_KSC)


@every_config
def test_killed_at_any_checkpoint_it_ends_as_if_nothing_had_been(name: str) -> None:
    def asked() -> SearchProblem:
        return problem(tier("s", 6.0), tier("l", 14.0), additive=False, evaluations=100)

    whole, whole_trace = Memory(), list[Json]()
    expected = search(asked(), name, whole, whole_trace)
    for kill in (2, 5, 30, 5 + 50, 5 + 51, whole.saves - 1):
        memory, trace = Memory(dies_after=kill), list[Json]()
        with pytest.raises(KeyboardInterrupt):
            search(asked(), name, memory, trace)
        memory.left = None
        trace.append({"iteration": "written after the checkpoint, before the kill"})
        assert_same(search(asked(), name, memory, trace), expected)
        assert trace == whole_trace


def test_a_finished_search_costs_nothing_to_repeat() -> None:
    memory, toy = Memory(), Toy()
    expected = search(problem(toy=toy), memory=memory)
    toy.log.clear()
    assert_same(search(problem(toy=toy), memory=memory), expected)
    assert not toy.log


@every_config
def test_it_depends_on_its_seed_and_on_nothing_else(name: str) -> None:
    def asked(seed: int) -> SearchProblem:
        return problem(tier("t", 9.0), additive=False, seed=seed, evaluations=40)

    first, again, other = (search(asked(seed), name) for seed in (0, 0, 1))
    assert_same(first, again)
    assert first.theta_KSC is not None and other.theta_KSC is not None
    assert not np.array_equal(other.theta_KSC, first.theta_KSC)


def test_a_checkpoint_of_another_search_is_refused() -> None:
    memory = Memory()
    search(problem(), memory=memory)
    with pytest.raises(StaleArtifact, match=r"another search \(darts-prime\) than darts"):
        search(problem(), "darts", memory)


def test_a_checkpoint_of_a_search_over_other_costs_is_refused() -> None:
    memory = Memory()
    search(problem(made_from={"costs": "a"}), memory=memory)
    search(problem(made_from={"costs": "a"}), memory=memory)
    with pytest.raises(StaleArtifact):
        search(problem(made_from={"costs": "b"}), memory=memory)


# -------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("tiers", "changed", "message"),
    [
        (
            (tier("a", 9.0), tier("b", 9.0)),
            {"evaluations": 1},
            r"search\.evaluations is 1, fewer minibatches than there are tiers \(2\); set 1200 or more",
        ),
    ],
)
def test_numbers_that_leave_nothing_to_search_with_are_refused(
    tiers: Any, changed: Any, message: str
) -> None:
    toy = Toy()
    with pytest.raises(ConfigError, match=message):
        search(problem(*tiers, toy=toy, **changed))
    assert not toy.log


def test_a_search_that_is_too_short_to_decide_says_so() -> None:
    said: list[str] = []

    class Listening(Silent):
        def say(self, message: str) -> None:
            said.append(message)

    def run(config: DartsPrime, evaluations: int) -> list[str]:
        said.clear()
        METHODS["darts-prime"].run(
            problem(evaluations=evaluations),
            config,
            checkpoint=NoCheckpoint(),
            trace=lambda record: None,
            progress=Listening(),
        )
        return list(said)

    few = run(DartsPrime(), 400)
    assert len(few) == 1 and "about 36 steps of 0.027 each" in few[0] and "change by 0.97" in few[0]
    assert "set search.evaluations to 2200 or more (it is 400)" in few[0]
    assert "learning_rate" not in few[0], "the rate is not what is missing"
    small = run(DartsPrime(learning_rate=3e-4), 2200)
    assert len(small) == 1 and "or raise method.learning_rate" in small[0]
    assert not run(DartsPrime(), 2200)


@pytest.mark.parametrize(
    ("config", "minibatches"),
    [
        (DartsPrime(), 2 * 19_500 * 10 / 11),
        (DartsPrime(schedule="static"), 19_500),
        (DartsPrime(ratio=1.0), 19_500),
    ],
)
def test_all_epochs_are_more_minibatches_where_weights_have_more_of_the_images(
    config: DartsPrime, minibatches: float
) -> None:
    assert rules_of(config).published_steps == pytest.approx(minibatches)


@pytest.mark.parametrize(("minibatches", "rate"), [(388, 3e-4 * 19_500 / 388), (38, 0.05), (195, 0.03)])
def test_a_short_search_moves_alpha_as_far_as_a_long_one(minibatches: int, rate: float) -> None:
    traces: list[list[Json]] = []
    for learning_rate in (None, rate):
        traces.append([])
        METHODS["darts"].run(
            problem(evaluations=minibatches),
            Darts(candidates=12, learning_rate=learning_rate),
            checkpoint=NoCheckpoint(),
            trace=traces[-1].append,
            progress=Silent(),
        )
    assert traces[0] == traces[1]
    assert traces[0][-1]["tiers"][0]["entropy"] < traces[0][5]["tiers"][0]["entropy"]


def test_an_evaluator_that_cannot_mix_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="'darts' needs a relaxed evaluator, and TabularEvaluator is none"):
        search(problem(toy=TabularEvaluator(ROWS, LOSS_R)), "darts")


def test_a_budget_that_nothing_keeps_is_refused_before_anything_is_trained() -> None:
    toy = Toy()
    with pytest.raises(InfeasibleBudget, match="cpu/t: no architecture found"):
        search(problem(tier("t", 0.1), toy=toy))
    assert not toy.log


@pytest.mark.parametrize("broken", ["losses_and_grads", "fit"])
def test_a_loss_that_is_not_a_number_names_the_step(broken: str) -> None:
    toy = Toy()
    bad = {
        "losses_and_grads": lambda mix_EO, *, step: (np.array([math.nan]), np.zeros((1, *mix_EO.shape))),
        "fit": lambda mixed, *, step: FitInfo(math.inf, 1.0),
    }[broken]
    setattr(toy, broken, bad)
    with pytest.raises(
        DivergedTraining, match=r"search step \d+: .* is (nan|inf); the last checkpoint is kept"
    ):
        search(problem(toy=toy))
