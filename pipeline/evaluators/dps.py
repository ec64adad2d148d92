"""Discrete proxy search: the settings of `eproxy` tuned on a handful of architectures of known accuracy.

Y. Li, J. Li, C. Han, P. Li, J. Xiong, D. Chen, "Extensible Proxy for Efficient NAS", 2022, arXiv
2210.09459.

Regularised evolution over the settings (`genome.py`): tournaments in a population, every gene
mutated with probability 0.2, the oldest dies. Fitness is Spearman's ρ of minus the score with the known
accuracy. ρ on architectures that were held back, with a bootstrap interval, says what the answer is worth.

The answer is ours. The paper takes the best settings of 200 evaluations (population 40, tournaments of 10),
`members: 1` and `jacov: false`. On twenty architectures, though, the best is mostly lucky: on others it ranks
worse than what it was started from. So the settings that were started from and the best others that differ
in E vote together, and after some forty evaluations more of them gain nothing. They err alike, though; so
half the vote is that of `jacov`, which looks at gradients by images and not at learning. That it and its
half were right was seen on 200 cells of NAS-Bench-201, which `benchmarks/dps_nb201.py` leaves out.

Chosen here: the population starts from the settings that were asked for and random ones; channels end
at `max_channels`, since a branch of 512 channels behind a 7×7 barrier costs some fifty times what a small
network that it judges does; E does not depend on α and β, so that others for settings already tried cost
nothing.

Axes: G genes, T evaluations (tries), A known architectures.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from pipeline.algorithms import evolution
from pipeline.artifacts import FileCheckpoint, read_json, sha256_json, write_json, write_yaml
from pipeline.data.base import ImageTask
from pipeline.errors import ConfigError, StaleArtifact
from pipeline.evaluators.correlation import bootstrap, spearman
from pipeline.evaluators.eproxy import (
    Correlation,
    Ensemble,
    Eproxy,
    EproxySettings,
    Genes,
    Member,
    joined,
    standard_of,
    standardised,
)
from pipeline.evaluators.genome import Genome, genes_of
from pipeline.evaluators.known import LEAST_KNOWN, Known, read_known
from pipeline.evaluators.scores import fixed_images, score_all, workers_on
from pipeline.settings import Settings
from pipeline.spaces.base import SearchSpace
from pipeline.types import Arch, Arrays, Checkpoint, FloatArray, IntArray, Json, Progress

_SPLIT, _TRY, _RESAMPLE = range(3)
"""Streams of random numbers."""


class DpsSettings(Settings):
    """`held_back` is the share of the known architectures that judges and does not guide; with 0 nothing
    judges. `members` of the settings tried become the answer, and with `jacov` that proxy has half of their
    vote. `max_channels` is the most that a branch may have, 512 in the paper."""

    population: int = Field(20, ge=2)
    tournament: int = Field(5, ge=1)
    evaluations: int = Field(60, ge=1)
    mutation: float = Field(0.2, gt=0, le=1)
    members: int = Field(5, ge=1)
    jacov: bool = True
    held_back: float = Field(0.3, ge=0, lt=1)
    max_channels: int = Field(128, ge=16)


# --------------------------------------------------------------------------------------------------- judging


class Judge:
    """E of architectures under any settings, on one batch of images."""

    def __init__(
        self, space: SearchSpace, task: ImageTask, base: EproxySettings, *, seed: int, device: str = "cpu"
    ) -> None:
        self._space, self._seed, self._device = space, seed, device
        self._images = fixed_images(task, base, seed)
        self._workers = workers_on(device, base)

    def proxy(self, settings: EproxySettings) -> Eproxy:
        return Eproxy(self._space, self._images, settings, seed=self._seed, device=self._device)

    def votes(self, settings: EproxySettings, archs: Sequence[Arch]) -> FloatArray:
        """Scores of an ensemble, shape (A,)."""
        proxy = Ensemble(self._space, self._images, settings, seed=self._seed, device=self._device)
        found_A = np.array(list(score_all(proxy, archs, self._workers)))
        return np.where(np.isfinite(found_A), found_A, proxy.worst)

    def correlations(self, archs: Sequence[Arch]) -> FloatArray:
        """`Correlation` of each, shape (A,); infinite where an image has no gradient."""
        voter = Correlation(self._space, self._images, seed=self._seed, device=self._device)
        found_A = np.array(list(score_all(voter, archs, self._workers)))
        return np.where(np.isfinite(found_A), found_A, np.inf)

    def errors(self, settings: EproxySettings, archs: Sequence[Arch]) -> FloatArray:
        """E of each, shape (A,); NaN where it diverged."""
        return np.array(list(score_all(self.proxy(settings).error, archs, self._workers)))

    def scores(
        self, settings: EproxySettings, archs: Sequence[Arch], error_A: FloatArray | None = None
    ) -> FloatArray:
        """Scores as the evaluator would give them, shape (A,)."""
        if settings.members:
            return self.votes(settings, archs)
        proxy = self.proxy(settings)
        error_A = self.errors(settings, archs) if error_A is None else error_A
        found_A = np.array([proxy.corrected(a, e) for a, e in zip(archs, error_A.tolist(), strict=True)])
        return np.where(np.isfinite(found_A) & (found_A <= proxy.worst), found_A, proxy.worst)


# ------------------------------------------------------------------------------------------------ the search


@dataclass(frozen=True)
class Tries:
    """What has been evaluated, oldest first; the last `population` of them are the population."""

    rows_TG: IntArray
    rho_T: FloatArray
    errors_TA: FloatArray

    def __len__(self) -> int:
        return len(self.rho_T)

    @property
    def best(self) -> int:
        return int(np.argmax(self.rho_T))

    def plus(self, row_G: IntArray, rho: float, error_A: FloatArray) -> Tries:
        return Tries(
            np.concatenate([self.rows_TG, row_G[None]]),
            np.append(self.rho_T, rho),
            np.concatenate([self.errors_TA, error_A[None]]),
        )

    def arrays(self) -> Arrays:
        return {"rows": self.rows_TG, "rho": self.rho_T, "errors": self.errors_TA}

    @classmethod
    def of(cls, arrays: Mapping[str, Any]) -> Tries:
        return cls(arrays["rows"], arrays["rho"], arrays["errors"])


class Dps:
    """The search over settings. What is tried at step i depends on the seed, i and what was tried
    before."""

    def __init__(
        self, judge: Judge, known: Sequence[Known], base: EproxySettings, settings: DpsSettings, seed: int
    ) -> None:
        self._judge, self._settings, self._seed = judge, settings, seed
        self._archs = [k.arch for k in known]
        self._accuracy_A = np.array([k.accuracy for k in known])
        self._genome = Genome(base, settings.max_channels)
        self._first_G = self._genome.encode(base)
        self._known_errors: dict[bytes, FloatArray] = {}
        self._started, self._seconds_before = time.monotonic(), 0.0

    @property
    def seconds(self) -> float:
        """Spent on the search so far, by earlier processes too."""
        return self._seconds_before + time.monotonic() - self._started

    def run(self, identity: str, checkpoint: Checkpoint, progress: Progress) -> Tries:
        """Raises StaleArtifact where the checkpoint is of another search."""
        tries = self._resume(identity, checkpoint)
        with progress.track("dps", self._settings.evaluations, len(tries)) as advance:
            while len(tries) < self._settings.evaluations:
                tries = self._try_one(tries)
                checkpoint.save(tries.arrays(), {"identity": identity, "seconds": self.seconds})
                advance(1, f"best ρ {tries.rho_T[tries.best]:.3f}")
        return tries

    def settings_of(self, row_G: IntArray) -> EproxySettings:
        return self._genome.decode(row_G)

    def answer(self, tries: Tries) -> tuple[EproxySettings, float]:
        """The settings found, and their ρ on what was searched on."""
        if self._settings.members == 1 and not self._settings.jacov:
            return self.settings_of(tries.rows_TG[tries.best]), float(tries.rho_T[tries.best])
        members: list[Member] = []
        vote_MA: list[list[float]] = []
        for t in self._voters(tries):
            scores = self._scores(tries, t).tolist()
            standard = standard_of(scores)
            vote_MA.append([standardised(score, standard) for score in scores])
            genes = genes_of(self.settings_of(tries.rows_TG[t]))
            members.append(Member(**genes, **standard.model_dump()))
        found = self._genome.base.model_copy(update={"members": tuple(members)})
        vote_A = np.mean(vote_MA, axis=0)
        if self._settings.jacov:
            correlation_A = self._judge.correlations(self._archs)
            found = with_jacov(found, correlation_A)
            assert found.jacov is not None
            pairs = zip(vote_A.tolist(), correlation_A.tolist(), strict=True)
            vote_A = np.array([joined(vote, correlation, found.jacov) for vote, correlation in pairs])
        return found, spearman(vote_A, self._accuracy_A)

    def _voters(self, tries: Tries) -> list[int]:
        """The first try and the best others, no two of which have the same E; of one the best."""
        if self._settings.members == 1:
            return [tries.best]
        chosen: dict[bytes, int] = {}
        for t in [0, *np.argsort(-tries.rho_T, kind="stable").tolist()]:
            chosen.setdefault(self._genome.without_correction(tries.rows_TG[t]), t)
        return list(chosen.values())[: self._settings.members]

    def _scores(self, tries: Tries, t: int) -> FloatArray:
        return self._judge.scores(self.settings_of(tries.rows_TG[t]), self._archs, tries.errors_TA[t])

    def _resume(self, identity: str, checkpoint: Checkpoint) -> Tries:
        loaded = checkpoint.load()
        if loaded is None:
            num_genes, num_archs = len(self._genome.genes), len(self._archs)
            return Tries(np.zeros((0, num_genes), dtype=np.int64), np.zeros(0), np.zeros((0, num_archs)))
        arrays, record = loaded
        if record.get("identity") != identity:
            raise StaleArtifact(
                "dps: the checkpoint is of a search with other architectures, settings or images; remove it, "
                "or choose another --out"
            )
        self._seconds_before = float(record["seconds"])
        tries = Tries.of(arrays)
        self._known_errors = {
            self._genome.without_correction(row_G): error_A
            for row_G, error_A in zip(tries.rows_TG, tries.errors_TA, strict=True)
        }
        return tries

    def _try_one(self, tries: Tries) -> Tries:
        row_G = self._genome.canonical(self._next(tries))
        settings, key = self._genome.decode(row_G), self._genome.without_correction(row_G)
        if key not in self._known_errors:
            self._known_errors[key] = self._judge.errors(settings, self._archs)
        error_A = self._known_errors[key]
        score_A = self._judge.scores(settings, self._archs, error_A)
        return tries.plus(row_G, spearman(score_A, self._accuracy_A), error_A)

    def _next(self, tries: Tries) -> IntArray:
        sizes, settings = self._genome.sizes, self._settings
        rng = np.random.default_rng([self._seed, _TRY, len(tries)])
        if len(tries) == 0:
            return self._first_G
        if len(tries) < settings.population:
            return np.asarray(evolution.random_choices(sizes, 1, rng)[0])
        living = slice(-settings.population, None)
        population = evolution.Population(
            tries.rows_TG[living], -tries.rho_T[living], np.asarray(len(tries), dtype=np.int64)
        )
        winner_1G = evolution.tournament(population, settings.tournament, 1, rng)
        return np.asarray(evolution.mutate(winner_1G, sizes, settings.mutation, rng)[0])


# --------------------------------------------------------------------------------------------- the whole job


@dataclass(frozen=True)
class DpsResult:
    """`rho` and `default_rho` are Spearman's ρ on the held-back architectures of the settings found and
    of those that were started from, `interval` the former's 95 % interval; None where nothing was held
    back. `search_rho` is what was maximised, and promises too much."""

    settings: EproxySettings
    search_rho: float
    searched_on: int
    held_back: int
    rho: float | None
    interval: tuple[float, float] | None
    default_rho: float | None
    evaluations: int
    seconds: float

    def to_json(self) -> Json:
        record = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return record | {
            "settings": settings_record(self.settings),
            "interval": None if self.interval is None else list(self.interval),
        }

    @classmethod
    def from_json(cls, record: Json) -> DpsResult:
        fields = {name: record[name] for name in cls.__dataclass_fields__}
        interval = fields["interval"]
        fields["settings"] = EproxySettings.model_validate(fields["settings"])
        fields["interval"] = None if interval is None else (float(interval[0]), float(interval[1]))
        return cls(**fields)


def summary(result: DpsResult) -> list[str]:
    """What a person wants to know, line by line."""
    lines = [
        f"ρ {result.search_rho:.3f} on the {result.searched_on} architectures that were searched on, which "
        "promises too much"
    ]
    if result.rho is None or result.interval is None:
        return [*lines, "no architecture was held back, so nothing says how good the settings are elsewhere"]
    low, high = result.interval
    return [
        *lines,
        f"ρ {result.rho:.3f} on {result.held_back} that were held back (95 % interval {low:.2f} to "
        f"{high:.2f}); the settings it started from have {result.default_rho:.3f} there",
    ]


def settings_record(settings: EproxySettings) -> Json:
    """What a settings file holds: everything but how many are scored at a time, and no genes beside
    members."""
    unused = set(Genes.model_fields) if settings.members else {"members"}
    if settings.jacov is None:
        unused.add("jacov")
    return settings.model_dump(mode="json", exclude={"workers", "settings_file", *unused})


def with_jacov(settings: EproxySettings, correlation_A: FloatArray) -> EproxySettings:
    """The settings of an ensemble whose vote `jacov` has half of. Raises ConfigError where it tells no two
    architectures apart."""
    finite_A = correlation_A[np.isfinite(correlation_A)]
    if len(np.unique(finite_A)) < 2:
        raise ConfigError(
            f"dps: of {len(correlation_A)} known architectures 'jacov' scores {len(finite_A)}, all alike; "
            "give others, or leave its vote out (--no-jacov)"
        )
    return settings.model_copy(update={"jacov": standard_of(finite_A.tolist())})


def split_known(known: Sequence[Known], share: float, seed: int) -> tuple[list[Known], list[Known]]:
    """The part to search on and the part held back. Raises ConfigError where either is too small."""
    order = np.random.default_rng([seed, _SPLIT]).permutation(len(known)).tolist()
    count = round(share * len(known))
    held, used = [known[i] for i in order[:count]], [known[i] for i in order[count:]]
    for part, what in ((used, "to search on"), (held, "held back")):
        if len(part) < LEAST_KNOWN and not (part is held and share == 0):
            raise ConfigError(
                f"dps: of {len(known)} known architectures {len(part)} are {what}; {LEAST_KNOWN} are needed: "
                "give more, change held_back, or set it to 0 to search on all and judge on none"
            )
    return used, held


def search_settings(
    space: SearchSpace,
    task: ImageTask,
    known: Sequence[Known],
    settings: DpsSettings,
    base: EproxySettings,
    *,
    seed: int,
    checkpoint: Checkpoint,
    progress: Progress,
    device: str = "cpu",
) -> DpsResult:
    """The settings of `eproxy` that rank the known architectures best, starting from `base`.

    The same, bit for bit, when resumed from the checkpoint (but for `seconds`, which the search took).
    Raises ConfigError where too few are known, StaleArtifact where the checkpoint is of another search."""
    if base.members:
        raise ConfigError("dps: starts from one proxy's settings; those given have several members")
    used, held = split_known(known, settings.held_back, seed)
    judge = Judge(space, task, base, seed=seed, device=device)
    dps = Dps(judge, used, base, settings, seed)
    tries = dps.run(identity_of(space, task, known, settings, base, seed), checkpoint, progress)
    seconds, (best, search_rho) = dps.seconds, dps.answer(tries)
    rho, interval, default_rho = _judged(judge, held, best, base, seed) if held else (None, None, None)
    return DpsResult(
        settings=EproxySettings.model_validate(settings_record(best)),
        search_rho=search_rho,
        searched_on=len(used),
        held_back=len(held),
        rho=rho,
        interval=interval,
        default_rho=default_rho,
        evaluations=len(tries),
        seconds=round(seconds, 3),
    )


def _judged(
    judge: Judge, held: Sequence[Known], best: EproxySettings, base: EproxySettings, seed: int
) -> tuple[float, tuple[float, float], float]:
    archs, accuracy_A = [k.arch for k in held], np.array([k.accuracy for k in held])
    score_A = judge.scores(best, archs)
    interval = bootstrap(score_A, accuracy_A, np.random.default_rng([seed, _RESAMPLE]))
    return spearman(score_A, accuracy_A), interval, spearman(judge.scores(base, archs), accuracy_A)


def identity_of(
    space: SearchSpace,
    task: ImageTask,
    known: Sequence[Known],
    settings: DpsSettings,
    base: EproxySettings,
    seed: int,
) -> str:
    """A hash of all that decides the result."""
    facts = [[k.arch.to_json(), k.accuracy] for k in known]
    stated = [settings.model_dump(mode="json"), settings_record(base), seed]
    data = "noise" if base.images == "noise" else task.fingerprint
    return sha256_json([space.fingerprint(), data, facts, *stated])


def tune(
    space: SearchSpace,
    task: ImageTask,
    known_file: Path,
    out: Path,
    settings: DpsSettings,
    base: EproxySettings,
    *,
    seed: int,
    progress: Progress,
    device: str = "cpu",
) -> DpsResult:
    """`search_settings` from a file of known architectures (`read_known`) to a settings file, `out`,
    that `evaluator.settings_file` reads.

    Beside `out`, which is a .yaml, stand its report (.json) and, until it is done, a checkpoint (.npz): the
    same command goes on where it stopped, and says the same again where it is done. Raises ConfigError,
    StaleArtifact."""
    report = out.with_suffix(".json")
    _refuse_to_overwrite(known_file, out, report)
    known = read_known(known_file, space)
    identity = identity_of(space, task, known, settings, base, seed)
    if report.exists() and out.exists():
        record = read_json(report)
        if record.get("identity") != identity:
            raise StaleArtifact(f"{report}: is of another search; remove it, or choose another --out")
        return DpsResult.from_json(record)
    checkpoint = FileCheckpoint(out.with_suffix(".npz"))
    result = search_settings(
        space,
        task,
        known,
        settings,
        base,
        seed=seed,
        checkpoint=checkpoint,
        progress=progress,
        device=device,
    )
    write_yaml(out, settings_record(result.settings))
    write_json(report, {"identity": identity, **result.to_json()})
    checkpoint.remove()
    return result


def _refuse_to_overwrite(known_file: Path, out: Path, report: Path) -> None:
    if out.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"{out}: settings are written as YAML; choose an --out that ends in .yaml")
    if known_file.resolve() in (out.resolve(), report.resolve()):
        raise ConfigError(
            f"{known_file}: holds the known architectures, and would be overwritten by what is made from "
            f"them ({out.name} and {report.name}); choose another --out"
        )
