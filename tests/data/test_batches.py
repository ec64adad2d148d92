from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.data import held_out
from pipeline.data.arrays import ArrayImages
from pipeline.data.base import ImageTask
from pipeline.data.batches import (
    Batches,
    evaluation_batches,
    fixed_batch,
)
from pipeline.data.loader import Normalise
from pipeline.errors import ConfigError

MakeTask = Callable[..., ImageTask]


def normalised(task: ImageTask, indices: np.ndarray) -> np.ndarray:
    pixels = task.source.read(indices).transpose(0, 3, 1, 2) / 255
    mean, std = (np.array(values)[None, :, None, None] for values in (task.mean, task.std))
    return (pixels - mean) / std


def batches(task: ImageTask, **changed: object) -> Batches:
    settings: dict[str, object] = {"seed": 7, "augment": True, "drop_last": False}
    return Batches(task, "weights", 8, **{**settings, **changed})  # type: ignore[arg-type]


@pytest.mark.parametrize("channels", [1, 3])
def test_normalise_follows_the_formula(make_task: MakeTask, channels: int) -> None:
    task = make_task(channels=channels)
    images = Normalise(task)(torch.from_numpy(task.source.read(np.arange(10))))
    assert images.dtype == torch.float32 and images.shape == (10, channels, 8, 8)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert np.allclose(images.numpy(), normalised(task, np.arange(10)), atol=1e-5)


def test_weights_split_is_standardised(make_task: MakeTask) -> None:
    task = make_task()
    everything = torch.cat([images for images, _ in evaluation_batches(task, "weights", 7)])
    assert torch.allclose(everything.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(everything.std(dim=(0, 2, 3), correction=0), torch.ones(3), atol=1e-5)


def test_an_epoch_holds_every_image_once(make_task: MakeTask) -> None:
    task = make_task()
    stream = batches(task, augment=False)
    num_weights = len(task.splits["weights"])
    assert stream.steps_per_epoch == -(-num_weights // 8)
    for epoch in range(2):
        steps = range(epoch * stream.steps_per_epoch, (epoch + 1) * stream.steps_per_epoch)
        seen = np.concatenate([stream.at(step)[0].numpy() for step in steps])
        wanted = normalised(task, task.splits["weights"])
        assert np.allclose(np.sort(seen.sum((1, 2, 3))), np.sort(wanted.sum((1, 2, 3))), atol=1e-3)


def test_images_keep_their_labels(make_task: MakeTask) -> None:
    task = make_task()
    images, labels = batches(task, augment=False).at(3)
    assert labels.dtype == torch.int64
    for image, label in zip(images.numpy(), labels, strict=True):
        distance = np.abs(normalised(task, np.arange(60)) - image).max(axis=(1, 2, 3))
        assert task.source.labels[distance.argmin()] == label and distance.min() < 1e-5


def test_drop_last_skips_the_rest(make_task: MakeTask) -> None:
    stream = batches(make_task(), drop_last=True)
    assert stream.steps_per_epoch == len(make_task().splits["weights"]) // 8
    assert {len(stream.at(step)[1]) for step in range(2 * stream.steps_per_epoch)} == {8}


def test_a_step_gives_the_same_bits_in_any_order_and_any_stream(make_task: MakeTask) -> None:
    forwards, backwards = batches(make_task()), batches(make_task())
    steps = range(3 * forwards.steps_per_epoch)
    first = {step: forwards.at(step) for step in steps}
    for step in reversed(steps):
        images, labels = backwards.at(step)
        assert torch.equal(images, first[step][0]) and torch.equal(labels, first[step][1])


def test_seeds_epochs_and_steps_differ(make_task: MakeTask) -> None:
    stream = batches(make_task(), augment=False)
    other = batches(make_task(), augment=False, seed=8)
    assert not torch.equal(stream.at(0)[0], other.at(0)[0])
    assert not torch.equal(stream.at(0)[0], stream.at(stream.steps_per_epoch)[0])


def test_every_step_draws_its_own_crops_and_flips(make_task: MakeTask) -> None:
    task = make_task()
    alike = ArrayImages(np.repeat(task.source.read(np.array([0])), 60, axis=0), task.source.labels)
    stream = batches(replace(task, source=alike))
    first, second = (stream.at(step)[0] for step in (0, 1))
    assert not torch.equal(first, second)
    assert len({image.numpy().tobytes() for image in first}) > 1


def test_without_flip_and_padding_augmentation_changes_nothing(make_task: MakeTask) -> None:
    task = make_task(flip=False, crop_padding=0)
    assert torch.equal(batches(task).at(4)[0], batches(task, augment=False).at(4)[0])


def test_evaluation_is_the_split_in_order(make_task: MakeTask) -> None:
    task = make_task()
    indices = task.splits["architecture"]
    parts = list(evaluation_batches(task, "architecture", 5))
    assert [len(labels) for _, labels in parts] == [5, 5, 2]
    assert np.allclose(
        torch.cat([images for images, _ in parts]).numpy(), normalised(task, indices), atol=1e-5
    )
    assert torch.cat([labels for _, labels in parts]).tolist() == task.source.labels[indices].tolist()


def test_fixed_batch_is_balanced_and_depends_on_the_seed(make_task: MakeTask) -> None:
    task = make_task()
    images, labels = fixed_batch(task, "architecture", 6, 0)
    assert torch.bincount(labels).tolist() == [2, 2, 2]
    assert torch.equal(images, fixed_batch(task, "architecture", 6, 0)[0])
    assert not torch.equal(images, fixed_batch(task, "architecture", 6, 1)[0])
    assert len(fixed_batch(task, "architecture", 10**6, 0)[1]) == len(task.splits["architecture"])


def test_only_held_out_reads_test(make_task: MakeTask) -> None:
    task = make_task()
    for read in (
        lambda: Batches(task, "test", 4, seed=0, augment=False, drop_last=False),  # type: ignore[arg-type]
        lambda: evaluation_batches(task, "test", 4),  # type: ignore[arg-type]
        lambda: fixed_batch(task, "test", 4, 0),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match="held_out"):
            read()
    labels = torch.cat([labels for _, labels in held_out.test_batches(task, 5)])
    assert labels.tolist() == task.source.labels[task.splits["test"]].tolist()
    images, _ = held_out.test_sample(task, 3, 0)
    distance = np.abs(normalised(task, task.splits["test"])[None] - images.numpy()[:, None]).max(
        axis=(2, 3, 4)
    )
    assert (distance.min(axis=1) < 1e-5).all()


def test_a_batch_larger_than_the_split_is_refused_with_drop_last(make_task: MakeTask) -> None:
    with pytest.raises(
        ConfigError, match="batch size 64 is more than the 36 images of the weights split of made"
    ):
        Batches(make_task(), "weights", 64, seed=0, augment=True, drop_last=True)
