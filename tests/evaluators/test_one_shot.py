"""The supernet as a learning signal: what trains it, what is asked of it, and that it goes on as if never
stopped."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from toy_images import CLASSES, WatchedImages, make_task

from pipeline.data.base import ImageTask
from pipeline.errors import ConfigError, DivergedTraining
from pipeline.evaluators.one_shot import OneShotEvaluator, OneShotSettings
from pipeline.spaces.mbconv import MBConvSettings, MBConvSpace
from pipeline.types import Arch, IntArray

SPACE = MBConvSpace((3, 8, 8), CLASSES, MBConvSettings(size="tiny", lane=4, operations=("k3e1", "k5e3")))
MIDDLE = Arch("mbconv", tuple(i % len(slot.choices) for i, slot in enumerate(SPACE.slots)))
ARCHS = [SPACE.smallest, MIDDLE, SPACE.largest]
SETTINGS = OneShotSettings(batch_size=16, warm_up_steps=2, evaluation_images=20, thorough_images=64)


def make(
    task: ImageTask | None = None, seed: int = 0, total_steps: int = 40, **changed: Any
) -> OneShotEvaluator:
    settings = SETTINGS.model_copy(update=changed)
    return OneShotEvaluator(SPACE, task or make_task(), settings, total_steps=total_steps, seed=seed)


def read_of(evaluator_task: ImageTask) -> list[IntArray]:
    source = evaluator_task.source
    assert isinstance(source, WatchedImages)
    return source.reads


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --------------------------------------------------------------------------------------------------- training


def test_fitting_lowers_the_loss_of_every_member_on_images_it_never_saw() -> None:
    evaluator = make()
    before = evaluator.losses(ARCHS, step=0, thorough=True)
    fits = [evaluator.fit(ARCHS, step=step).loss for step in range(40)]
    after = evaluator.losses(ARCHS, step=0, thorough=True)
    assert before.shape == (3, 1)
    np.testing.assert_allclose(before, np.log(CLASSES), rtol=0.1)  # untrained: every class alike
    assert (after < 0.5 * before).all()
    assert np.mean(fits[-5:]) < 0.6 * fits[0]


def test_bf16_learns_and_keeps_its_weights_in_full_precision() -> None:
    evaluator, exact = make(precision="bf16"), make()
    rounded = evaluator.losses(ARCHS, step=0)
    assert not np.array_equal(rounded, exact.losses(ARCHS, step=0))
    np.testing.assert_allclose(rounded, exact.losses(ARCHS, step=0), rtol=0.02)
    fits = [evaluator.fit(ARCHS, step=step).loss for step in range(30)]
    assert np.mean(fits[-5:]) < 0.8 * fits[0]
    assert {value.dtype for value in evaluator.state().values()} == {np.dtype(np.float32)}


def test_weights_are_trained_on_the_weights_split_alone() -> None:
    task = make_task()
    evaluator = make(task)
    for step in range(9):
        evaluator.fit(ARCHS, step=step)
    assert len(read_of(task)) == 9, "one batch for all members of the sandwich"
    assert set(np.concatenate(read_of(task))) <= set(task.splits["weights"])


def test_the_loss_is_the_sandwich_s_with_the_teacher_first() -> None:
    """By hand: the largest learns from the labels, the others halfway from its softmax outputs."""
    evaluator = make()
    images, labels = evaluator._training.at(5)
    with torch.no_grad():
        teacher, *others = (evaluator.supernet.forward(images, arch) for arch in reversed(ARCHS))
        taught = [
            0.7 * F.cross_entropy(x, labels) - 0.3 * (teacher.softmax(1) * x.log_softmax(1)).sum(1).mean()
            for x in others
        ]
        expected = (F.cross_entropy(teacher, labels) + sum(taught)) / 3
    found = make(distillation=0.3).fit(ARCHS, step=5).loss
    assert found == pytest.approx(float(expected), rel=1e-5)


def test_without_distillation_everyone_learns_from_labels() -> None:
    evaluator = make()
    images, labels = evaluator._training.at(0)
    with torch.no_grad():
        losses = [F.cross_entropy(evaluator.supernet.forward(images, arch), labels) for arch in ARCHS]
    assert make(distillation=0.0).fit(ARCHS, step=0).loss == pytest.approx(float(sum(losses)) / 3, rel=1e-5)


def test_the_step_is_that_of_the_mean_loss() -> None:
    """Plain gradient descent by hand: clipping out of reach, no momentum, no decay, no warm-up."""
    plain = {"momentum": 0.0, "weight_decay": 0.0, "clip_norm": 1e9, "warm_up_steps": 0, "distillation": 0.0}
    evaluator = make(**plain)
    images, labels = evaluator._training.at(0)
    weights = list(evaluator.module.parameters())
    loss = sum(F.cross_entropy(evaluator.supernet.forward(images, arch), labels) for arch in ARCHS) / 3
    assert isinstance(loss, torch.Tensor)
    gradients = torch.autograd.grad(loss, weights, allow_unused=True)
    expected = [w - 0.1 * g if g is not None else w for w, g in zip(weights, gradients, strict=True)]
    info = evaluator.fit(ARCHS, step=0)
    for weight, wanted in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight, wanted, rtol=1e-4, atol=1e-6)
    norm = sum(float((g**2).sum()) for g in gradients if g is not None)
    assert info.grad_sq_norm == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize(
    ("sandwich", "asked", "trained"),
    [
        ("bands", [MIDDLE], [MIDDLE]),
        ("bands", [SPACE.smallest, MIDDLE, SPACE.smallest], [MIDDLE, SPACE.smallest]),
        ("space", [MIDDLE], [SPACE.largest, MIDDLE, SPACE.smallest]),
        ("space", [SPACE.largest, MIDDLE], [SPACE.largest, MIDDLE, SPACE.smallest]),
    ],
)
def test_slices_of_the_sandwich(
    sandwich: str, asked: list[Arch], trained: list[Arch], monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluator = make(sandwich=sandwich)
    seen: list[Arch] = []
    forward = evaluator.supernet.forward
    monkeypatch.setattr(
        evaluator.supernet, "forward", lambda images, arch: (seen.append(arch), forward(images, arch))[1]
    )
    evaluator.fit(asked, step=0)
    assert seen == trained


def test_the_rate_warms_up_and_ends_at_zero() -> None:
    evaluator = make(warm_up_steps=4, total_steps=100, learning_rate=0.2)
    rates = [evaluator._rate(step) for step in range(101)]
    assert rates[0] == pytest.approx(0.2 / 5)
    assert rates[4] == max(rates) == pytest.approx(0.2, rel=0.01)
    assert rates[50] == pytest.approx(0.1)
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[4:]))
    assert rates[100] == pytest.approx(0.0, abs=1e-12)


def test_more_steps_than_were_planned_change_nothing() -> None:
    evaluator = make(total_steps=3, weight_decay=0.0)
    evaluator.fit(ARCHS, step=0)
    before = evaluator.state()
    evaluator.fit(ARCHS, step=3)
    after = evaluator.state()
    assert all(np.array_equal(before[name], after[name]) for name in before if name.startswith("weight/"))


def test_diverging_says_where_and_leaves_the_weights_finite() -> None:
    evaluator = make(learning_rate=1e30, warm_up_steps=0)
    with pytest.raises(
        DivergedTraining, match=r"at step \d+ \(learning rate .*lower evaluator\.learning_rate"
    ):
        for step in range(9):
            evaluator.fit(ARCHS, step=step)
    assert all(np.isfinite(array).all() for array in evaluator.state().values())


# ----------------------------------------------------------------------------------------------------- asking


def test_all_architectures_are_asked_on_the_same_images() -> None:
    task = make_task()
    evaluator = make(task)
    losses = evaluator.losses([*ARCHS, MIDDLE], step=3)
    assert len(read_of(task)) == 1 and len(read_of(task)[0]) == SETTINGS.evaluation_images
    assert losses[1] == losses[3]
    alone = np.concatenate([evaluator.losses([arch], step=3) for arch in ARCHS])
    np.testing.assert_array_equal(alone, losses[:3])


def test_another_step_brings_other_images_and_the_same_step_the_same() -> None:
    evaluator = make()
    first = evaluator.losses(ARCHS, step=0)
    assert (evaluator.losses(ARCHS, step=1) != first).all()
    np.testing.assert_array_equal(evaluator.losses(ARCHS, step=0), first)


def test_a_thorough_answer_is_of_the_architecture_split_whatever_the_step() -> None:
    task = make_task()
    evaluator = make(task)
    first = evaluator.losses(ARCHS, step=0, thorough=True)
    read = np.concatenate(read_of(task))
    assert len(read) == len(set(read)) == SETTINGS.thorough_images
    assert set(read) <= set(task.splits["architecture"])
    np.testing.assert_array_equal(evaluator.losses(ARCHS, step=9, thorough=True), first)


def test_a_loss_is_the_mean_over_parts_that_batch_norm_sees_alone() -> None:
    evaluator = make(evaluation_batch=8)  # of 20 images: 7, 7 and 6
    images, labels = evaluator._quick.at(0)
    with torch.inference_mode():
        parts = [
            F.cross_entropy(evaluator._logits(images[a:b], MIDDLE), labels[a:b], reduction="sum")
            for a, b in ((0, 7), (7, 14), (14, 20))
        ]
    assert evaluator.losses([MIDDLE], step=0)[0, 0] == pytest.approx(float(sum(parts)) / 20, rel=1e-6)
    assert evaluator.losses([MIDDLE], step=0)[0, 0] != make().losses([MIDDLE], step=0)[0, 0]


def test_asking_changes_nothing() -> None:
    evaluator = make()
    before = evaluator.state()
    evaluator.losses(ARCHS, step=0, thorough=True)
    assert all(np.array_equal(before[name], array) for name, array in evaluator.state().items())


def test_fewer_images_than_asked_for_are_all_taken() -> None:
    task = make_task()
    make(task, evaluation_images=1000, thorough_images=1000, batch_size=100).losses(ARCHS, step=0)
    assert len(read_of(task)[0]) == len(task.splits["architecture"])


def test_a_batch_beyond_the_split_is_refused() -> None:
    with pytest.raises(ConfigError, match="batch size 121 is more than the 120 images of the weights split"):
        make(batch_size=121)


# ------------------------------------------------------------------------------------------------------ state


def test_it_is_a_function_of_its_seed() -> None:
    def trained(seed: int) -> dict[str, Any]:
        evaluator = make(seed=seed)
        for step in range(3):
            evaluator.fit(ARCHS, step=step)
        return evaluator.state()

    first, again, other = trained(1), trained(1), trained(2)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not all(np.array_equal(first[name], other[name]) for name in first)


def test_torchs_own_generator_is_left_alone() -> None:
    before = torch.random.get_rng_state()
    evaluator = make(seed=5)
    evaluator.fit(ARCHS, step=0)
    evaluator.losses(ARCHS, step=0)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_restored_evaluator_goes_on_with_the_same_bits() -> None:
    whole = make()
    for step in range(3):
        whole.fit(ARCHS, step=step)
    saved = {name: array.copy() for name, array in whole.state().items()}
    resumed = make(seed=0)
    resumed.load_state(saved)
    for step in range(3, 7):
        assert whole.fit(ARCHS, step=step) == resumed.fit(ARCHS, step=step)
        np.testing.assert_array_equal(whole.losses(ARCHS, step=step), resumed.losses(ARCHS, step=step))
    expected, found = whole.state(), resumed.state()
    assert expected.keys() == found.keys() and any(name.startswith("momentum/") for name in found)
    assert all(np.array_equal(expected[name], found[name]) for name in expected)


def test_a_state_is_a_copy() -> None:
    evaluator = make()
    saved = evaluator.state()
    kept = {name: array.copy() for name, array in saved.items()}
    evaluator.fit(ARCHS, step=0)
    assert all(np.array_equal(saved[name], kept[name]) for name in saved)


def test_it_says_that_it_trains_and_is_noisy() -> None:
    assert make().trains and make().noisy
