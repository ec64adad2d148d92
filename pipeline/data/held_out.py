"""The only door to the test split: the assessment at the end of a run, and samples stored with its
models.

Who may import this module is a short list that a test of the architecture can hold; every other reader
of batches refuses the test split.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pipeline.data.base import ImageTask
from pipeline.data.batches import batches_in_order, sample

if TYPE_CHECKING:
    from torch import Tensor


def test_batches(task: ImageTask, batch_size: int, device: str = "cpu") -> Iterator[tuple[Tensor, Tensor]]:
    """The whole test split in order, without augmentation; the last batch may be smaller."""
    return batches_in_order(task, task.splits["test"], batch_size, device)


def test_sample(task: ImageTask, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """`n` test images (all of them where there are fewer), classes in proportion."""
    return sample(task, task.splits["test"], n, seed)
