"""Several processes that search and train together: what they compute is what one process computes."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from on_ranks import KILLED, Answer, die, on_ranks
from tiny_run import TINY, Cli
from torch import nn
from toy_images import CLASSES, make_task

from pipeline.artifacts import FileCheckpoint, read_json
from pipeline.errors import ConfigError, RanksDisagree
from pipeline.evaluators.one_shot import OneShotEvaluator, OneShotSettings
from pipeline.evaluators.spread import over_ranks
from pipeline.progress import NoCheckpoint, Silent
from pipeline.ranks import (
    ALONE,
    Place,
    Ranks,
    SharedCheckpoint,
    joined,
    part_of,
    place_in,
    refuse_differences,
    share_out,
    timeout_in,
)
from pipeline.search import METHODS
from pipeline.search.problem import SearchProblem
from pipeline.spaces.mbconv import MBConvSettings, MBConvSpace
from pipeline.train.recipe import Recipe
from pipeline.train.retrain import TrainRecord, retrain, seeded
from pipeline.types import Arch, Arrays, FitInfo, Json, Limit, Tier

SPACE = MBConvSpace((3, 8, 8), CLASSES, MBConvSettings(size="tiny", lane=4, operations=("k3e1", "k5e3")))
MIDDLE = Arch("mbconv", tuple(i % len(slot.choices) for i, slot in enumerate(SPACE.slots)))
ARCHS = [SPACE.smallest, MIDDLE, SPACE.largest]
SETTINGS = OneShotSettings(batch_size=16, warm_up_steps=2, evaluation_images=20, thorough_images=64)


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def values(answers: Sequence[Answer]) -> list[Any]:
    assert all(answer.error is None for answer in answers), answers
    return [answer.value for answer in answers]


# ------------------------------------------------------------------------------------ one process, no network


@pytest.mark.parametrize(
    ("loads", "size", "owners"),
    [
        ([], 2, []),
        ([3.0, 2.0, 1.0], 1, [0, 0, 0]),
        ([3.0, 2.0, 1.0], 2, [0, 1, 1]),
        ([1.0, 2.0, 3.0], 2, [1, 1, 0]),
        ([1.0, 1.0], 4, [0, 1]),
        ([5.0, 4.0, 3.0, 3.0, 3.0], 2, [0, 1, 1, 0, 1]),  # Graham's: 8 and 10, where 9 and 9 is possible
    ],
)
def test_the_heaviest_goes_to_who_has_least(loads: list[float], size: int, owners: list[int]) -> None:
    assert share_out(loads, size) == owners


@pytest.mark.parametrize("num", [0, 1, 7, 64])
def test_parts_make_up_the_whole(num: int) -> None:
    class Of3:
        size = 3

        def __init__(self, rank: int) -> None:
            self.rank = rank

    parts = [list(range(num))[part_of(num, Of3(rank))] for rank in range(3)]  # type: ignore[arg-type]
    assert list(itertools.chain(*parts)) == list(range(num))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_process_that_nobody_told_anything_is_alone() -> None:
    assert place_in({}) == Place(0, 1, 0)
    assert place_in({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}) == Place(3, 8, 1)
    with joined({}) as ranks:
        assert ranks is ALONE
    values_2 = np.array([1.0, 2.0])
    assert ALONE.sum_array(values_2) is values_2 and ALONE.from_first(b"x") == b"x"


@pytest.mark.parametrize(
    "told", [{"WORLD_SIZE": "two"}, {"WORLD_SIZE": "2", "RANK": "2"}, {"WORLD_SIZE": "0"}]
)
def test_places_that_cannot_be_are_refused(told: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="start several ranks with torchrun"):
        place_in(told)


def test_the_timeout_can_be_set() -> None:
    assert timeout_in({}).total_seconds() == 600
    assert timeout_in({"BUDGETLINE_RANKS_TIMEOUT": "5"}).total_seconds() == 5
    with pytest.raises(ConfigError, match="'soon'; expected whole seconds"):
        timeout_in({"BUDGETLINE_RANKS_TIMEOUT": "soon"})


def test_who_differs_and_in_what() -> None:
    same_RD = np.array([[1, 2, 3], [1, 2, 3]])
    refuse_differences("step 4", ["samples", "losses", "state"], same_RD)
    with pytest.raises(
        RanksDisagree, match="step 4: not the same on rank 1, 3 as on rank 0: losses and state;"
    ):
        found_RD = np.array([[1, 2, 3], [1, 9, 3], [1, 2, 3], [1, 2, 8]])
        refuse_differences("step 4", ["samples", "losses", "state"], found_RD)


# ------------------------------------------------------------------------------------------------- the group


def exchange(folder: str) -> Json:
    """What rank r of W gets out of every call."""
    with joined() as ranks:
        summed = torch.tensor([1.0, float(ranks.rank)])
        ranks.sum(summed)
        sent = torch.full((2,), float(ranks.rank))
        ranks.send(sent, 1)()
        rows_ML = torch.tensor([[1e8, 1.0, 0.0], [1.0, 2.0, 3.0], [-1e8, 1.0, 1.0]])
        owners = [2, 0, 2]  # nothing of rank 1; 1e8 + 1 is 1e8 in float32
        own_ML = rows_ML[[n for n in range(3) if owners[n] == ranks.rank]]
        own = np.zeros(3)
        own[ranks.rank] = [1e-300, math.inf, math.nan][ranks.rank]
        checkpoint = SharedCheckpoint(FileCheckpoint(Path(folder, str(ranks.rank), "state.npz")), ranks)
        nothing = checkpoint.load()
        checkpoint.save({"a/b": np.arange(3) + ranks.rank}, {"step": ranks.rank})
        loaded = checkpoint.load()
        assert loaded is not None
        return {
            "sum": summed.tolist(),
            "sum_in_order": ranks.sum_in_order(own_ML, owners).tolist(),
            "send": sent.tolist(),
            "sum_array": ranks.sum_array(own).tolist(),
            "from_first": [ranks.from_first(bytes([ranks.rank]) * ranks.rank), ranks.from_first(b"abc")],
            "nothing": nothing,
            "loaded": [loaded[0]["a/b"].tolist(), loaded[1]],
        }


def test_all_ranks_know_the_same(tmp_path: Path) -> None:
    answers = values(on_ranks(exchange, 3, str(tmp_path)))
    for answer in answers:
        assert answer["sum"] == [3.0, 3.0]
        assert answer["sum_in_order"] == [0.0, 4.0, 4.0]
        assert answer["send"] == [1.0, 1.0]
        np.testing.assert_array_equal(answer["sum_array"], [1e-300, math.inf, math.nan])
        assert answer["from_first"] == [b"", b"abc"]
        assert answer["nothing"] is None
        assert answer["loaded"] == [[0, 1, 2], {"step": 0}]
    assert [path.parent.name for path in tmp_path.glob("*/*.npz")] == ["0"], "rank 0 alone writes"


def disagree() -> None:
    with joined() as ranks:
        ranks.agree("hello", {"place": "same"})
        ranks.agree("hello", {"place": "same", "number": str(ranks.rank // 2)})


def test_all_ranks_hear_that_they_disagree() -> None:
    answers = on_ranks(disagree, 3)
    assert {answer.error for answer in answers} == {"RanksDisagree"}
    for rank, answer in enumerate(answers):
        assert answer.text.startswith(
            f"rank {rank} of 3: hello: not the same on rank 2 as on rank 0: number;"
        )


def lose_one(how: str) -> None:
    with joined() as ranks:
        ranks.agree("all are there", {"": ""})
        if ranks.rank == 1 and how == "dies":
            die()
        if ranks.rank == 1 and how == "sleeps":
            import time

            time.sleep(60)
        ranks.agree("all are there", {"": ""})


@pytest.mark.parametrize("how", ["dies", "sleeps"])
def test_a_rank_that_is_gone_ends_the_others(how: str) -> None:
    first, _, last = on_ranks(lose_one, 3, how, BUDGETLINE_RANKS_TIMEOUT="3" if how == "sleeps" else "200")
    for answer in (first, last):
        assert answer.error == "RankLost"
        assert "has died or does not answer" in answer.text and "start the same command again" in answer.text


# ---------------------------------------------------------------------------------------------- the supernet


def fit(ranks: Ranks, archs: list[Arch], steps: int, **changed: Any) -> tuple[Arrays, list[FitInfo]]:
    settings = SETTINGS.model_copy(update=changed)
    evaluator = OneShotEvaluator(SPACE, make_task(), settings, total_steps=steps, seed=0)
    over_ranks(evaluator, ranks, lambda arch: 1.0)
    infos = [evaluator.fit(archs, step=step) for step in range(steps)]
    return evaluator.state(), infos


def fit_all(archs: list[Arch], cases: dict[str, Json]) -> dict[str, tuple[Arrays, list[FitInfo]]]:
    with joined() as ranks:
        return {name: fit(ranks, archs, **case) for name, case in cases.items()}


CASES: dict[str, Json] = {
    "distilled": {"steps": 5},
    "from labels": {"steps": 2, "distillation": 0.0},
}


@pytest.mark.parametrize(("size", "archs"), [(2, ARCHS), (4, ARCHS), (2, [MIDDLE])])
def test_ranks_take_the_step_of_one_process(size: int, archs: list[Arch]) -> None:
    """To the bit. Of four ranks one has no path; of two with one architecture one."""
    answers = values(on_ranks(fit_all, size, archs, CASES))
    for name, case in CASES.items():
        state, infos = fit(ALONE, archs, **case)
        for answer in answers:
            found, told = answer[name]
            assert told == infos
            assert found.keys() == state.keys(), "momentum where one process has it, and nowhere else"
            for key, value in state.items():
                np.testing.assert_array_equal(found[key], value, err_msg=f"{name} {key}")


def test_what_no_path_went_through_is_left_alone() -> None:
    """Decay and momentum too: the smallest alone, after steps of all."""
    state, _ = fit(ALONE, [SPACE.smallest], 1, weight_decay=0.1)
    untouched = {name for name in state if name.startswith("weight/") and f"momentum/{name[7:]}" not in state}
    assert untouched, "the smallest does not use all weights"
    for answer in values(on_ranks(fit_all, 2, [SPACE.smallest], {"": {"steps": 1, "weight_decay": 0.1}})):
        found, _ = answer[""]
        assert found.keys() == state.keys()
        for name in untouched:
            np.testing.assert_array_equal(found[name], state[name])


# ------------------------------------------------------------------------------------------------- the search


class Trace(list[Json]):
    """Records, and a kill of rank 1 at the n-th."""

    def __init__(self, ranks: Ranks, kill_at: int | None) -> None:
        self.ranks, self.kill_at = ranks, kill_at

    def write(self, record: Json) -> None:
        self.append(record)
        if self.kill_at == record["iteration"] and self.ranks.rank == 1:
            die()


def search(
    ranks: Ranks, checkpoint: Any, seed: int = 0, kill_at: int | None = None, method: str = "importance"
) -> Json:
    evaluator = OneShotEvaluator(SPACE, make_task(), SETTINGS, total_steps=30, seed=0)
    sizes = [sum(layer.macs for layer in SPACE.layers(arch)) for arch in (SPACE.smallest, SPACE.largest)]
    tiers = tuple(
        Tier("cpu", name, (Limit("macs", sizes[0] + share * (sizes[1] - sizes[0]), False, ""),))
        for name, share in (("s", 0.3), ("l", 0.8))
    )
    problem = SearchProblem(
        SPACE,
        {"cpu": _Macs()},
        tiers,
        over_ranks(evaluator, ranks, lambda arch: 1.0),
        evaluations=24,
        warm_up=4,
        fit_samples=3,
        seed=seed,
        save_every_s=0.0,
        ranks=ranks,
    )
    trace = Trace(ranks, kill_at)
    result = METHODS[method].run(
        problem,
        METHODS[method].config(),
        checkpoint=SharedCheckpoint(checkpoint, ranks),
        trace=trace.write,
        progress=Silent(),
    )
    return {
        "choices": [candidate.arch.choices for candidate in result.candidates],
        "losses": [candidate.loss for candidate in result.candidates],
        "evaluations": result.evaluations,
        "theta": result.theta_KSC,
        "weights": evaluator.state(),
        "trace": list(trace),
    }


class _Macs:
    """A cost table of multiply-adds."""

    metrics = ("macs",)
    additive = None

    def of(self, archs: Sequence[Arch]) -> Any:
        return np.array([[sum(layer.macs for layer in SPACE.layers(arch))] for arch in archs], dtype=float)


def search_together(folder: str, kill_at: int | None = None, seeds: tuple[int, ...] = (0, 0, 0, 0)) -> Json:
    with joined() as ranks:
        checkpoint = FileCheckpoint(Path(folder, f"{ranks.rank}.npz"))
        return search(ranks, checkpoint, seeds[ranks.rank], kill_at)


@pytest.fixture(scope="module")
def searched() -> Json:
    """In one process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = search(ALONE, NoCheckpoint())
    torch.set_num_threads(threads)
    return found


def same_search(found: Json, wanted: Json) -> None:
    """To the bit."""
    assert found["choices"] == wanted["choices"]
    assert found["losses"] == wanted["losses"]
    assert found["evaluations"] == wanted["evaluations"]
    np.testing.assert_array_equal(found["theta"], wanted["theta"])
    for name, value in wanted["weights"].items():
        np.testing.assert_array_equal(found["weights"][name], value, err_msg=name)


def test_ranks_search_as_one_process_does(searched: Json, tmp_path: Path) -> None:
    answers = values(on_ranks(search_together, 4, str(tmp_path)))
    for answer in answers:
        same_search(answer, searched)
        assert answer["trace"] == searched["trace"]
    assert [path.name for path in tmp_path.iterdir()] == ["0.npz"]


def test_a_search_that_lost_a_rank_goes_on_with_another_number(searched: Json, tmp_path: Path) -> None:
    first, second, third = on_ranks(search_together, 3, str(tmp_path), 7)
    assert (first.error, second, third.error) == ("RankLost", KILLED, "RankLost")
    answers = values(on_ranks(search_together, 2, str(tmp_path)))
    for answer in answers:
        first_again = answer["trace"][0]["iteration"]
        assert 5 <= first_again <= 8, "from the checkpoint, not from the start"
        assert answer["trace"] == searched["trace"][-len(answer["trace"]) :]
        same_search(answer, searched)


def test_ranks_that_draw_different_samples_are_stopped(tmp_path: Path) -> None:
    answers = on_ranks(search_together, 2, str(tmp_path), None, (0, 1))
    assert {answer.error for answer in answers} == {"RanksDisagree"}
    assert "not the same on rank 1 as on rank 0: search" in answers[0].text


# ------------------------------------------------------------------------------------------------- evaluators


class Counted:
    """A fixed answer, and how many were asked for; J = 2."""

    noisy = trains = False

    def __init__(self) -> None:
        self.asked: list[Arch] = []

    def losses(self, archs: Sequence[Arch], *, step: int, thorough: bool = False) -> Any:
        self.asked += archs
        return np.array([[sum(arch.choices) / 7, 1.0] for arch in archs])

    def fit(self, archs: Sequence[Arch], *, step: int) -> FitInfo:
        raise AssertionError("nobody trains what answers without")

    def state(self) -> Arrays:
        return {}

    def load_state(self, state: Arrays) -> None: ...


def ask_together(num: int) -> Json:
    archs = [Arch("toy", (n,)) for n in range(num)]
    with joined() as ranks:
        counted = Counted()
        spread = over_ranks(counted, ranks, lambda arch: arch.choices[0])
        losses = spread.losses(archs, step=0)
        return {"losses": losses, "asked": counted.asked}


@pytest.mark.parametrize("num", [1, 7])
def test_every_architecture_is_asked_for_once(num: int) -> None:
    answers = values(on_ranks(ask_together, 3, num))
    for answer in answers:
        np.testing.assert_array_equal(answer["losses"], np.arange(num)[:, None] / 7)
    assert sorted(arch.choices[0] for answer in answers for arch in answer["asked"]) == list(range(num))


def test_what_trains_in_one_process_only_is_refused() -> None:
    class Relaxed(Counted):
        trains = True

    class Two:
        rank, size = 0, 2

    assert isinstance(over_ranks(Relaxed(), ALONE, lambda arch: 1.0), Relaxed)
    with pytest.raises(ConfigError, match="Relaxed trains in one process only, and 2 were started"):
        over_ranks(Relaxed(), Two(), lambda arch: 1.0)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------- retraining

RECIPE = Recipe(epochs=2, batch_size=30, lr=0.05, ema_decay=0.9, clip_norm=5.0, evaluate_every=2)


def plain_network() -> nn.Module:
    """Nothing in it depends on which other images are in a batch."""
    with seeded(0):
        return nn.Sequential(
            nn.Conv2d(CLASSES, 8, 3, padding=1),
            nn.GroupNorm(2, 8),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, CLASSES),
        )


def cell_network() -> nn.Module:
    """Batch norm, an auxiliary head, dropped paths."""
    from pipeline.spaces.cell import CellSettings, CellSpace

    with seeded(0):
        space = CellSpace(
            (3, 8, 8), CLASSES, CellSettings(nodes=2, channels=4, layers=3, auxiliary=0.4, drop_path=0.3)
        )
        return space.build(space.smallest)


def train(ranks: Ranks, network: nn.Module, recipe: Recipe = RECIPE, checkpoint: Any = None) -> Json:
    record: TrainRecord = retrain(
        network,
        make_task(),
        recipe,
        seed=3,
        checkpoint=SharedCheckpoint(checkpoint or NoCheckpoint(), ranks),
        progress=Silent(),
        label="toy",
        checkpoint_seconds=0.0,
        ranks=ranks,
    )
    weights = {name: value.numpy().copy() for name, value in network.state_dict().items()}
    return {
        "history": [vars_of(epoch) for epoch in record.history],
        "weights": weights,
        "best": record.accuracy,
    }


def vars_of(epoch: Any) -> list[Any]:
    """−1 for what was not read: `approx` takes no None."""
    found = [getattr(epoch, name) for name in type(epoch).__slots__]
    return [-1.0 if value is None else value for value in found]


def train_together(which: str, folder: str, die_at: int | None = None) -> Json:
    from pipeline.train import retrain as module

    network = plain_network() if which == "plain" else cell_network()
    recipe = RECIPE if which == "plain" else RECIPE.model_copy(update={"epochs": 1})
    with joined() as ranks:
        plain_step = module._Run._train_step

        def step_or_die(run: Any) -> None:
            if ranks.rank == 1 and run.step == die_at:
                die()
            plain_step(run)

        module._Run._train_step = step_or_die  # type: ignore[method-assign]
        return train(ranks, network, recipe, FileCheckpoint(Path(folder, f"{ranks.rank}.npz")))


def test_ranks_train_as_one_process_does(tmp_path: Path) -> None:
    """Batches of 30 over 4 ranks are 7, 8, 7 and 8 images."""
    wanted = train(ALONE, plain_network())
    answers = values(on_ranks(train_together, 4, "plain", str(tmp_path)))
    for answer in answers:
        for name, value in wanted["weights"].items():
            np.testing.assert_allclose(answer["weights"][name], value, atol=1e-5, err_msg=name)
            np.testing.assert_array_equal(answer["weights"][name], answers[0]["weights"][name])
        for found, epoch in zip(answer["history"], wanted["history"], strict=True):
            assert found == pytest.approx(epoch, rel=1e-4)


def test_a_training_that_lost_a_rank_goes_on_with_another_number(tmp_path: Path) -> None:
    wanted = train(ALONE, plain_network())
    lost = on_ranks(train_together, 2, "plain", str(tmp_path), 6)
    assert lost[0].error == "RankLost" and lost[1] == KILLED
    saved = FileCheckpoint(tmp_path / "0.npz").load()
    assert saved is not None and 4 <= saved[1]["step"] <= 6, "not before the last steps of both"
    answers = values(on_ranks(train_together, 3, "plain", str(tmp_path)))
    for name, value in wanted["weights"].items():
        np.testing.assert_allclose(answers[0]["weights"][name], value, atol=1e-5, err_msg=name)


def test_networks_with_batch_norm_and_helpers_are_the_same_on_all_ranks(tmp_path: Path) -> None:
    first, second = values(on_ranks(train_together, 2, "cell", str(tmp_path)))
    assert first["history"] == second["history"]
    for name, value in first["weights"].items():
        np.testing.assert_array_equal(second["weights"][name], value, err_msg=name)


def test_too_many_ranks_for_a_batch_are_refused() -> None:
    class Sixteen:
        rank, size = 0, 16

    with pytest.raises(ConfigError, match="16 ranks need batches, and an architecture split, of 32 images"):
        train(Sixteen(), plain_network())  # type: ignore[arg-type]


def test_one_process_drops_what_it_always_dropped() -> None:
    from pipeline.train.retrain import _step_seed

    assert _step_seed(5, 7, 0, 0) == _step_seed(5, 7) != _step_seed(5, 7, 0, 1)


# ----------------------------------------------------------------------------------------------- the commands


def command(*words: str) -> Json:
    from typer.testing import CliRunner

    from pipeline.cli import app

    found = CliRunner().invoke(app, list(words), prog_name="budgetline")
    crash = found.exception if not isinstance(found.exception, SystemExit) else None
    return {"code": found.exit_code, "err": found.stderr, "crash": repr(crash)}


@pytest.fixture(scope="module")
def profiled(cli: Cli, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    described = {
        **TINY,
        "derive": {"trial_epochs": 0, "samples": 20, "rescored": 2, "best": 1},
        "retrain": {"epochs": 1, "distil": {}},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(described))
    outcome = cli("profile", folder / "run.yaml", "--out", folder / "run")
    assert outcome.code == 0, outcome
    return folder / "run"


def test_the_commands_of_a_run(profiled: Path, cli: Cli) -> None:
    result = profiled / "search" / "result.json"
    assert cli("search", "--out", profiled).code == 0
    alone = read_json(result)
    result.unlink()
    for answer in values(on_ranks(command, 3, "search", "--out", str(profiled))):
        assert answer["code"] == 0, answer
    together = read_json(result)
    assert together["candidates"] == alone["candidates"] and together["theta"] == alone["theta"]
    assert cli("derive", "--out", profiled).code == 0
    first, second = values(on_ranks(command, 2, "retrain", "--out", str(profiled)))
    assert (first["code"], second["code"]) == (0, 0), (first, second)
    assert "retrain counts/l: done" in first["err"] and second["err"] == ""
    assert all((profiled / "counts" / tier / "train.json").exists() for tier in ("s", "l"))
    assert cli("export", "--out", profiled).code == 0


def test_contenders_are_not_trained_again_by_ranks_that_do_not_have_them(cli: Cli, tmp_path: Path) -> None:
    """Nor does a rank that has them leave the others waiting."""
    derive = {"trial_epochs": 0, "samples": 20, "rescored": 2, "best": 2, "contenders": 2}
    described, root = tmp_path / "run.yaml", tmp_path / "run"
    described.write_text(yaml.safe_dump({**TINY, "derive": derive, "retrain": {"epochs": 1}}))
    for words in (["profile", described], ["search"], ["derive"]):
        outcome = cli(*words, "--out", root)
        assert outcome.code == 0, outcome
    for lost in sorted(root.glob("search/contenders/*"))[:2]:
        lost.unlink()  # one of them, of which a tier may have been in need
    for answer in values(on_ranks(command, 2, "retrain", "--out", str(root))):
        assert answer["code"] == 0, answer
    kept = {read_json(path)["sha256"] for path in root.glob("search/contenders/*.json")}
    trained = [read_json(root / "counts" / tier / "train.json") for tier in ("s", "l")]
    assert any(record["sha256"] in kept and record["adopted"] for record in trained)


def test_errors_name_their_rank(tmp_path: Path) -> None:
    first, second = values(on_ranks(command, 2, "search", "--out", str(tmp_path / "none")))
    assert first["code"] == 2 and first["err"].startswith("RunFolderError: rank 0 of 2: ")
    assert second["code"] == 2 and second["err"].startswith("RankLost: rank 1 of 2: ")
    assert not (tmp_path / "none").exists()


def test_under_torchrun_what_one_process_does_is_refused_once(tmp_path: Path) -> None:
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--log-dir",
        str(tmp_path),
    ]
    done = subprocess.run(
        [*torchrun, "-m", "pipeline", "export", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "BUDGETLINE_NO_TUNING": "1"},
    )
    assert done.returncode == 1
    assert done.stderr.count("ConfigError: export is done by one process, and torchrun started 2") == 1
