"""Batches that any step can ask for again, for search and training; the test split is not to be had
here.

`pipeline.data.held_out` is the only door to the test split. What a step is made of is decided here; how
its pixels come to be a tensor on the device that computes, in `pipeline.data.loader`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import numpy as np

from pipeline.data.augment import NO_DRAWS, draw
from pipeline.data.base import ImageTask, Split
from pipeline.data.loader import Batch, Loader
from pipeline.data.splits import stratified_order
from pipeline.errors import ConfigError
from pipeline.types import IntArray

if TYPE_CHECKING:
    from torch import Tensor

SearchSplit = Literal["weights", "architecture"]

# Last words of the seeds of the two random streams. Not zero: a SeedSequence is padded with zeros.
_ORDER_STREAM, _AUGMENTATION_STREAM = 1, 2


class Batches:
    """A BatchStream over one split: every epoch a new order, every step its own crops and flips.

    A batch is a function of (task, split, batch size, seed, step) alone, and of `cutout`, the side in
    pixels of the square that augmentation covers (0: none). With `drop_last` the images left over at an
    epoch's end are skipped, else they make a smaller batch. Batches lie on `device`, equal on all to
    rounding; `on_device`: see Loader. Raises ConfigError where `drop_last` would leave no batch,
    ValueError for the test split."""

    def __init__(
        self,
        task: ImageTask,
        split: SearchSplit,
        batch_size: int,
        *,
        seed: int,
        augment: bool,
        drop_last: bool,
        cutout: int = 0,
        device: str = "cpu",
        on_device: bool | None = None,
    ) -> None:
        self._indices = search_indices(task, split)
        if drop_last and batch_size > len(self._indices):
            raise ConfigError(
                f"batch size {batch_size} is more than the {len(self._indices)} images of the {split} split "
                f"of {task.name}; set a smaller batch size"
            )
        assert augment or not cutout, "cutout is a part of augmentation"
        self._task = task
        self._batch_size = batch_size
        self._seed = seed
        self._augment, self._cutout = augment, cutout
        full, rest = divmod(len(self._indices), batch_size)
        self._steps_per_epoch = full if drop_last or not rest else full + 1
        self._orders: dict[int, IntArray] = {}
        self._loader = Loader(task, self._batch, cutout=cutout, device=device, on_device=on_device)

    @property
    def steps_per_epoch(self) -> int:
        return self._steps_per_epoch

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """Normalised float32 images (N, C, H, W), channels-last in memory, and int64 labels (N,)."""
        return self._loader.at(step)

    def _batch(self, step: int) -> Batch:
        epoch, position = divmod(step, self._steps_per_epoch)
        start = position * self._batch_size
        indices = self._epoch_order(epoch)[start : start + self._batch_size]
        if not self._augment:
            return Batch(indices, NO_DRAWS)
        rng = np.random.default_rng([self._seed, step, _AUGMENTATION_STREAM])
        return Batch(indices, draw(self._task, len(indices), self._cutout, rng))

    def _epoch_order(self, epoch: int) -> IntArray:
        """Two epochs' orders are kept: reading ahead looks into the next."""
        if epoch not in self._orders:
            order = np.random.default_rng([self._seed, epoch, _ORDER_STREAM]).permutation(self._indices)
            newest = list(self._orders)[-1:]
            self._orders = {known: self._orders[known] for known in newest} | {epoch: order}
        return self._orders[epoch]


def evaluation_batches(
    task: ImageTask, split: SearchSplit, batch_size: int, device: str = "cpu"
) -> Iterator[tuple[Tensor, Tensor]]:
    """The whole split in order, without augmentation; the last batch may be smaller."""
    return batches_in_order(task, search_indices(task, split), batch_size, device)


def fixed_batch(task: ImageTask, split: SearchSplit, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """`n` images of the split (all where there are fewer), classes in proportion, without
    augmentation."""
    return sample(task, search_indices(task, split), n, seed)


def search_indices(task: ImageTask, split: Split) -> IntArray:
    """The split's indices; ValueError for test, which only `pipeline.data.held_out` reads."""
    if split == "test":
        raise ValueError("the test split is for the final assessment alone; pipeline.data.held_out reads it")
    return task.splits[split]


def batches_in_order(
    task: ImageTask, indices: IntArray, batch_size: int, device: str = "cpu"
) -> Iterator[tuple[Tensor, Tensor]]:
    """These images in this order, normalised."""
    parts = [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]
    loader = Loader(task, lambda step: Batch(parts[step]) if step < len(parts) else None, device=device)
    return (loader.at(step) for step in range(len(parts)))


def sample(task: ImageTask, indices: IntArray, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """At most `n` of these images, classes in proportion, as one batch that depends on `seed` alone."""
    order = stratified_order(task.source.labels[indices], np.random.default_rng(seed))
    return next(batches_in_order(task, indices[order[:n]], n))
