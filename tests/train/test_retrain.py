from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.artifacts import FileCheckpoint
from pipeline.data.arrays import ArrayImages, build_task
from pipeline.data.base import ImageTask
from pipeline.errors import ConfigError, DivergedTraining
from pipeline.progress import NoCheckpoint, Silent
from pipeline.train.assess import assess, evaluate, withstand
from pipeline.train.recipe import Adversarial, Distil, Recipe, Robustness
from pipeline.train.retrain import TrainRecord, retrain, seeded, training_loss
from pipeline.types import Arrays, Checkpoint, Json

MakeNetwork = Callable[..., nn.Module]
MakeTask = Callable[..., ImageTask]

SHORT = Recipe(epochs=3, batch_size=30, lr=0.1, ema_decay=0.9)  # 3 epochs of 5 steps


class _Killed(Exception):
    """Stands for kill -9."""


class _Memory:
    """A checkpoint in memory, through JSON as on disk, that kills the process after the n-th save."""

    def __init__(self, kill_after: int | None = None) -> None:
        self.kept: list[tuple[Arrays, str]] = []
        self.kill_after = kill_after

    def load(self) -> tuple[Arrays, Json] | None:
        if not self.kept:
            return None
        arrays, record = self.kept[-1]
        return copy.deepcopy(arrays), json.loads(record)

    def save(self, arrays: Mapping[str, NDArray[Any]], record: Json) -> None:
        self.kept.append((copy.deepcopy(dict(arrays)), json.dumps(record)))
        if self.kill_after is not None and len(self.kept) >= self.kill_after:
            self.kill_after = None
            raise _Killed


class _Loud(Silent):
    """Keeps what was said and how far the work went."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.total, self.done = 0, 0

    @contextmanager
    def track(self, label: str, total: int, done: int = 0) -> Iterator[Callable[[int, str], None]]:
        self.total, self.done = total, done

        def advance(steps: int, note: str) -> None:
            self.done += steps

        yield advance

    def say(self, message: str) -> None:
        self.said.append(message)


def train(
    network: nn.Module,
    task: ImageTask,
    recipe: Recipe = SHORT,
    *,
    seed: int = 0,
    checkpoint: Checkpoint | None = None,
    **rest: Any,
) -> TrainRecord:
    rest = {"progress": Silent(), "label": "toy", "checkpoint_seconds": 0.0} | rest
    return retrain(network, task, recipe, seed=seed, checkpoint=checkpoint or NoCheckpoint(), **rest)


def same_bits(a: nn.Module, b: nn.Module) -> bool:
    other = b.state_dict()
    return all(torch.equal(value, other[name]) for name, value in a.state_dict().items())


def untimed(record: TrainRecord) -> TrainRecord:
    return dataclasses.replace(record, seconds=0.0, images_per_second=0.0)


def test_learns_a_separable_toy(toy_network: MakeNetwork, task: ImageTask) -> None:
    network = toy_network()
    record = train(network, task, Recipe(epochs=12, batch_size=16, lr=0.2, ema_decay=0.9))
    assert record.accuracy >= 96
    assert assess(network, task).accuracy >= 95
    assert record.history[-1].train_loss < record.history[0].train_loss
    assert not network.training
    assert record.seconds > 0 and record.images_per_second > 0


def test_the_record_is_of_the_weights_that_are_left(toy_network: MakeNetwork, task: ImageTask) -> None:
    network = toy_network()
    record = train(network, task)
    left = evaluate(network, task, "architecture")
    assert (record.accuracy, record.loss) == (left.accuracy, left.loss)


def test_record_survives_json(toy_network: MakeNetwork, task: ImageTask) -> None:
    record = train(toy_network(), task)
    assert TrainRecord.from_json(json.loads(json.dumps(record.to_json()))) == record


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_keeps_the_best_epoch_by_the_architecture_split(
    toy_task: MakeTask, toy_network: MakeNetwork, ema_decay: float
) -> None:
    task = toy_task(label_noise=0.5)
    recipe = Recipe(epochs=10, batch_size=15, lr=0.5, ema_decay=ema_decay, label_smoothing=0)
    network = toy_network()
    record = train(network, task, recipe)
    raw = [(e.accuracy, -e.loss, e.epoch, "raw") for e in record.history if e.accuracy is not None and e.loss]
    ema = [
        (e.ema_accuracy, -e.ema_loss, e.epoch, "ema")
        for e in record.history
        if e.ema_accuracy is not None and e.ema_loss
    ]
    assert len(raw) == 10 and len(ema) == (10 if ema_decay else 0)
    best = max([*raw, *ema], key=lambda entry: entry[:2])
    assert (record.accuracy, -record.loss, record.best_epoch, record.weights) == best
    assert best[2] < 10, "the toy must overfit, or this test shows nothing"


def test_evaluation_may_be_rarer(toy_network: MakeNetwork, task: ImageTask) -> None:
    record = train(toy_network(), task, Recipe(epochs=5, batch_size=30, evaluate_every=2, ema_decay=0))
    assert [e.epoch for e in record.history if e.accuracy is not None] == [1, 3, 5]
    assert all(e.ema_accuracy is None for e in record.history)


def test_a_last_epoch_that_ends_early_is_an_epoch(toy_network: MakeNetwork, task: ImageTask) -> None:
    images = len(task.splits["weights"])
    recipe = Recipe(epochs=2.5, batch_size=images // 4, evaluate_every=2, ema_decay=0)
    network, watched = toy_network(), _Loud()
    record = train(network, task, recipe, progress=watched)
    assert watched.total == watched.done == 10 and record.epochs == 2.5
    assert [(e.epoch, e.accuracy is not None) for e in record.history] == [(1, True), (2, False), (3, True)]
    assert record.accuracy == evaluate(network, task, "architecture").accuracy


def test_the_loss_of_an_epoch_that_ends_early_is_the_mean_of_its_steps(
    toy_network: MakeNetwork, task: ImageTask
) -> None:
    """Nothing is learnt at this rate, so losses of batches are alike."""
    batch_size = len(task.splits["weights"]) // 4
    record = train(toy_network(), task, Recipe(epochs=2.25, batch_size=batch_size, lr=1e-9, ema_decay=0))
    first, second, last = (epoch.train_loss for epoch in record.history)
    assert last == pytest.approx(first, rel=0.3) and second == pytest.approx(first, rel=0.3)


def test_half_an_epoch_is_trained_and_judged(toy_network: MakeNetwork, task: ImageTask) -> None:
    batch_size = len(task.splits["weights"]) // 4
    record = train(toy_network(), task, Recipe(epochs=0.5, batch_size=batch_size))
    (only,) = record.history
    assert (only.epoch, record.best_epoch) == (1, 1) and only.accuracy is not None


def test_the_seed_decides_everything(toy_network: MakeNetwork, task: ImageTask) -> None:
    a, b, c = toy_network(), toy_network(), toy_network()
    first, second = train(a, task, seed=1), train(b, task, seed=1)
    torch.rand(5)  # what others do with the global generator does not matter
    third = train(c, task, seed=2)
    assert same_bits(a, b) and untimed(first) == untimed(second)
    assert not same_bits(a, c) and first.history != third.history


def test_the_global_generator_is_left_alone(toy_network: MakeNetwork, task: ImageTask) -> None:
    before = torch.random.get_rng_state()
    with seeded(3):
        a = torch.rand(3)
    with seeded(3):
        assert torch.equal(a, torch.rand(3))
    train(toy_network(), task, Recipe(epochs=1, batch_size=50))
    assert torch.equal(before, torch.random.get_rng_state())


RECIPES = {
    "plain": SHORT,
    "everything": SHORT.model_copy(
        update={"clip_norm": 0.5, "distil": Distil(), "adversarial": Adversarial(epsilon=8)}
    ),
    "no average, no momentum": Recipe(epochs=3, batch_size=30, ema_decay=0, momentum=0, nesterov=False),
}


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, tuple[nn.Module, TrainRecord]]:
    """By the name of the recipe: the network as it was trained in one go, and its record."""
    return {}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("saves", [1, 4, 5, 6, 14, 15])
def test_a_killed_run_ends_with_the_same_bits(
    toy_network: MakeNetwork,
    task: ImageTask,
    uninterrupted: dict[str, tuple[nn.Module, TrainRecord]],
    name: str,
    saves: int,
) -> None:
    recipe = RECIPES[name]
    teacher = toy_network(9) if recipe.distil else None
    resumed = toy_network()
    if name not in uninterrupted:
        network = toy_network()
        uninterrupted[name] = network, train(network, task, recipe, teacher=teacher)
    straight, expected = uninterrupted[name]
    checkpoint = _Memory(kill_after=saves)
    with pytest.raises(_Killed):
        train(toy_network(), task, recipe, teacher=teacher, checkpoint=checkpoint)
    progress = _Loud()
    record = train(resumed, task, recipe, teacher=teacher, checkpoint=checkpoint, progress=progress)
    assert same_bits(straight, resumed)
    assert untimed(record) == untimed(expected)
    assert progress.done == progress.total == 15


def test_killed_again_and_again_through_a_file(
    toy_network: MakeNetwork, task: ImageTask, tmp_path: Path
) -> None:
    straight = toy_network()
    train(straight, task)
    checkpoint = FileCheckpoint(tmp_path / "train.npz")
    for _ in range(5):
        with pytest.raises(_Killed):
            train(toy_network(), task, checkpoint=_KillsAfterTwo(checkpoint))
    resumed = toy_network()
    train(resumed, task, checkpoint=checkpoint)
    assert same_bits(straight, resumed)


class _KillsAfterTwo:
    def __init__(self, inner: FileCheckpoint) -> None:
        self.inner, self.left = inner, 2

    def load(self) -> tuple[Arrays, Json] | None:
        return self.inner.load()

    def save(self, arrays: Mapping[str, NDArray[Any]], record: Json) -> None:
        self.inner.save(arrays, record)
        self.left -= 1
        if not self.left:
            raise _Killed


def test_checkpoints_are_as_rare_as_asked(toy_network: MakeNetwork, task: ImageTask) -> None:
    checkpoint = _Memory()
    train(toy_network(), task, checkpoint=checkpoint, checkpoint_seconds=1e6)
    assert len(checkpoint.kept) == 1  # the finished training
    assert json.loads(checkpoint.kept[0][1])["step"] == 15


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"recipe": SHORT.model_copy(update={"lr": 0.05})}, "recipe"),
        ({"seed": 1}, "seed"),
        ({"network": 5}, "first weights"),
        ({"task": 0.1}, "data"),
        ({"flip": False}, "augmentation"),
    ],
)
def test_another_trainings_checkpoint_is_reported_and_not_used(
    toy_network: MakeNetwork, toy_task: MakeTask, change: dict[str, Any], what: str
) -> None:
    checkpoint = _Memory()
    train(toy_network(), toy_task(), checkpoint=checkpoint)
    asked = {"network": 0, "task": 0.0, "seed": 0, "recipe": SHORT} | change
    images = dataclasses.replace(toy_task(asked["task"]), flip=asked.pop("flip", True))
    asked |= {"network": toy_network(asked["network"]), "task": images}
    fresh = copy.deepcopy(asked["network"])
    progress = _Loud()
    record = train(**asked, checkpoint=checkpoint, progress=progress)
    assert len(progress.said) == 1 and f"another {what};" in progress.said[0]
    assert untimed(record) == untimed(train(**(asked | {"network": fresh})))


class _Poisoned(nn.Module):
    """Answers with NaN from the n-th training batch on."""

    def __init__(self, inner: nn.Module, step: int) -> None:
        super().__init__()
        self.inner, self.left = inner, step

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            self.left -= 1
        logits: Tensor = self.inner(images)
        return logits * float("nan") if self.left < 0 else logits


@pytest.mark.parametrize("checkpoint_seconds", [0.0, 1e6])
def test_a_loss_that_is_not_a_number_says_where_and_keeps_the_last_good_state(
    toy_network: MakeNetwork, task: ImageTask, checkpoint_seconds: float
) -> None:
    checkpoint = _Memory()
    with pytest.raises(DivergedTraining) as diverged:
        train(_Poisoned(toy_network(), 7), task, checkpoint=checkpoint, checkpoint_seconds=checkpoint_seconds)
    message = str(diverged.value)
    lr = SHORT.learning_rate(7, 15)
    assert f"toy: the training loss is nan at step 8 of 15 (epoch 2, lr {lr:.3g})" in message
    assert "best so far: epoch 1 with" in message and "lower the recipe's 'lr' (now 0.1)" in message
    if checkpoint_seconds == 0:
        arrays, record = checkpoint.kept[-1]
        assert json.loads(record)["step"] == 7
        assert all(np.isfinite(value).all() for value in arrays.values())
    else:
        assert not checkpoint.kept


def test_a_learning_rate_that_explodes_is_diverged_training(task: ImageTask) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(108, 3), nn.Linear(3, 3))
    checkpoint = _Memory()
    with pytest.raises(DivergedTraining):
        train(network, task, Recipe(epochs=9, batch_size=30, lr=1e30, warmup_share=0), checkpoint=checkpoint)
    for arrays, _ in checkpoint.kept:
        assert all(np.isfinite(value).all() for name, value in arrays.items() if name.startswith("network/"))


def test_hard_loss_is_smoothed_cross_entropy() -> None:
    logits, labels = _logits(0), torch.tensor([0, 2, 1, 1])
    targets = 0.9 * F.one_hot(labels, 3) + 0.1 / 3
    expected = -(targets * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(training_loss(logits, labels, 0.1, None, None), expected)


def test_distillation_is_the_explicit_divergence() -> None:
    student, teacher, labels = _logits(0), _logits(1), torch.tensor([0, 2, 1, 1])
    p, q = (teacher / 3).softmax(1), (student / 3).softmax(1)
    kl = (p * (p.log() - q.log())).sum(1).mean()
    expected = 0.6 * F.cross_entropy(student, labels) + 0.4 * 9 * kl
    found = training_loss(student, labels, 0.0, Distil(weight=0.4, temperature=3), teacher)
    torch.testing.assert_close(found, expected)


def test_gradient_of_distillation_is_the_difference_of_softened_answers() -> None:
    """d/ds T²·KL(p‖q) averaged over N images = T·(q − p)/N (Hinton et al. 2015, equation 2)."""
    student, teacher = _logits(0).requires_grad_(), _logits(1)
    training_loss(
        student, torch.zeros(4, dtype=torch.int64), 0.1, Distil(weight=1, temperature=3), teacher
    ).backward()
    assert student.grad is not None
    torch.testing.assert_close(
        student.grad, 3 * ((student / 3).softmax(1) - (teacher / 3).softmax(1)).detach() / 4
    )


def test_a_teacher_is_not_trained_and_changes_the_result(toy_network: MakeNetwork, task: ImageTask) -> None:
    teacher = toy_network(4)
    train(teacher, task)
    before = copy.deepcopy(teacher)
    alone, taught = toy_network(), toy_network()
    recipe = SHORT.model_copy(update={"distil": Distil()})
    train(alone, task, recipe)
    train(taught, task, recipe, teacher=teacher)
    assert same_bits(teacher, before) and not teacher.training
    assert not same_bits(alone, taught)


def test_a_teacher_without_a_recipe_for_it_is_refused(toy_network: MakeNetwork, task: ImageTask) -> None:
    with pytest.raises(ConfigError, match="no 'distil' section"):
        train(toy_network(), task, teacher=toy_network(1))


def test_bf16_trains(toy_network: MakeNetwork, task: ImageTask) -> None:
    recipe = Recipe(epochs=12, batch_size=16, lr=0.2, ema_decay=0.9, precision="bf16")
    assert train(toy_network(), task, recipe).accuracy >= 90


def test_the_pass_is_compiled_where_that_is_asked_for(
    toy_network: MakeNetwork, task: ImageTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the compiler answers is what training calls; without being asked it is left alone."""
    calls: list[str] = []

    def compiled(function: Any) -> Any:
        def run(images: Tensor) -> Any:
            calls.append("run")
            return function(images)

        calls.append("compile")
        return run

    monkeypatch.setattr(torch, "compile", compiled)
    plain, asked = toy_network(), toy_network()
    train(plain, task, SHORT)
    assert calls == []
    train(asked, task, SHORT.model_copy(update={"compile": True}))
    steps = SHORT.steps(len(task.splits["weights"]))
    assert calls == ["compile", *["run"] * steps] and same_bits(plain, asked)


def test_a_batch_larger_than_the_data_is_the_data(toy_network: MakeNetwork, task: ImageTask) -> None:
    progress = _Loud()
    train(toy_network(), task, Recipe(epochs=2, batch_size=1000), progress=progress)
    assert progress.total == progress.done == 2


def _logits(seed: int) -> Tensor:
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))


class _Aided(nn.Module):
    """Has an auxiliary head on its logits, and notes how far the training is said to be."""

    auxiliary_weight = 0.5

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.head: nn.Module | None = None
        self.shares: list[float] = []

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images)
        return logits

    def begin_training(self) -> None:
        self.head = nn.Linear(3, 3)

    def set_progress(self, share: float) -> None:
        self.shares.append(share)

    def training_logits(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        assert self.head is not None
        logits = self(images)
        return logits, self.head(logits)

    def end_training(self) -> None:
        self.head = None


def test_aids_are_there_in_training_alone_and_survive_a_kill(
    toy_network: MakeNetwork, task: ImageTask
) -> None:
    plain, straight, resumed = toy_network(), _Aided(toy_network()), _Aided(toy_network())
    train(plain, task)
    expected = train(straight, task)
    assert list(straight.network.state_dict()) == list(plain.state_dict()) and straight.head is None
    assert not same_bits(plain, straight.network)  # the auxiliary loss has pulled too
    assert straight.shares == pytest.approx([step / 15 for step in range(15)])
    checkpoint = _Memory(kill_after=7)
    with pytest.raises(_Killed):
        train(_Aided(toy_network()), task, checkpoint=checkpoint)
    assert untimed(train(resumed, task, checkpoint=checkpoint)) == untimed(expected)
    assert same_bits(straight, resumed)


def test_the_auxiliary_loss_is_added_with_its_weight(toy_network: MakeNetwork, task: ImageTask) -> None:
    recipe = Recipe(epochs=1, batch_size=150, lr=1e-9, warmup_share=0, ema_decay=0, label_smoothing=0.2)
    heavy, light, none = (_Aided(toy_network()) for _ in range(3))
    heavy.auxiliary_weight, light.auxiliary_weight, none.auxiliary_weight = 2.0, 1.0, 0.0
    losses = [train(network, task, recipe).history[0].train_loss for network in (heavy, light, none)]
    assert losses[0] - losses[1] == pytest.approx(losses[1] - losses[2], rel=1e-4)
    assert losses[0] - losses[1] > 0.5


# ---------------------------------------------------------------------------------------- adversarial images


class _Watching(nn.Module):
    """Keeps the images of every call, by mode."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.seen: dict[bool, list[Tensor]] = {True: [], False: []}

    def forward(self, images: Tensor) -> Tensor:
        if len(images) == 150:  # a training batch; the architecture split has 50
            self.seen[self.training].append(images.detach().clone())
        logits: Tensor = self.inner(images)
        return logits


def test_weights_train_on_perturbed_images_and_statistics_see_nothing_else(
    toy_network: MakeNetwork, task: ImageTask
) -> None:
    plain = Recipe(epochs=1, batch_size=150, lr=1e-9, warmup_share=0, ema_decay=0)
    network = _Watching(toy_network())
    train(network, task, plain.model_copy(update={"adversarial": Adversarial(epsilon=8)}))
    [clean], [shown] = network.seen[False], network.seen[True]
    moved = (shown - clean).abs() * 0.2 * 255
    assert float(moved.max()) == pytest.approx(8, rel=1e-4) and float((moved > 0).float().mean()) > 0.8
    counts = [int(value) for name, value in network.state_dict().items() if name.endswith("batches_tracked")]
    assert counts == [1, 1], "the attack runs in evaluation mode"
    unperturbed = _Watching(toy_network())
    train(unperturbed, task, plain)
    [same] = unperturbed.seen[True]
    assert not unperturbed.seen[False] and torch.equal(same, clean), "the batch itself is the same"


def weak_and_strong_task() -> ImageTask:
    """Two classes of 6 × 6 images. One pixel differs a lot and is right nine times in ten; all the others
    differ by 4 levels each, and together are always right (Tsipras et al. 2018, arXiv 1805.12152)."""
    rng = np.random.default_rng(5)
    labels = rng.integers(0, 2, 240)
    sign = 2 * labels - 1
    pixels = 128 + rng.integers(-10, 11, (240, 6, 6, 1)) + 4 * sign[:, None, None, None]
    pixels[:, 2, 3, 0] = 128 + 100 * np.where(rng.random(240) < 0.9, sign, -sign)
    images = ArrayImages(pixels.astype(np.uint8), labels)
    parts = np.split(np.arange(240), [150, 200])
    splits: Any = dict(zip(("weights", "architecture", "test"), parts, strict=True))
    return build_task("weak", ("a", "b"), images, splits, flip=False, crop_padding=0)


def test_adversarial_training_withstands_what_plain_training_does_not() -> None:
    task = weak_and_strong_task()
    plain = Recipe(epochs=10, batch_size=15, lr=0.1, ema_decay=0.9)
    hardened = plain.model_copy(update={"adversarial": Adversarial(epsilon=8)})
    found, records = {}, {}
    for name, recipe in (("plain", plain), ("hardened", hardened)):
        linear = nn.Linear(36, 2)
        nn.init.zeros_(linear.weight)
        network = nn.Sequential(nn.Flatten(), linear)
        records[name] = train(network, task, recipe)
        [found[name]] = withstand(network, task, Robustness(epsilons=(8,), attacks=("pgd",)))
        clean = evaluate(network, task, "architecture")
        assert (records[name].accuracy, records[name].loss) == (clean.accuracy, clean.loss)
    assert found["plain"].clean >= 97 and found["plain"].accuracy < 10
    assert 80 <= found["hardened"].accuracy <= found["hardened"].clean
    best = records["hardened"].history[records["hardened"].best_epoch - 1]
    assert best.loss is not None and records["hardened"].loss < best.loss, "epochs are judged under attack"
