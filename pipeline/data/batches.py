"""Batches that any step can ask for again, for search and training; the test split is not to be had here.

`pipeline.data.held_out` is the only door to the test split. Pixels stay uint8 until the last moment: a batch
is gathered, cropped and flipped as bytes, then normalised as float32 in one pass over contiguous rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from pipeline.data.base import ImageTask, Split
from pipeline.data.splits import stratified_order
from pipeline.errors import ConfigError
from pipeline.types import IntArray

if TYPE_CHECKING:
    from torch import Tensor

SearchSplit = Literal["weights", "architecture"]
Images = NDArray[np.uint8]  # (N, H, W, C)

# Last words of the seeds of the two random streams. Not zero: a SeedSequence is padded with zeros.
_ORDER_STREAM, _AUGMENTATION_STREAM = 1, 2


class Batches:
    """A BatchStream over one split: every epoch a new order, every step its own crops and flips.

    A batch is a function of (task, split, batch size, seed, step) alone. With `drop_last` the images left
    over at an epoch's end are skipped, else they make a smaller batch. Raises ConfigError where `drop_last`
    would leave no batch, ValueError for the test split."""

    def __init__(
        self,
        task: ImageTask,
        split: SearchSplit,
        batch_size: int,
        *,
        seed: int,
        augment: bool,
        drop_last: bool,
    ) -> None:
        self._indices = search_indices(task, split)
        if drop_last and batch_size > len(self._indices):
            raise ConfigError(
                f"batch size {batch_size} is more than the {len(self._indices)} images of the {split} split "
                f"of {task.name}; set a smaller batch size"
            )
        self._task = task
        self._batch_size = batch_size
        self._seed = seed
        self._augment = augment
        self._to_tensor = Normalise(task)
        full, rest = divmod(len(self._indices), batch_size)
        self._steps_per_epoch = full if drop_last or not rest else full + 1
        self._order: tuple[int, IntArray] = (-1, self._indices)

    @property
    def steps_per_epoch(self) -> int:
        return self._steps_per_epoch

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """Normalised float32 images (N, C, H, W), channels-last in memory, and int64 labels (N,)."""
        import torch

        epoch, position = divmod(step, self._steps_per_epoch)
        start = position * self._batch_size
        indices = self._epoch_order(epoch)[start : start + self._batch_size]
        pixels = self._task.source.read(indices)
        if self._augment:
            rng = np.random.default_rng([self._seed, step, _AUGMENTATION_STREAM])
            pixels = random_crop(pixels, self._task.crop_padding, rng)
            if self._task.flip:
                pixels = random_flip(pixels, rng)
        return self._to_tensor(pixels), torch.from_numpy(self._task.source.labels[indices])

    def _epoch_order(self, epoch: int) -> IntArray:
        known, order = self._order
        if known != epoch:
            order = np.random.default_rng([self._seed, epoch, _ORDER_STREAM]).permutation(self._indices)
            self._order = (epoch, order)
        return order


class Normalise:
    """uint8 images (N, H, W, C) → float32 tensor (N, C, H, W), channels-last: (x / 255 - mean) / std."""

    def __init__(self, task: ImageTask) -> None:
        import torch

        _, width, _ = task.source.shape
        mean, std = np.array(task.mean), np.array(task.std)
        # One value per entry of an image row (W · C), so that the pass is over long contiguous rows.
        self._scale = torch.from_numpy(np.tile(1 / (255 * std), width).astype(np.float32))
        self._shift = torch.from_numpy(np.tile(-mean / std, width).astype(np.float32))

    def __call__(self, pixels: Images) -> Tensor:
        import torch

        num_images, height, width, channels = pixels.shape
        rows = torch.from_numpy(pixels).view(num_images, height, width * channels).to(torch.float32)
        rows.mul_(self._scale).add_(self._shift)
        return rows.view(num_images, height, width, channels).permute(0, 3, 1, 2)


def random_crop(pixels: Images, padding: int, rng: np.random.Generator) -> Images:
    """Each image shifted by up to `padding` pixels along both axes; what comes in is black."""
    if padding == 0:
        return pixels
    num_images, height, width, channels = pixels.shape
    padded = np.zeros((num_images, height + 2 * padding, width + 2 * padding, channels), np.uint8)
    padded[:, padding:-padding, padding:-padding] = pixels
    per_image, per_row, per_pixel, per_value = padded.strides
    num_offsets = 2 * padding + 1
    windows = as_strided(
        padded,
        shape=(num_images, num_offsets, num_offsets, height, width * channels),
        strides=(per_image, per_row, per_pixel, per_row, per_value),
        writeable=False,
    )
    tops, lefts = rng.integers(0, num_offsets, size=(2, num_images))
    cropped: Images = windows[np.arange(num_images), tops, lefts].reshape(pixels.shape)
    return cropped


def random_flip(pixels: Images, rng: np.random.Generator) -> Images:
    """Each image mirrored left to right with probability 1/2."""
    num_images, height, width, channels = pixels.shape
    mirrored = np.flatnonzero(rng.random(num_images) < 0.5)
    entries = np.arange(width * channels).reshape(width, channels)[::-1].ravel()
    flipped = pixels.reshape(num_images, height, width * channels).copy()
    flipped[mirrored] = flipped[mirrored].take(entries, axis=2)  # 20 times faster than a reversed view
    return flipped.reshape(pixels.shape)


def evaluation_batches(
    task: ImageTask, split: SearchSplit, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The whole split in order, without augmentation; the last batch may be smaller."""
    return batches_in_order(task, search_indices(task, split), batch_size)


def fixed_batch(task: ImageTask, split: SearchSplit, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """`n` images of the split (all where there are fewer), classes in proportion, without augmentation."""
    return sample(task, search_indices(task, split), n, seed)


def search_indices(task: ImageTask, split: Split) -> IntArray:
    """The split's indices; ValueError for test, which only `pipeline.data.held_out` reads."""
    if split == "test":
        raise ValueError("the test split is for the final assessment alone; pipeline.data.held_out reads it")
    return task.splits[split]


def batches_in_order(task: ImageTask, indices: IntArray, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """These images in this order, normalised."""
    import torch

    to_tensor = Normalise(task)
    for start in range(0, len(indices), batch_size):
        part = indices[start : start + batch_size]
        yield to_tensor(task.source.read(part)), torch.from_numpy(task.source.labels[part])


def sample(task: ImageTask, indices: IntArray, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """At most `n` of these images, classes in proportion, as one batch that depends on `seed` alone."""
    order = stratified_order(task.source.labels[indices], np.random.default_rng(seed))
    return next(batches_in_order(task, indices[order[:n]], n))
