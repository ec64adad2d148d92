"""Settings searched on known architectures: the files, the genes, the search itself, and the whole
job."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy.stats import spearmanr

from pipeline.artifacts import FileCheckpoint
from pipeline.data.base import ImageTask
from pipeline.errors import ConfigError, StaleArtifact
from pipeline.evaluators import dps
from pipeline.evaluators.correlation import bootstrap, spearman
from pipeline.evaluators.dps import (
    Dps,
    DpsResult,
    DpsSettings,
    Judge,
    Tries,
    search_settings,
    split_known,
    summary,
    tune,
    with_jacov,
)
from pipeline.evaluators.eproxy import (
    LEAST_SCORE,
    Branch,
    EproxySettings,
    Member,
    Standard,
    make_eproxy,
)
from pipeline.evaluators.genome import Genome, genes
from pipeline.evaluators.known import Known, read_known
from pipeline.progress import NoCheckpoint, Silent
from pipeline.settings import parse_settings
from pipeline.spaces.mbconv import MBConvSettings, MBConvSpace
from pipeline.spaces.nb201 import OPERATIONS, NB201Settings, NB201Space
from pipeline.types import Arch, Arrays, FloatArray, Json

SPACE = NB201Space((1, 8, 8), 3, NB201Settings(cells=1, channels=4))
BASE = EproxySettings(
    batch_size=4, iterations=2, images="noise", branches=(Branch(channels=16),) * 2, workers=1
)
QUICK = DpsSettings(population=4, tournament=2, evaluations=6, held_back=0.0, max_channels=16)


class NoImages:
    shape = (8, 8, 1)
    labels = np.arange(6) % 3

    def read(self, indices: Any) -> Any:
        raise AssertionError("images were read")


TASK = ImageTask(
    name="toy",
    classes=("a", "b", "c"),
    source=NoImages(),
    splits={"weights": np.arange(6), "architecture": np.arange(0), "test": np.arange(0)},
    mean=(0.5,),
    std=(0.3,),
    flip=False,
    crop_padding=0,
    fingerprint="toy",
)


def known_cells(count: int, seed: int = 0) -> list[Known]:
    """More convolutions are better."""
    rng = np.random.default_rng(seed)
    found: dict[Arch, float] = {}
    while len(found) < count:
        arch = SPACE.canonical(Arch("nb201", tuple(rng.integers(0, 5, 6).tolist())))
        found[arch] = float(sum(op in (2, 3) for op in arch.choices) + rng.random())
    return [Known(arch, accuracy) for arch, accuracy in found.items()]


# ------------------------------------------------------------------------------------------ known accuracies


ROWS = [(1, 1, 1, 1, 1, 1), (3, 3, 3, 3, 3, 3), (2, 0, 3, 1, 0, 2), (4, 4, 4, 4, 4, 4), (2, 2, 2, 2, 2, 2)]
EXPECTED = tuple(Known(SPACE.canonical(Arch("nb201", row)), 90.0 + i) for i, row in enumerate(ROWS))
SLOTS = ",".join(slot.name for slot in SPACE.slots)


def written(path: Path, lines: Sequence[str]) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def test_columns_of_names_of_numbers_and_of_json_say_the_same(tmp_path: Path) -> None:
    by_name = [f"{','.join(OPERATIONS[op] for op in row)},{90.0 + i}" for i, row in enumerate(ROWS)]
    by_number = [f"{90.0 + i},{','.join(map(str, row))},note" for i, row in enumerate(ROWS)]
    by_arch = [f'"{list(row)}",{90.0 + i}' for i, row in enumerate(ROWS)]
    records = [
        {"arch": {"space": "nb201", "choices": row}, "accuracy": 90.0 + i} for i, row in enumerate(ROWS)
    ]
    (tmp_path / "d.json").write_text(json.dumps(records))
    files = [
        written(tmp_path / "a.csv", [f"{SLOTS},accuracy", *by_name]),
        written(tmp_path / "b.csv", [f"accuracy,{SLOTS},comment", *by_number]),
        written(tmp_path / "c.csv", ["arch,accuracy", *by_arch]),
        tmp_path / "d.json",
    ]
    assert [read_known(file, SPACE) for file in files] == [EXPECTED] * 4


def test_where_names_are_numbers_a_number_is_a_name(tmp_path: Path) -> None:
    """Widths and depths; what counts from 0 would be taken for other architectures without a word."""
    space = MBConvSpace((3, 16, 16), 4, MBConvSettings(size="tiny"))
    archs = [Arch(space.name, tuple(len(slot.choices) - 1 for slot in space.slots)), space.smallest]
    header = ",".join(slot.name for slot in space.slots)
    names = [",".join(s.choices[c] for s, c in zip(space.slots, arch.choices, strict=True)) for arch in archs]
    some = list(space.uniform())[:5]
    lines = [
        *(f"{row},{80 + number}" for number, row in enumerate(names)),
        *(f"{','.join(map(str, space.describe(arch).values()))},{90}" for arch in some),
    ]
    found = read_known(written(tmp_path / "k.csv", [f"{header},accuracy", *lines]), space)
    assert {known.arch for known in found} == {space.canonical(arch) for arch in [*archs, *some]}
    lines[0] = f"{names[0].rpartition(',')[0]},0,80"
    with pytest.raises(ConfigError, match=r"slot 'head.width' is '0'; expected one of [\d, ]+$"):
        read_known(written(tmp_path / "k.csv", [f"{header},accuracy", *lines]), space)


def test_rows_of_one_network_count_once(tmp_path: Path) -> None:
    doubled = [*ROWS, (2, 0, 3, 1, 0, 2), (0, 0, 3, 1, 0, 0)]  # the last one's 1-2 is dead
    lines = [f'"{list(row)}",{90.0 + i}' for i, row in enumerate(doubled)]
    found = read_known(written(tmp_path / "k.csv", ["arch,accuracy", *lines]), SPACE)
    assert len(found) == 6
    assert found[2] == Known(EXPECTED[2].arch, (92.0 + 95.0) / 2)
    assert found[5].arch == SPACE.smallest


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("k.csv", None, r"k\.csv: cannot be read"),
        ("k.csv", "arch,accuracy", r"holds 0 different architectures; give 5 at least"),
        (
            "k.csv",
            'arch,accuracy\n"[1,1]",90',
            r"k\.csv, line 2: architecture nb201\[1, 1\] is not of space nb201",
        ),
        ("k.csv", "arch,accuracy\nbest,90", r"line 2: arch is 'best'; expected a list of 6 choices"),
        ("k.csv", 'arch,accuracy\n"[1,1,1,1,1,1]",good', r"line 2: accuracy is 'good'; expected a number"),
        ("k.csv", 'arch,accuracy\n"[1,1,1,1,1,1]",nan', r"line 2: accuracy is 'nan'"),
        ("k.csv", 'arch,top1\n"[1,1,1,1,1,1]",90', r"line 2: has no 'accuracy'; there are: arch, top1"),
        ("k.csv", "arch,accuracy\n1", r"line 2: has another number of columns"),
        ("k.csv", "arch,accuracy\n1,2,3", r"line 2: has another number of columns"),
        ("k.csv", "accuracy\n90", r"line 2: has neither 'arch' nor a column for slot '0-1'"),
        ("k.csv", f"{SLOTS},accuracy\n9,1,1,1,1,1,90", r"slot '0-1' is '9'; expected one of none, skip"),
        ("k.json", "{}", r"k\.json: expected a list"),
        ("k.json", "[", r"k\.json: is not JSON"),
        ("k.json", '[{"arch": [1], "accuracy": 1}]', r"k\.json, entry 0: architecture"),
    ],
)
def test_a_file_that_says_something_else_is_refused(
    tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_known(tmp_path / name, SPACE)


# ----------------------------------------------------------------------------------------------------- genes


def test_the_genes_are_the_published_ones_and_the_exponent() -> None:
    found = genes(512)
    shared = {gene.name: gene.values for gene in found if gene.branch is None}
    assert shared["learning_rate"] == (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5)
    assert shared["alpha"] == (-0.5, -0.4, -0.3, -0.2, -0.1, 0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
    assert shared["size_exponent"] == (0.0, 0.05, 0.1, 0.15, 0.2, 0.3)
    assert len(shared["network_weights"]) == len(shared["branch_weights"]) == 4
    assert shared["branches"] == (1, 2, 3)
    branch = {gene.name: gene.values for gene in found if gene.branch == 1}
    assert branch["head_kernel"] == branch["barrier_kernel"] == (1, 3, 7)
    assert branch["channels"] == (16, 32, 64, 128, 256, 512)
    assert branch["level"] == (0.5, 1.0, 1.5, 2.0)
    assert len(branch["features"]) == 2**5 - 1
    assert max(g.values[-1] for g in genes(128) if g.name == "channels") == 128


def test_settings_survive_the_way_to_genes_and_back() -> None:
    genome = Genome(BASE, 512)
    rng = np.random.default_rng(0)
    defaults = EproxySettings()
    assert Genome(defaults, 128).decode(Genome(defaults, 128).encode(defaults)) == defaults
    for _ in range(50):
        row = genome.canonical(rng.integers(0, genome.sizes))
        settings = genome.decode(row)
        np.testing.assert_array_equal(genome.encode(settings), row)
        assert (settings.batch_size, settings.iterations) == (4, 2), "what is no gene stays"


def test_what_no_gene_takes_becomes_the_nearest() -> None:
    odd = EproxySettings(
        learning_rate=0.01, alpha=0.24, branches=(Branch(channels=300, level=3, features=("net", "dot")),)
    )
    genome = Genome(odd, 512)
    found = genome.decode(genome.encode(odd))
    assert (found.learning_rate, found.alpha) == (0.5, 0.2)
    assert found.branches == (Branch(channels=256, level=2.0, features=("dot", "net")),)


def test_genes_of_missing_branches_and_corrections_do_not_change_the_error_s_key() -> None:
    genome = Genome(BASE, 512)
    names = [(gene.name, gene.branch) for gene in genome.genes]
    row = genome.encode(BASE)
    dead, corrected, alive = row.copy(), row.copy(), row.copy()
    dead[names.index(("level", 2))] = 3
    corrected[names.index(("alpha", None))] = 2
    corrected[names.index(("size_exponent", None))] = 0
    alive[names.index(("level", 1))] = 3
    key = genome.without_correction
    assert key(row) == key(dead) == key(corrected) != key(alive)


# --------------------------------------------------------------------------------------------------- judging


def test_rho_is_scipy_s_with_ties() -> None:
    rng = np.random.default_rng(0)
    scores, accuracy = rng.integers(0, 6, 40).astype(float), rng.integers(0, 9, 40).astype(float)
    assert spearman(scores, accuracy) == pytest.approx(spearmanr(-scores, accuracy).statistic)
    assert spearman(-accuracy, accuracy) == pytest.approx(1.0)
    assert spearman(np.ones(5), np.arange(5.0)) == 0.0


def test_the_interval_holds_the_true_correlation_and_narrows() -> None:
    """Bivariate normal with ρ_s ≈ 0.8; 19 of 20 intervals should hold it, so 34 of 40 is far from
    chance."""
    rng = np.random.default_rng(3)
    true = 6 / np.pi * np.arcsin(0.8 / 2)

    def interval(count: int) -> tuple[float, float]:
        x, noise = rng.normal(size=(2, count))
        return bootstrap(-(0.8 * x + 0.6 * noise), x, np.random.default_rng(0))

    intervals = [interval(30) for _ in range(40)]
    assert sum(low <= true <= high for low, high in intervals) >= 34
    low, high = interval(300)
    assert high - low < 0.5 * np.mean([b - a for a, b in intervals])


def test_scores_of_the_judge_are_the_evaluator_s() -> None:
    archs = [k.arch for k in known_cells(4)]
    for settings in (BASE, BASE.model_copy(update={"learning_rate": 1e25})):
        evaluator = make_eproxy(SPACE, TASK, settings, total_steps=0, seed=3, device="cpu")
        found = Judge(SPACE, TASK, BASE, seed=3).scores(settings, archs)
        np.testing.assert_array_equal(found, evaluator.losses(archs)[:, 0])


# ---------------------------------------------------------------------------------------------------- search


class FakeJudge:
    """E ranks right for three branches at a learning rate of 1.5 and level 2, and the worse the
    farther."""

    def __init__(self) -> None:
        self.asked: list[EproxySettings] = []

    def errors(self, settings: EproxySettings, archs: Sequence[Arch]) -> FloatArray:
        self.asked.append(settings)
        truth = np.array([sum(op in (2, 3) for op in arch.choices) for arch in archs])
        off = 1.5 - settings.learning_rate + (3 - len(settings.branches)) + 2 - settings.branches[0].level
        return np.asarray(-truth + 3 * off * np.random.default_rng(0).normal(size=len(archs)))

    def scores(
        self, settings: EproxySettings, archs: Sequence[Arch], error_A: FloatArray | None = None
    ) -> FloatArray:
        assert error_A is not None
        return error_A * (1 + 0.0 * settings.alpha)

    def correlations(self, archs: Sequence[Arch]) -> FloatArray:
        return np.exp(np.random.default_rng(1).normal(size=len(archs)))


class Memory:
    """Dies after so many savings."""

    def __init__(self, dies_after: int | None = None) -> None:
        self.kept: tuple[Arrays, Json] | None = None
        self.left = dies_after

    def load(self) -> tuple[Arrays, Json] | None:
        return copy.deepcopy(self.kept)

    def save(self, arrays: Mapping[str, Any], record: Json) -> None:
        self.kept = copy.deepcopy((dict(arrays), record))
        if self.left is not None:
            self.left -= 1
            if self.left == 0:
                self.left = None
                raise KeyboardInterrupt


SETTINGS = DpsSettings(population=10, tournament=4, evaluations=60)


def make_dps(judge: Any, settings: DpsSettings = SETTINGS, seed: int = 0) -> Dps:
    return Dps(judge, known_cells(20), BASE, settings, seed)


def run(judge: Any, settings: DpsSettings = SETTINGS, memory: Memory | None = None, seed: int = 0) -> Tries:
    return make_dps(judge, settings, seed).run("x", memory or Memory(), Silent())


def test_it_finds_settings_that_rank_better_than_random_ones() -> None:
    tries = run(FakeJudge(), SETTINGS.model_copy(update={"evaluations": 120}))
    assert len(tries) == 120
    assert tries.rho_T[tries.best] > tries.rho_T[:10].max()
    assert tries.rho_T[60:].mean() > tries.rho_T[1:10].mean() + 0.1
    assert make_dps(FakeJudge()).settings_of(tries.rows_TG[tries.best]).learning_rate >= 1.4


def test_it_starts_from_what_was_asked_for() -> None:
    judge = FakeJudge()
    run(judge)
    assert judge.asked[0] == BASE


def test_children_are_mutants_of_the_living() -> None:
    tries = run(FakeJudge(), SETTINGS.model_copy(update={"mutation": 1e-9}))
    for child in range(10, len(tries)):
        parents = tries.rows_TG[child - 10 : child]
        changed = (parents != tries.rows_TG[child]).sum(axis=1).min()
        assert changed <= 1 + 2 * 5, "one gene, or the number of branches and what dies with two"
    single = [
        (tries.rows_TG[i - 10 : i] != tries.rows_TG[i]).sum(axis=1).min() for i in range(10, len(tries))
    ]
    assert np.median(single) <= 1


def test_another_correction_costs_no_evaluation() -> None:
    judge = FakeJudge()
    tries = run(judge, SETTINGS.model_copy(update={"evaluations": 200, "mutation": 1e-9}))
    genome = Genome(BASE, SETTINGS.max_channels)
    keys = {genome.without_correction(row) for row in tries.rows_TG}
    assert len(judge.asked) == len(keys) < len(tries)


def test_a_killed_search_ends_with_the_same_bits() -> None:
    whole = run(FakeJudge())
    memory = Memory(dies_after=25)
    with pytest.raises(KeyboardInterrupt):
        run(FakeJudge(), memory=memory)
    judge = FakeJudge()
    resumed = run(judge, memory=memory)
    for name, array in whole.arrays().items():
        np.testing.assert_array_equal(resumed.arrays()[name], array)
    assert len(judge.asked) <= 35
    assert not np.array_equal(run(FakeJudge(), seed=1).rows_TG, whole.rows_TG)


def test_the_time_of_stopped_attempts_counts() -> None:
    memory = Memory(dies_after=5)
    with pytest.raises(KeyboardInterrupt):
        run(FakeJudge(), memory=memory)
    assert memory.kept is not None
    memory.kept[1]["seconds"] = 1000.0
    whole = make_dps(FakeJudge())
    whole.run("x", memory, Silent())
    assert whole.seconds > 1000.0


def test_another_search_s_checkpoint_is_refused() -> None:
    memory = Memory()
    run(FakeJudge(), memory=memory)
    with pytest.raises(StaleArtifact, match="of a search with other architectures"):
        make_dps(FakeJudge()).run("y", memory, Silent())


# --------------------------------------------------------------------------------------------- the whole job


def test_what_is_held_back_guides_nothing() -> None:
    known = known_cells(20)
    used, held = split_known(known, 0.3, seed=0)
    assert len(held) == 6 and len(used) == 14 and {*used, *held} == set(known)
    assert split_known(known, 0.3, seed=1) != (used, held)
    assert split_known(known, 0.0, seed=0)[1] == []
    with pytest.raises(ConfigError, match="of 12 known architectures 4 are held back; 5 are needed"):
        split_known(known[:12], 0.3, seed=0)
    with pytest.raises(ConfigError, match="4 are to search on"):
        split_known(known, 0.8, seed=0)


@pytest.mark.parametrize(("members", "jacov", "voters"), [(1, False, 0), (1, True, 1), (3, True, 3)])
def test_the_held_back_part_judges(
    monkeypatch: pytest.MonkeyPatch, members: int, jacov: bool, voters: int
) -> None:
    asked: list[Sequence[Arch]] = []
    errors = Judge.errors

    def watched(self: Judge, settings: EproxySettings, archs: Sequence[Arch]) -> FloatArray:
        asked.append(archs)
        return errors(self, settings, archs)

    votes = Judge.votes

    def voted(self: Judge, settings: EproxySettings, archs: Sequence[Arch]) -> FloatArray:
        asked.append(archs)
        return votes(self, settings, archs)

    correlations = Judge.correlations

    def correlated(self: Judge, archs: Sequence[Arch]) -> FloatArray:
        asked.append(archs)
        return correlations(self, archs)

    monkeypatch.setattr(Judge, "errors", watched)
    monkeypatch.setattr(Judge, "votes", voted)
    monkeypatch.setattr(Judge, "correlations", correlated)
    known = known_cells(12)
    settings = QUICK.model_copy(update={"held_back": 0.5, "members": members, "jacov": jacov})
    result = search_settings(
        SPACE, TASK, known, settings, BASE, seed=0, checkpoint=NoCheckpoint(), progress=Silent()
    )
    used, held = split_known(known, 0.5, seed=0)
    assert {frozenset(archs) for archs in asked[:-2]} == {frozenset(k.arch for k in used)}
    assert [list(archs) for archs in asked[-2:]] == [[k.arch for k in held]] * 2
    assert len(result.settings.members) == voters
    assert (result.settings.jacov is not None) is jacov
    accuracy = np.array([k.accuracy for k in held])
    losses = make_eproxy(SPACE, TASK, result.settings, total_steps=0, seed=0, device="cpu").losses(asked[-1])
    assert result.rho == pytest.approx(spearman(losses[:, 0], accuracy))
    assert result.interval is not None and result.interval[0] <= result.interval[1]
    assert (result.searched_on, result.held_back, result.evaluations) == (6, 6, 6)
    assert DpsResult.from_json(json.loads(json.dumps(result.to_json()))) == result


def test_what_was_started_from_votes_with_the_best_others_that_differ_in_their_error() -> None:
    judge = FakeJudge()
    dps = make_dps(judge, SETTINGS.model_copy(update={"members": 4}))
    tries = dps.run("x", Memory(), Silent())
    found, rho = dps.answer(tries)
    genome = Genome(BASE, SETTINGS.max_channels)
    rows = [genome.encode(found.of(member)) for member in found.members]
    np.testing.assert_array_equal(rows[0], genome.encode(BASE))
    assert len({genome.without_correction(row) for row in rows}) == 4
    best_by_error: dict[bytes, float] = {}
    for row, found_rho in zip(tries.rows_TG, tries.rho_T, strict=True):
        key = genome.without_correction(row)
        best_by_error[key] = max(found_rho, best_by_error.get(key, -1.0))
    del best_by_error[genome.without_correction(rows[0])]
    chosen = [best_by_error[genome.without_correction(row)] for row in rows[1:]]
    assert chosen == sorted(best_by_error.values(), reverse=True)[:3]
    assert 0 < rho <= 1


def test_jacov_has_half_of_the_vote() -> None:
    tries = run(FakeJudge())
    made = {jacov: make_dps(FakeJudge(), SETTINGS.model_copy(update={"jacov": jacov})) for jacov in (0, 1)}
    alone, joint = (made[jacov].answer(tries)[0] for jacov in (0, 1))
    assert alone.jacov is None and joint == alone.model_copy(update={"jacov": joint.jacov})
    archs = [k.arch for k in known_cells(20)]
    accuracy_A = np.array([k.accuracy for k in known_cells(20)])

    def z(score_A: FloatArray) -> FloatArray:
        log_A = np.log(np.maximum(score_A, LEAST_SCORE))
        return np.asarray((log_A - log_A.mean()) / max(log_A.std(), LEAST_SCORE))

    errors_MA = [FakeJudge().errors(alone.of(member), archs) for member in alone.members]
    vote_A = np.mean([z(error_A) for error_A in errors_MA], axis=0)
    both_A = vote_A + z(FakeJudge().correlations(archs))
    assert made[0].answer(tries)[1] == pytest.approx(spearman(vote_A, accuracy_A))
    assert made[1].answer(tries)[1] == pytest.approx(spearman(both_A, accuracy_A))


def test_one_member_is_the_best_that_was_tried_as_published() -> None:
    dps = make_dps(FakeJudge(), SETTINGS.model_copy(update={"members": 1, "jacov": False}))
    tries = dps.run("x", Memory(), Silent())
    found, rho = dps.answer(tries)
    assert not found.members and rho == tries.rho_T.max()
    assert found == dps.settings_of(tries.rows_TG[tries.best])
    beside_jacov, _ = make_dps(FakeJudge(), SETTINGS.model_copy(update={"members": 1})).answer(tries)
    (member,) = beside_jacov.members
    assert beside_jacov.of(member) == found and beside_jacov.jacov is not None


def test_known_architectures_that_jacov_cannot_tell_apart_are_refused() -> None:
    for scores in ([math.inf, math.inf, 2.0], [3.0, 3.0, math.inf]):
        with pytest.raises(ConfigError, match=r"of 3 known architectures 'jacov' scores [12], all alike"):
            with_jacov(BASE, np.array(scores))
    found = with_jacov(BASE, np.array([1.0, math.e, math.inf]))
    assert found.jacov == Standard(mean=0.5, deviation=0.5)


def test_a_search_does_not_start_from_several_members() -> None:
    member = Member(mean=0.0, deviation=1.0)
    with pytest.raises(ConfigError, match="several members"):
        search_settings(
            SPACE,
            TASK,
            known_cells(12),
            QUICK,
            BASE.model_copy(update={"members": (member,)}),
            seed=0,
            checkpoint=NoCheckpoint(),
            progress=Silent(),
        )


def test_the_summary_does_not_hide_that_nothing_was_held_back() -> None:
    judged = DpsResult(BASE, 0.95, 14, 6, 0.8, (0.31, 0.97), 0.6, 200, 1.0)
    assert summary(judged)[1] == (
        "ρ 0.800 on 6 that were held back (95 % interval 0.31 to 0.97); "
        "the settings it started from have 0.600 there"
    )
    unjudged = DpsResult(BASE, 0.95, 20, 0, None, None, None, 200, 1.0)
    assert "ρ 0.950 on the 20" in summary(unjudged)[0]
    assert "nothing says how good" in summary(unjudged)[1]


@pytest.fixture
def known_file(tmp_path: Path) -> Path:
    lines = [f'"{list(k.arch.choices)}",{k.accuracy}' for k in known_cells(6)]
    return written(tmp_path / "known.csv", ["arch,accuracy", *lines])


def tuned(known_file: Path, out: Path, settings: DpsSettings = QUICK) -> DpsResult:
    return tune(SPACE, TASK, known_file, out, settings, BASE, seed=0, progress=Silent())


def test_from_a_file_to_a_file_that_the_evaluator_reads(known_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "made" / "tuned.yaml"
    result = tuned(known_file, out)
    assert (result.rho, result.interval, result.default_rho) == (None, None, None)
    assert sorted(path.name for path in out.parent.iterdir()) == ["tuned.json", "tuned.yaml"]
    read = parse_settings(EproxySettings, {"settings_file": str(out)}, "run.yaml")
    assert read == result.settings
    assert "workers" not in yaml.safe_load(out.read_text()), (
        "where it was made has no say in where it is used"
    )


def test_done_is_done_and_another_question_is_not_answered_with_it(
    known_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "tuned.yaml"
    first = tuned(known_file, out)
    with pytest.raises(StaleArtifact, match=r"tuned\.json: is of another search"):
        tuned(known_file, out, QUICK.model_copy(update={"evaluations": 7}))
    monkeypatch.setattr(dps, "search_settings", lambda *a, **k: pytest.fail("searched again"))
    assert tuned(known_file, out) == first


def test_a_stopped_job_goes_on(known_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tuned(known_file, tmp_path / "whole.yaml")
    out = tmp_path / "tuned.yaml"
    save, saved = FileCheckpoint.save, []

    def dying(self: FileCheckpoint, arrays: Any, record: Json) -> None:
        save(self, arrays, record)
        saved.append(record)
        if len(saved) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(FileCheckpoint, "save", dying)
    with pytest.raises(KeyboardInterrupt):
        tuned(known_file, out)
    assert not out.exists() and out.with_suffix(".npz").exists()
    resumed = tuned(known_file, out)
    assert len(saved) == 3 + 3
    assert resumed.settings == whole.settings and resumed.search_rho == whole.search_rho
    assert not out.with_suffix(".npz").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("known.yaml", r"known\.json: holds the known architectures, and would be overwritten"),
        ("tuned.npz", r"tuned\.npz: settings are written as YAML"),
        ("tuned.json", r"tuned\.json: settings are written as YAML"),
        ("tuned", r"tuned: settings are written as YAML"),
    ],
)
def test_nothing_is_written_over_what_was_given(tmp_path: Path, name: str, message: str) -> None:
    known_file = tmp_path / "known.json"
    known_file.write_text("[]")
    with pytest.raises(ConfigError, match=message):
        tuned(known_file, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["known.json"] and known_file.read_text() == "[]"
