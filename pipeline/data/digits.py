"""The 1,797 grey 8×8 digits that scikit-learn carries: the embedded data set, there without a download."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pipeline.data.arrays import ArrayImages, Padding, Share, TaskSettings, build_task
from pipeline.data.base import ImageTask
from pipeline.data.splits import split_images
from pipeline.errors import ConfigError
from pipeline.types import Progress

_BRIGHTEST = 16


class DigitsSettings(TaskSettings):
    architecture_share: Share = 0.2
    test_share: Share = 0.2
    flip: bool = False
    crop_padding: Padding = 1


def load(
    path: Path | None, settings: DigitsSettings, *, name: str, seed: int, progress: Progress
) -> ImageTask:
    """Values 0..16 are stretched to 0..255.

    There is no official test split: a share of each class is taken."""
    if path is not None:
        raise ConfigError(f"data '{name}': digits come with scikit-learn and take no path; write 'digits'")
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = np.rint(bunch.images * (255 / _BRIGHTEST)).astype(np.uint8)[..., None]
    labels = bunch.target.astype(np.int64)
    classes = tuple(str(label) for label in bunch.target_names)
    splits = split_images(
        labels,
        classes,
        {},
        test_share=settings.test_share,
        architecture_share=settings.architecture_share,
        limit=settings.limit,
        seed=seed,
        where=name,
    )
    return build_task(
        name,
        classes,
        ArrayImages(pixels, labels),
        splits,
        flip=settings.flip,
        crop_padding=settings.crop_padding,
    )
