"""The methods that `search_tabular` and `search_synthetic` compare, each given the same problem and the same
count of evaluations.

What an evaluation is, for all alike: one loss of one network. Where answers are fixed, a network's first
counts and asking again is free; where answers are noisy, every one counts. Costs are known without an
evaluation, so a method that can rank a network over budget by its cost alone need not pay for its loss.

Peers from other libraries are used as follows, with their own defaults otherwise:

- `nsga2 (pymoo)`, `nsga2 (optuna)`: K. Deb et al., 2002, on (loss, cost), which serves all tiers at once
  with everything it has seen; networks beyond the largest budget are infeasible.
- `tpe (optuna)`: J. Bergstra et al., 2011, multivariate, a study per tier with the budget as constraint; the
  tiers take turns, and every study is told every evaluation that fits its budget.
- `catcma (cmaes)`: R. Hamano et al., 2024 (arXiv 2405.09962), its purely categorical form, per tier; a
  network over budget ranks behind all others by how far.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from pipeline.algorithms import evolution
from pipeline.progress import NoCheckpoint, Silent
from pipeline.search import METHODS
from pipeline.search.asng import Asng
from pipeline.search.importance import Importance
from pipeline.search.problem import SearchProblem
from pipeline.settings import Settings
from pipeline.types import Arch, Arrays, Evaluator, FitInfo, FloatArray, IntArray, Json

FIRST_SEED = 1000
"""Lower seeds chose the defaults of `importance` and how peers are used, so they cannot judge."""
ASNG = "asng per tier"
OURS = "importance"
ASNG_FACTOR = 3
"""`asng` goes on for so many times the evaluations, to see when it gets where `importance` is."""
IDLE_LIMIT = 500
"""Proposals in a row that need no evaluation after which a peer has converged."""


class Recording:
    """An evaluator that writes down what was asked, in order, what it answered, and what was asked
    together."""

    def __init__(self, inner: Evaluator) -> None:
        self._inner = inner
        self.noisy, self.trains = inner.noisy, inner.trains
        self.asked: list[Arch] = []
        self.answers: list[float] = []
        self.groups: list[int] = []

    def losses(self, archs: Sequence[Arch], *, step: int, thorough: bool = False) -> FloatArray:
        losses = self._inner.losses(archs, step=step, thorough=thorough)
        self.asked += archs
        self.answers += losses[:, 0].tolist()
        self.groups += [step] * len(archs)
        return losses

    def fit(self, archs: Sequence[Arch], *, step: int) -> FitInfo:
        return self._inner.fit(archs, step=step)

    def state(self) -> Arrays:
        return self._inner.state()

    def load_state(self, state: Arrays) -> None:
        self._inner.load_state(state)


class Contestant(NamedTuple):
    """`run` asks the problem's evaluator until its evaluations are spent; `settings` say how it is used."""

    run: Callable[[SearchProblem], None]
    settings: Json
    factor: int = 1
    """Times the evaluations of the others."""


# ---------------------------------------------------------------------------------------------------- our own


def of_catalogue(method: str, config: Settings, factor: int = 1) -> Contestant:
    def run(problem: SearchProblem) -> None:
        METHODS[method].run(
            problem, config, checkpoint=NoCheckpoint(), trace=lambda record: None, progress=Silent()
        )

    return Contestant(run, {"method": method, **config.model_dump(mode="json")}, factor)


# ------------------------------------------------------------------------------------------------------ peers


class Spent(Exception):
    """No evaluation is left, or nothing new is asked for any more."""


class Oracle:
    """What a peer asks: costs for nothing, losses while there are evaluations left. Raises Spent."""

    def __init__(self, problem: SearchProblem) -> None:
        self._problem = problem
        self._known: dict[Arch, float] = {}
        self._evaluations = self._idle = 0

    def usage(self, choices: Sequence[int]) -> FloatArray:
        """Share of each tier's budget, shape (K,)."""
        return np.asarray(self._problem.usage([self._arch(choices)])[0])

    def loss(self, choices: Sequence[int]) -> float:
        arch = self._arch(choices)
        if self._problem.answers_are_fixed and arch in self._known:
            self.passed()
            return self._known[arch]
        if self._evaluations == self._problem.evaluations:
            raise Spent
        loss = float(self._problem.evaluator.losses([arch], step=self._evaluations)[0, 0])
        self._known[arch] = loss
        self._evaluations += 1
        self._idle = 0
        return loss

    def passed(self) -> None:
        """Note a proposal that needs no evaluation."""
        self._idle += 1
        if self._idle >= IDLE_LIMIT:
            raise Spent

    def _arch(self, choices: Sequence[int]) -> Arch:
        space = self._problem.space
        return space.canonical(Arch(space.name, tuple(int(choice) for choice in choices)))


def peer(search: Callable[..., None], **settings: Any) -> Contestant:
    """A peer's loop, which ends with Spent."""

    def run(problem: SearchProblem) -> None:
        try:
            search(problem, Oracle(problem), **settings)
        except Spent:
            pass

    return Contestant(run, {"method": search.__name__, **settings})


def pymoo_nsga2(problem: SearchProblem, oracle: Oracle, population: int) -> None:
    from pymoo.algorithms.moo.nsga2 import NSGA2
    from pymoo.core.mutation import Mutation
    from pymoo.core.problem import ElementwiseProblem
    from pymoo.operators.crossover.ux import UniformCrossover
    from pymoo.operators.sampling.rnd import IntegerRandomSampling
    from pymoo.optimize import minimize

    sizes = problem.sizes

    class LossAndCost(ElementwiseProblem):  # type: ignore[misc]
        def __init__(self) -> None:
            upper = np.asarray(sizes) - 1
            super().__init__(
                n_var=len(sizes), n_obj=2, n_ieq_constr=1, xl=np.zeros_like(upper), xu=upper, vtype=int
            )

        def _evaluate(self, x: IntArray, out: dict[str, Any], *args: Any, **kwargs: Any) -> None:
            loss, cost, excess = _loss_and_cost(oracle, x.tolist())
            out["F"], out["G"] = [loss, cost], [excess]

    class AnotherChoice(Mutation):  # type: ignore[misc]
        """One slot in S changes on average, one at least."""

        def _do(self, task: Any, X: IntArray, random_state: Any = None, **kwargs: Any) -> IntArray:
            return evolution.mutate(X.astype(np.int64), sizes, 1 / len(sizes), random_state)

    minimize(
        LossAndCost(),
        NSGA2(
            pop_size=population,
            sampling=IntegerRandomSampling(),
            crossover=UniformCrossover(),
            mutation=AnotherChoice(),
        ),
        ("n_gen", 10**6),
        seed=problem.seed,
    )


def optuna_nsga2(problem: SearchProblem, oracle: Oracle, population: int) -> None:
    optuna = _optuna()
    study = optuna.create_study(
        directions=["minimize"] * 2,
        sampler=optuna.samplers.NSGAIISampler(population_size=population, seed=problem.seed),
    )
    distributions = _distributions(optuna, problem.sizes)
    while True:
        trial = study.ask(distributions)
        loss, cost, excess = _loss_and_cost(oracle, _row(trial.params))
        trial.set_constraint("budget", excess)
        study.tell(trial, [loss, cost])


def _loss_and_cost(oracle: Oracle, choices: Sequence[int]) -> tuple[float, float, float]:
    """(loss, cost, excess): share of the largest budget, and by how much it is exceeded; no loss is asked for
    where it is."""
    cost = float(oracle.usage(choices).min())
    if cost > 1:
        oracle.passed()
        return 0.0, cost, cost - 1
    return oracle.loss(choices), cost, 0.0


def optuna_tpe(problem: SearchProblem, oracle: Oracle, shared: bool) -> None:
    optuna = _optuna()
    distributions = _distributions(optuna, problem.sizes)
    studies = [
        optuna.create_study(sampler=optuna.samplers.TPESampler(seed=problem.seed * 100 + k))
        for k in range(len(problem.tiers))
    ]
    while True:
        for k, study in enumerate(studies):
            trial = study.ask(distributions)
            usage_K = oracle.usage(_row(trial.params))
            trial.set_constraint("budget", float(usage_K[k]) - 1)
            if usage_K[k] > 1:
                oracle.passed()
                study.tell(trial, 0.0)
                continue
            loss = oracle.loss(_row(trial.params))
            study.tell(trial, loss)
            for j, other in enumerate(studies if shared else []):
                if j != k and usage_K[j] <= 1:
                    other.add_trial(
                        optuna.trial.create_trial(
                            params=trial.params,
                            distributions=distributions,
                            value=loss,
                            constraints={"budget": float(usage_K[j]) - 1},
                        )
                    )


def _optuna() -> Any:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _distributions(optuna: Any, sizes: Sequence[int]) -> dict[str, Any]:
    return {str(s): optuna.distributions.CategoricalDistribution(range(size)) for s, size in enumerate(sizes)}


def _row(params: dict[str, int]) -> list[int]:
    return [params[str(s)] for s in range(len(params))]


def cmaes_catcma(problem: SearchProblem, oracle: Oracle) -> None:
    from cmaes import CatCMAwM

    sizes = problem.sizes
    optimizers = [
        CatCMAwM(c_space=list(sizes), seed=problem.seed * 100 + k + 1) for k in range(len(problem.tiers))
    ]

    def value(k: int, choices: Sequence[int]) -> float:
        usage = float(oracle.usage(choices)[k])
        if usage > 1:
            oracle.passed()
            return OVER_BUDGET * usage
        return oracle.loss(choices)

    while True:
        for k, optimizer in enumerate(optimizers):
            asked = [optimizer.ask() for _ in range(optimizer.population_size)]
            optimizer.tell(
                [(solution, value(k, solution.c[:, : max(sizes)].argmax(axis=1))) for solution in asked]
            )


OVER_BUDGET = 1e9
"""Times its usage: what a network that breaks its budget is worth, worse than any loss."""

CONTESTANTS: dict[str, Contestant] = {
    OURS: of_catalogue("importance", Importance()),
    "importance (weights)": of_catalogue("importance", Importance(guide="weights")),
    ASNG: of_catalogue("asng", METHODS["asng"].config(), ASNG_FACTOR),
    "asng (over budget too)": of_catalogue(
        "asng", Asng(within_budget=False, samples_per_tier=4, delta0=0.3), ASNG_FACTOR
    ),
    "random": of_catalogue("random", METHODS["random"].config()),
    "evolution per tier": of_catalogue("evolution", METHODS["evolution"].config()),
    "nsga2": of_catalogue("nsga2", METHODS["nsga2"].config()),
    "nsga2 (pymoo)": peer(pymoo_nsga2, population=20),
    "nsga2 (optuna)": peer(optuna_nsga2, population=20),
    "tpe (optuna)": peer(optuna_tpe, shared=True),
    "catcma (cmaes)": peer(cmaes_catcma),
}
