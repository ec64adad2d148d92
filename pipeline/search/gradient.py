"""The loop of the gradient methods: weights and a mixture of operations, trained side by side.

H. Liu, K. Simonyan, Y. Yang, "DARTS: Differentiable Architecture Search", 2018, arXiv 1806.09055. What
makes it `darts` or `darts-prime` comes in as `Rules` (`search/gradient_rules.py`).

Budgets are ours, the papers have none. There is one search per tier; all of them go on from the same
warm-up, in which the weights train under the first mixture. How limits enter: `search/pressure.py`.

What a tier's search finds is its last mixture. Architectures are judged by how near they are to it (squared
distance of the mixture to theirs, which is what Disc makes least): a mixture's weights have learnt to work
together, and under softmax the loss of a single operation per edge is often that of guessing.

Of the problem's numbers, `warm_up` is the minibatches before any step of α, once for all tiers, and
`evaluations` all minibatches after it: every tier has its equal share of them, each of which is an
optimiser step on the weights and asks for the loss of the mixture at most once. `train_in_search` and
`fit_samples` have no meaning here.

Axes: K tiers, L limits of a tier, J losses, E edges, O operations, N architectures.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from pipeline.algorithms import adam, relaxation
from pipeline.algorithms.adam import AdamSettings, Moments
from pipeline.algorithms.relaxation import Admm, LinearCost, Mask, Schedule
from pipeline.artifacts import sha256_json
from pipeline.errors import ConfigError, DivergedTraining
from pipeline.search.bands import BandSampler
from pipeline.search.base import RELAXED
from pipeline.search.checkpoint import (
    archs_of,
    arrays_of_candidates,
    candidates_in,
    labelled,
    load_own,
    rows_of,
    under,
)
from pipeline.search.gradient_rules import LEAST_MOVES, PUBLISHED_RATE, GradientSettings, Rules, Where
from pipeline.search.nearest import TEMPERATURES, Nearest, drawn_by, operations_of, with_second_chance
from pipeline.search.pressure import Pressure
from pipeline.search.problem import SearchProblem
from pipeline.types import (
    Arch,
    Arrays,
    Candidate,
    Checkpoint,
    Evaluator,
    FitInfo,
    FloatArray,
    IntArray,
    Json,
    Progress,
    RelaxedEvaluator,
    SearchResult,
)

# First word of the seed of every random stream here; those of `search/problem.py` are 0 to 3.
STAGE_ALPHA, STAGE_COSTS, STAGE_CANDIDATES = range(10, 13)

LARGEST_RATE = 0.05
"""That a short search gets by itself."""

LEAST_REACH = 0.1
"""How far α must be able to go, its first values being about 1/|O| with `crb`, and even with `softmax`."""

POOL = 2_000
"""Random architectures that show whether a tier's budget can be kept, before anything is trained."""

BAND = 0.85
"""Architectures that use less of the budget come after those that use this much, as in `BandSampler`."""


class TierState(NamedTuple):
    """All that one tier's search has to remember beside the weights of the network; arrays, so that it
    can be kept. `moves` is the steps of α, `schedule_2` as `Schedule`."""

    alpha_EO: FloatArray
    mask_EO: Mask
    first_EO: FloatArray
    second_EO: FloatArray
    moves: NDArray[np.int64]
    schedule_2: FloatArray
    target_EO: FloatArray
    dual_EO: FloatArray
    multiplier_L: FloatArray
    base_L: FloatArray
    weight_LEO: FloatArray
    kept_EO: FloatArray

    @property
    def schedule(self) -> Schedule:
        return Schedule(*self.schedule_2.tolist())

    @property
    def memory(self) -> Admm:
        return Admm(self.target_EO, self.dual_EO)

    @property
    def costs(self) -> LinearCost:
        return LinearCost(self.base_L, self.weight_LEO, self.kept_EO)


def descend(
    method: str,
    problem: SearchProblem,
    config: GradientSettings,
    rules: Rules,
    *,
    checkpoint: Checkpoint,
    trace: Callable[[Json], None],
    progress: Progress,
    clock: Callable[[], float] = time.monotonic,
) -> SearchResult:
    """Search tier by tier, from the checkpoint if there is one.

    The trace gets a record per minibatch, `iteration` counting all of them from 0, the warm-up's
    included; a checkpoint's record holds the number finished, as in `drive`. The result is that of an
    uninterrupted search, bit for bit (but for `seconds`). Its candidates are the architectures that a
    tier's mixture has stood for, and beside them, found by perturbing its last mixture, such as keep the
    budget; their losses are squared distances to that mixture, to the nearest where several tiers found one.

    Raises ConfigError where the evaluator cannot mix or the problem's numbers leave nothing to search
    with, InfeasibleBudget before anything is trained, DivergedTraining at a loss that is not finite;
    the last checkpoint stays."""
    run = _Search(method, problem, config, rules, checkpoint, clock)
    run.resume()
    if run.unfinished:
        run.find_bands()
        run.say_if_too_short(progress)
    with progress.track("warm-up", problem.warm_up, min(run.iteration, problem.warm_up)) as advance:
        while run.iteration < problem.warm_up:
            trace(run.warm_up())
            advance(1, "")
            run.save_if_due()
    while run.unfinished:
        run.begin()
        tier = run.tier
        with progress.track(f"search {problem.tiers[tier].key}", run.steps[tier], run.step) as advance:
            while run.tier == tier:
                trace(run.iterate())
                advance(1, "")
                run.save_if_due()
    run.save()
    return run.result()


def relaxed_evaluator(method: str, evaluator: Evaluator) -> RelaxedEvaluator:
    """The same evaluator as what a gradient method needs. Raises ConfigError where it is not."""
    if not hasattr(evaluator, "losses_and_grads"):
        raise ConfigError(
            f"method '{method}' needs a {RELAXED} evaluator, and {type(evaluator).__name__} is none; "
            f"set evaluator: {RELAXED}"
        )
    return cast(RelaxedEvaluator, evaluator)


class _Search:
    """The moving parts of one search; all of it that must survive is in `save`."""

    def __init__(
        self,
        method: str,
        problem: SearchProblem,
        config: GradientSettings,
        rules: Rules,
        checkpoint: Checkpoint,
        clock: Callable[[], float],
    ) -> None:
        self.method, self.problem, self.config, self.rules = method, problem, config, rules
        self.checkpoint, self.clock = checkpoint, clock
        self.evaluator = relaxed_evaluator(method, problem.evaluator)
        self.steps = self._steps_per_tier()
        published = PUBLISHED_RATE * rules.published_steps
        rate = config.learning_rate or min(published / min(self.steps), LARGEST_RATE)
        self.optimiser = AdamSettings(rate, config.beta1, config.beta2, config.weight_decay)
        edges = self.evaluator.edges
        self.cell_E = _cells([slot.name for slot in edges])
        self.valid_EO = operations_of(edges)
        self.first_mask_EO = operations_of(edges, rules.activation.offers_none)
        self.sizes_E = self.first_mask_EO.sum(axis=1)
        self.pressures = [
            Pressure(
                problem,
                self.evaluator,
                tier,
                damping=config.damping,
                rate=config.pressure_rate * rate,
                samples=config.cost_samples,
            )
            for tier in problem.tiers
        ]
        self.inputs = sha256_json(
            [method, config.model_dump(mode="json"), problem.seed, problem.sizes]
            + [problem.evaluations, problem.warm_up]
            + [tier.to_json() for tier in problem.tiers]
            + [dict(problem.made_from)]
            + [[slot.name, list(slot.choices)] for slot in edges]
        )
        self.state: TierState | None = None
        self.shared: Arrays = {}
        self.mixes: list[FloatArray] = []
        self.visited: dict[Arch, None] = {}
        self.candidates: dict[Arch, Candidate] = {}
        self.iteration = self.evaluations = self.step = 0
        self.bands: BandSampler | None = None
        self.seconds_before, self.started = 0.0, clock()
        self.saved = self.started

    def _steps_per_tier(self) -> list[int]:
        num = len(self.problem.tiers)
        share, rest = divmod(self.problem.evaluations, num)
        if share == 0:
            raise ConfigError(
                f"method '{self.method}': search.evaluations is {self.problem.evaluations}, fewer "
                f"minibatches than there are tiers ({num}); set {self._enough} or more"
            )
        return [share + (k < rest) for k in range(num)]

    @property
    def tier(self) -> int:
        """The tier that is searched for."""
        return len(self.mixes)

    @property
    def unfinished(self) -> bool:
        return self.tier < len(self.problem.tiers)

    @property
    def seconds(self) -> float:
        return self.seconds_before + self.clock() - self.started

    def rng(self, stage: int, *words: int) -> Generator:
        return np.random.default_rng([self.problem.seed, stage, *words])

    # -------------------------------------------------------------------------------------- before a search

    def find_bands(self) -> None:
        """Make sure that every tier has architectures. Raises InfeasibleBudget."""
        self.bands = BandSampler(self.problem, low=BAND, pool_size=POOL)

    def say_if_too_short(self, progress: Progress) -> None:
        moves, rate = self.rules.moves(min(self.steps)), self.optimiser.learning_rate
        if moves >= LEAST_MOVES and rate * moves >= LEAST_REACH:
            return
        progress.say(
            f"{self.method}: about {moves:.0f} steps of {rate:.2g} each, in which what operations weigh can "
            f"change by {rate * moves:.2g}, decide a tier, which is little; set search.evaluations to "
            f"{self._enough} or more (it is {self.problem.evaluations})"
            + (" or raise method.learning_rate" if moves >= LEAST_MOVES else "")
        )

    @property
    def _enough(self) -> int:
        """Minibatches for all tiers."""
        return len(self.problem.tiers) * self.rules.enough

    def first_alpha(self) -> FloatArray:
        """The same for all tiers, so that they share the warm-up."""
        return self.rules.activation.start(self.first_mask_EO, self.rng(STAGE_ALPHA))

    def warm_up(self) -> Json:
        mix_EO = self.rules.activation.mix(self.first_alpha(), self.first_mask_EO)
        info = self._fit(mix_EO, self.iteration)
        record: Json = {"iteration": self.iteration, "stage": "warm_up", **_fit_record(info)}
        self.iteration += 1
        return record

    def begin(self) -> None:
        """Set out for the current tier, if that is not done yet."""
        if self.state is not None:
            return
        if len(self.problem.tiers) > 1:
            if self.tier == 0:
                self.shared = self.problem.evaluator.state()
            else:
                self.problem.evaluator.load_state(self.shared)
        alpha_EO, mask_EO = self.first_alpha(), self.first_mask_EO
        moments = adam.start(alpha_EO)
        memory = self.rules.pull.start(alpha_EO, mask_EO, self.rules.activation)
        costs = self._costs(self.rules.activation.mix(alpha_EO, mask_EO), moves=0)
        self.state = TierState(
            alpha_EO,
            mask_EO,
            moments.first,
            moments.second,
            np.array(0),
            np.array(Schedule()),
            *memory,
            np.zeros(self._pressure.num_limits),
            *costs,
        )

    # ---------------------------------------------------------------------------------------- one minibatch

    def iterate(self) -> Json:
        """A step of α if the schedule says so, then one of the weights; the tier's last leaves
        candidates."""
        at, rules = self.problem.warm_up + self.step, self.rules
        moves, schedule = self._decide()
        moved = self._move(at) if moves else {}
        state = self._state
        info = self._fit(rules.activation.mix(state.alpha_EO, state.mask_EO), at)
        if rules.pace is not None:
            schedule = relaxation.observe(schedule, rules.pace, info.grad_sq_norm)
        alpha_EO, mask_EO = rules.activation.prune(state.alpha_EO, state.mask_EO)
        self.state = state._replace(alpha_EO=alpha_EO, mask_EO=mask_EO, schedule_2=np.array(schedule))
        record = self._record(info, moved)
        self.iteration += 1
        self.step += 1
        if self.step == self.steps[self.tier]:
            self._finish_tier()
        return {**record, "evaluations": self.evaluations}

    @property
    def _state(self) -> TierState:
        assert self.state is not None
        return self.state

    @property
    def _mix_EO(self) -> FloatArray:
        return self.rules.activation.mix(self._state.alpha_EO, self._state.mask_EO)

    @property
    def _pressure(self) -> Pressure:
        return self.pressures[self.tier]

    def _costs(self, mix_EO: FloatArray, moves: int) -> LinearCost:
        return self._pressure.linear_costs(mix_EO, self.rng(STAGE_COSTS, self.tier, moves))

    def _decide(self) -> tuple[bool, Schedule]:
        schedule = self._state.schedule
        return (True, schedule) if self.rules.pace is None else relaxation.decide(schedule, self.rules.pace)

    def _move(self, at: int) -> Json:
        """A step of α; what is told of it, such as the loss of the mixture it started from."""
        state, activation = self._state, self.rules.activation
        moves = int(state.moves)
        if moves and moves % self.config.cost_every == 0:
            state = state._replace(**self._costs(self._mix_EO, moves)._asdict())
        mix_EO = activation.mix(state.alpha_EO, state.mask_EO)
        chosen = self.evaluator.discretise(mix_EO)
        moved, gradient_EO = self._objectives(state, mix_EO, chosen, at)
        where = Where(self.step / self.steps[self.tier], moves, self._disc, self.cell_E)
        _, pull_EO = self.rules.pull.gradient(mix_EO, state.mask_EO, state.memory, where)
        gradient_EO = gradient_EO + pull_EO
        length = float(np.linalg.norm(gradient_EO))
        pressure_EO, multiplier_L = self._pressure.of(state.costs, mix_EO, chosen, state.multiplier_L, length)
        gradient_EO = activation.pull_back(state.alpha_EO, state.mask_EO, gradient_EO + pressure_EO)
        moments = Moments(state.first_EO, state.second_EO, moves)
        alpha_EO, moments = adam.step(state.alpha_EO, gradient_EO, moments, self.optimiser)
        alpha_EO = np.where(state.mask_EO, alpha_EO, 0.0)
        where = where._replace(moves=moments.steps)
        memory = self.rules.pull.remember(state.memory, alpha_EO, state.mask_EO, activation, where)
        self.state = state._replace(
            alpha_EO=alpha_EO,
            first_EO=moments.first,
            second_EO=moments.second,
            moves=np.array(moments.steps),
            target_EO=memory.target_EO,
            dual_EO=memory.dual_EO,
            multiplier_L=multiplier_L,
        )
        self._visit()
        return moved

    def _objectives(
        self, state: TierState, mix_EO: FloatArray, chosen: Arch, at: int
    ) -> tuple[Json, FloatArray]:
        """What is told of the mixture's losses, and the gradient that α goes down for them."""
        losses_J, gradients_JEO = self.evaluator.losses_and_grads(mix_EO, step=at)
        self.evaluations += 1
        if not (np.isfinite(losses_J).all() and np.isfinite(gradients_JEO).all()):
            raise self._diverged("loss of the mixture, or its gradient,", float(losses_J.sum()))
        moved: Json = {"loss": float(losses_J[0])}
        if self.rules.combine is None:
            return moved, gradients_JEO[0]
        tier = self.problem.tiers[self.tier]
        chosen_EO = self.evaluator.mix_of(chosen)
        gradient_EO, told = self.rules.combine(gradients_JEO, state.alpha_EO, state.mask_EO, chosen_EO, tier)
        return moved | told, gradient_EO

    def _fit(self, mix_EO: FloatArray, at: int) -> FitInfo:
        info = self.evaluator.fit(mix_EO, step=at)
        if not math.isfinite(info.loss):
            raise self._diverged("training loss", info.loss)
        return info

    def _diverged(self, what: str, value: float) -> DivergedTraining:
        return DivergedTraining(
            f"search step {self.iteration}: the {what} is {value}; the last checkpoint is kept: lower the "
            "learning rate, or look for broken images"
        )

    def _disc(self, values_EO: FloatArray, mask_EO: Mask) -> FloatArray:
        """Disc(·) by the space's own rule."""
        arch = self.evaluator.discretise(relaxation.above_zero(values_EO, mask_EO))
        return np.where(mask_EO, self.evaluator.mix_of(arch), 0.0)

    def _visit(self) -> None:
        """Remember the architecture that the mixture stands for, the latest last."""
        arch = self.problem.space.canonical(self.evaluator.discretise(self._mix_EO))
        self.visited.pop(arch, None)
        self.visited[arch] = None

    # ------------------------------------------------------------------------------------- the end of a tier

    def _finish_tier(self) -> None:
        """Keep what was found, and set out for the next tier."""
        mix_EO = self._mix_EO
        for arch, off in self._distances(mix_EO, self._choose()).items():
            known = self.candidates.get(arch)
            self.candidates[arch] = Candidate(arch, off if known is None else min(off, known.loss), 0)
        self.mixes.append(mix_EO)
        self.state, self.visited, self.step = None, {}, 0
        if self.shared and self.unfinished:
            self.problem.evaluator.load_state(self.shared)

    def _distances(self, mix_EO: FloatArray, archs: Sequence[Arch]) -> dict[Arch, float]:
        distance_N = Nearest(self.evaluator, mix_EO).losses(archs)[:, 0]
        return dict(zip(archs, distance_N.tolist(), strict=True))

    def _choose(self) -> list[Arch]:
        """What the mixture stands for now, then what keeps the budget beside it, then what it stood
        for."""
        num = self.config.candidates
        self._visit()
        now, *before = reversed(self.visited)
        near = self._within_budget(self._mix_EO, num)
        keeping = near[: max(1, num - 1 - min(len(before), num // 2))]
        ordered = [now, *keeping, *before] if num > 1 else keeping
        return list(dict.fromkeys(ordered))[:num]

    def _within_budget(self, mix_EO: FloatArray, num: int) -> list[Arch]:
        """Distinct architectures that keep the tier's budget, those that use it first, each group from the
        nearest to the mixture on; of its band where none was found."""
        rng, k = self.rng(STAGE_CANDIDATES, self.tier), self.tier
        loose_EO = with_second_chance(mix_EO, self.valid_EO)
        found: dict[Arch, float] = {}
        for temperature in TEMPERATURES:
            drawn = [drawn_by(self.evaluator, loose_EO, temperature, rng) for _ in range(4 * num)]
            archs = list(dict.fromkeys(self.problem.space.canonical(arch) for arch in drawn))
            usage_N = self.problem.usage(archs)[:, k]
            found |= {a: float(u) for a, u in zip(archs, usage_N, strict=True) if u <= 1 and a not in found}
            if sum(usage >= BAND for usage in found.values()) >= num:
                break
        if not found:
            assert self.bands is not None, "found before anything is trained"
            found = dict.fromkeys(self.problem.archs(self.bands.draw_of([k] * num, rng)), 1.0)
        off = self._distances(mix_EO, list(found))
        return sorted(found, key=lambda arch: (found[arch] < BAND, off[arch]))[:num]

    # -------------------------------------------------------------------------------------- for people

    def _record(self, info: FitInfo, moved: Json) -> Json:
        """Of one minibatch; the tier's part has what is told of a step of α."""
        state, tier, mix_EO = self._state, self.problem.tiers[self.tier], self._mix_EO
        chosen = self.evaluator.discretise(mix_EO)
        own: Json = {
            "tier": tier.key,
            **self._pressure.told(state.costs, mix_EO, chosen, state.multiplier_L),
            "entropy": relaxation.entropy(mix_EO, self.sizes_E),
            "operations": int((mix_EO > 0).sum()),
            "choices": list(next(reversed(self.visited)).choices) if self.visited else None,
        }
        record: Json = {"iteration": self.iteration, "stage": "search", **_fit_record(info)}
        if self.rules.pace is not None:
            smoothed, threshold = state.schedule
            record |= {"smoothed_grad_sq_norm": smoothed, "tau": threshold}
        return {**record, "tiers": [own | moved]}

    # ------------------------------------------------------------------------------------------ checkpoints

    def save_if_due(self) -> None:
        if self.clock() - self.saved >= self.problem.save_every_s:
            self.save()

    def save(self) -> None:
        num_slots = len(self.problem.sizes)
        arrays = arrays_of_candidates(self.candidates.values(), num_slots) | {
            "visited": rows_of(self.visited, num_slots),
            "mixes": np.array(self.mixes).reshape(len(self.mixes), *self.first_mask_EO.shape),
        }
        if self.state is not None:
            arrays |= labelled("tier.", self.state._asdict())
        arrays |= labelled("shared.", self.shared)
        arrays |= labelled("evaluator.", self.problem.evaluator.state())
        counts = {
            name: getattr(self, name) for name in ("method", "inputs", "iteration", "evaluations", "step")
        }
        self.checkpoint.save(arrays, {**counts, "seconds": self.seconds})
        self.saved = self.clock()

    def resume(self) -> None:
        loaded = load_own(self.checkpoint, self.method, self.inputs)
        if loaded is None:
            return
        arrays, record = loaded
        space = self.problem.space.name
        state = under("tier.", arrays)
        self.state = TierState(**state) if state else None
        self.shared = under("shared.", arrays)
        self.problem.evaluator.load_state(under("evaluator.", arrays))
        self.mixes = list(arrays["mixes"])
        self.visited = dict.fromkeys(archs_of(arrays["visited"], space))
        self.candidates = candidates_in(arrays, space)
        self.iteration, self.evaluations = int(record["iteration"]), int(record["evaluations"])
        self.step, self.seconds_before = int(record["step"]), float(record["seconds"])

    def result(self) -> SearchResult:
        edges = tuple(self.evaluator.edges)
        return SearchResult(
            method=self.method,
            seed=self.problem.seed,
            evaluations=self.evaluations,
            seconds=self.seconds,
            candidates=tuple(self.candidates.values()),
            theta_KSC=self._theta_KSC() if edges == tuple(self.problem.space.slots) else None,
            mixes_KEO=np.stack(self.mixes),
        )

    def _theta_KSC(self) -> FloatArray:
        return np.stack([self._theta(mix_EO) for mix_EO in self.mixes])

    def _theta(self, mix_EO: FloatArray) -> FloatArray:
        """The mixture's shares; an edge without any weight chooses what the space makes of that."""
        decided_EO = self.evaluator.mix_of(self.evaluator.discretise(mix_EO))
        return np.where((mix_EO > 0).any(axis=1, keepdims=True), relaxation.shares(mix_EO), decided_EO)


def _cells(names: list[str]) -> IntArray:
    """Edges whose names begin with the same word are of one cell: `normal2.0`, `normal2.1`,
    `reduce2.0`."""
    words = ["".join(letter for letter in name.split(".")[0] if letter.isalpha()) for name in names]
    return np.array([sorted(set(words)).index(word) for word in words], dtype=np.int64)


def _fit_record(info: FitInfo) -> Json:
    return {"fit_loss": info.loss, "grad_sq_norm": info.grad_sq_norm}
