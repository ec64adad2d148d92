"""Images held in memory as uint8, and the ImageTask made of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from pipeline.data.ahead import in_order
from pipeline.data.base import ImageSource, ImageTask, Split
from pipeline.settings import Settings
from pipeline.types import FloatArray, IntArray

Share = Annotated[float, Field(gt=0, lt=1)]
Padding = Annotated[int, Field(ge=0, le=64)]

# Sums of up to this many squares of uint8 values are exact in float32 (256 · 255² < 2²⁴).
_EXACT_SUM_LENGTH = 256
_MAX_CHUNK_VALUES = 2**22


class TaskSettings(Settings):
    """What every data set lets one choose; each data set's own model gives the defaults."""

    architecture_share: Share = Field(
        0.1, description="share of the images outside test that scores architectures"
    )
    limit: int | None = Field(
        None,
        ge=2,
        description="keep this many images outside test, the same in every run, classes in proportion",
    )
    flip: bool = Field(True, description="mirror training images at random")


@dataclass(frozen=True)
class ArrayImages:
    """An ImageSource in memory: pixels (N, H, W, C) uint8, labels (N,)."""

    pixels: NDArray[np.uint8]
    labels: IntArray

    @property
    def shape(self) -> tuple[int, int, int]:
        _, height, width, channels = self.pixels.shape
        return height, width, channels

    def read(self, indices: IntArray) -> NDArray[np.uint8]:
        return self.pixels[indices]


def build_task(
    name: str,
    classes: tuple[str, ...],
    source: ArrayImages,
    splits: Mapping[Split, IntArray],
    *,
    flip: bool,
    crop_padding: int,
    statistics_of: IntArray | None = None,
    preparation: str = ImageTask.preparation,
) -> ImageTask:
    """An ImageTask with the content's fingerprint, and the channel statistics of the weights split, or
    of the images `statistics_of` alone."""
    source.pixels.flags.writeable = False
    mean, std = channel_statistics(source, splits["weights"] if statistics_of is None else statistics_of)
    return ImageTask(
        name=name,
        classes=classes,
        source=source,
        splits=dict(splits),
        mean=tuple(float(value) for value in mean),
        std=tuple(float(value) for value in std),
        flip=flip,
        crop_padding=crop_padding,
        fingerprint=fingerprint(classes, source, splits),
        preparation=preparation,
    )


def channel_statistics(source: ImageSource, indices: IntArray) -> tuple[FloatArray, FloatArray]:
    """Mean and standard deviation per channel over the indexed images, shapes (C,), in units of 0..1.

    Sums are exact integers, so every machine gets the same bits. The deviation is at least 1/255, which
    keeps a constant channel finite when it is normalised."""
    height, width, channels = source.shape
    size = height * width * channels
    length = min(_EXACT_SUM_LENGTH, max(1, _MAX_CHUNK_VALUES // size))
    total, total_sq = np.zeros(size), np.zeros(size)
    parts = [indices[start : start + length] for start in range(0, len(indices), length)]
    for pixels in in_order(source, parts):
        values = pixels.reshape(-1, size).astype(np.float32)
        total += values.sum(axis=0)
        total_sq += np.einsum("ij,ij->j", values, values)
    count = len(indices) * height * width
    mean = total.reshape(-1, channels).sum(axis=0) / count
    variance = total_sq.reshape(-1, channels).sum(axis=0) / count - mean**2
    return mean / 255, np.maximum(np.sqrt(np.maximum(variance, 0)), 1.0) / 255


def fingerprint(classes: tuple[str, ...], source: ArrayImages, splits: Mapping[Split, IntArray]) -> str:
    """sha256 over shape, class names, pixels, labels and splits, in hexadecimal."""
    digest = hashlib.sha256(json.dumps([source.pixels.shape, classes]).encode())
    digest.update(np.ascontiguousarray(source.pixels).data)
    digest.update(np.ascontiguousarray(source.labels, dtype="<i8").data)
    for split in sorted(splits):
        digest.update(f"{split}:{len(splits[split])}".encode())
        digest.update(np.ascontiguousarray(splits[split], dtype="<i8").data)
    return digest.hexdigest()
