"""The relaxed supernet that trains on adversarial images: what it is shown, and that it goes on as
before."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pipeline.data.arrays import ArrayImages, build_task
from pipeline.data.base import ImageTask
from pipeline.errors import ConfigError
from pipeline.evaluators.adversarial import AdversarialSettings, make_adversarial
from pipeline.evaluators.attack import Pixels
from pipeline.evaluators.relaxed import RelaxedSettings, RelaxedSupernet
from pipeline.settings import parse_settings
from pipeline.spaces.nb201 import OPERATIONS, NB201Settings, NB201Space
from pipeline.types import FloatArray

SPACE = NB201Space((3, 8, 8), 3, NB201Settings(cells=1, channels=4, mixed_norm="pools"))
SETTINGS = AdversarialSettings(batch_size=16, learning_rate=0.1, evaluation_images=20, thorough_images=40)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_task() -> ImageTask:
    rng = np.random.default_rng(7)
    labels = np.arange(160) % 3
    pixels = rng.integers(0, 150, (160, 8, 8, 3))
    pixels[np.arange(160), :, :, labels] += 80
    order = rng.permutation(160)
    splits: Any = {"weights": order[:80], "architecture": order[80:120], "test": order[120:]}
    images = ArrayImages(pixels.astype(np.uint8), labels)
    return build_task("toy", ("r", "g", "b"), images, splits, flip=True, crop_padding=1)


TASK = make_task()


def make(seed: int = 0, **changed: Any) -> RelaxedSupernet:
    settings = SETTINGS.model_copy(update=changed)
    return make_adversarial(SPACE, TASK, settings, total_steps=20, seed=seed, device="cpu")


def clean() -> RelaxedSupernet:
    settings = RelaxedSettings(**SETTINGS.model_dump(exclude={"epsilon"}))
    return RelaxedSupernet(SPACE, TASK, settings, total_steps=20, seed=0)


def mixture() -> FloatArray:
    return np.random.default_rng(0).uniform(0.1, 0.9, (len(SPACE.edges), len(OPERATIONS)))


def test_weights_train_on_images_within_epsilon_that_are_harder() -> None:
    evaluator = make(epsilon=8.0)
    images, labels = evaluator._training.at(3)
    weights = torch.from_numpy(mixture().astype(np.float32))
    assert evaluator._perturb is not None
    shown = evaluator._perturb(lambda x: evaluator.supernet.forward(x, weights), images, labels, step=3)
    pixels = Pixels.of(TASK)
    std = torch.tensor(pixels.std).view(1, -1, 1, 1)
    moved = ((shown - images) * std * 255).abs()
    assert float(moved.max()) == pytest.approx(8.0, rel=1e-4)
    torch.testing.assert_close(pixels.within(shown, images, 8 / 255), shown)
    with torch.no_grad():
        losses = [
            float(F.cross_entropy(evaluator.supernet.forward(x, weights), labels)) for x in (images, shown)
        ]
    assert losses[1] > losses[0]
    assert evaluator.fit(mixture(), step=3).loss == pytest.approx(losses[1], rel=1e-5)


def test_the_upper_level_and_architectures_see_clean_images() -> None:
    adversarial, plain = make(), clean()
    for found, expected in zip(
        adversarial.losses_and_grads(mixture(), step=2),
        plain.losses_and_grads(mixture(), step=2),
        strict=True,
    ):
        np.testing.assert_array_equal(found, expected)
    archs = [SPACE.largest, SPACE.smallest]
    np.testing.assert_array_equal(adversarial.losses(archs, step=0), plain.losses(archs, step=0))
    assert adversarial.fit(mixture(), step=0) != plain.fit(mixture(), step=0)


@pytest.mark.parametrize("order", ["first", "second"])
def test_restored_it_goes_on_with_the_same_bits(order: str) -> None:
    whole = make(order=order)
    for step in range(2):
        whole.fit(mixture(), step=step)
    saved = {name: array.copy() for name, array in whole.state().items()}
    resumed = make(order=order)
    resumed.load_state(saved)
    for step in range(2, 4):
        for left, right in zip(
            whole.losses_and_grads(mixture(), step=step),
            resumed.losses_and_grads(mixture(), step=step),
            strict=True,
        ):
            np.testing.assert_array_equal(left, right)
        assert whole.fit(mixture(), step=step) == resumed.fit(mixture(), step=step)
    expected, found = whole.state(), resumed.state()
    assert all(np.array_equal(expected[name], found[name]) for name in expected)


def test_the_seed_and_the_strength_matter() -> None:
    first, again, other, stronger = (make(**changed) for changed in ({}, {}, {"seed": 1}, {"epsilon": 9.0}))
    losses = [evaluator.fit(mixture(), step=0).loss for evaluator in (first, again, other, stronger)]
    assert losses[0] == losses[1] and len(set(losses)) == 3


def test_settings_are_those_of_relaxed_and_epsilon() -> None:
    assert SETTINGS.epsilon == 2.0
    assert AdversarialSettings.model_fields.keys() - RelaxedSettings.model_fields.keys() == {"epsilon"}
    for epsilon in (0, 256):
        with pytest.raises(ConfigError, match=f"'epsilon' is {epsilon}"):
            parse_settings(AdversarialSettings, {"epsilon": epsilon}, "test")
