"""An image classification task: images, three disjoint splits, and batches addressed by step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.types import IntArray, Json

if TYPE_CHECKING:
    from torch import Tensor

Split = Literal["weights", "architecture", "test"]

_PIXELS_AT_ONCE = 2**18  # 256 images of 32 × 32


class ImageSource(Protocol):
    """Images by index, all of one shape (height, width, channels), as uint8."""

    @property
    def shape(self) -> tuple[int, int, int]: ...
    @property
    def labels(self) -> IntArray: ...
    def read(self, indices: IntArray) -> NDArray[np.uint8]:
        """Shape (N, H, W, C)."""
        ...


@dataclass(frozen=True)
class ImageTask:
    """`name` is what the user asked for (`cifar10`, `image-folder:PATH`); `fingerprint` is a content
    hash over images, labels and splits. `mean` and `std` are per channel, of the weights split, in 0..1.
    Training images are cropped after padding by `crop_padding`, or, with `resized_crop`, in the file's
    own size and then resized, which the source must be able to do. `preparation` says how an image file
    becomes pixels of `image_shape`, for who deploys a network."""

    name: str
    classes: tuple[str, ...]
    source: ImageSource
    splits: dict[Split, IntArray]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool
    crop_padding: int
    fingerprint: str
    resized_crop: bool = False
    preparation: str = "taken as it is"

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        height, width, channels = self.source.shape
        return channels, height, width

    @property
    def assessed_at_once(self) -> int:
        """Images in a batch where nothing is learnt: large enough to be fast, small enough for any memory."""
        height, width, _ = self.source.shape
        return max(32, min(512, _PIXELS_AT_ONCE // (height * width)))

    @property
    def channel_order(self) -> str:
        """What the channels are, in order."""
        return {1: "grey", 3: "RGB"}[self.image_shape[0]]

    @property
    def augmentation(self) -> Json:
        """What training images go through at random."""
        return {"flip": self.flip, "crop_padding": self.crop_padding, "resized_crop": self.resized_crop}


class BatchStream(Protocol):
    """Batches addressed by a step number: the same step gives the same batch, in any process, at any
    time."""

    @property
    def steps_per_epoch(self) -> int: ...
    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """Normalised float32 images (N, C, H, W), channels-last in memory, and int64 labels (N,)."""
        ...
