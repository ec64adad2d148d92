from __future__ import annotations

import numpy as np
import pytest

from pipeline.data.arrays import ArrayImages, channel_statistics, fingerprint
from pipeline.data.base import Split
from pipeline.types import IntArray

SPLITS: dict[Split, IntArray] = {
    "weights": np.array([0, 1]),
    "architecture": np.array([2]),
    "test": np.array([3]),
}


def images() -> ArrayImages:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 6, 3), dtype=np.uint8)
    return ArrayImages(pixels, np.array([0, 1, 0, 1]))


def test_shape_and_read() -> None:
    source = images()
    assert source.shape == (5, 6, 3)
    assert np.array_equal(source.read(np.array([2, 0])), source.pixels[[2, 0]])


def test_statistics_are_those_of_the_indexed_images() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (700, 4, 4, 3), dtype=np.uint8)
    indices = np.arange(0, 700, 2)
    mean, std = channel_statistics(ArrayImages(pixels, np.zeros(700, np.int64)), indices)
    chosen = pixels[indices].astype(np.float64) / 255
    assert mean == pytest.approx(chosen.mean(axis=(0, 1, 2)), rel=1e-12)
    assert std == pytest.approx(chosen.std(axis=(0, 1, 2)), rel=1e-9)


def test_statistics_of_white_images_are_exact_and_finite() -> None:
    pixels = np.full((300, 2, 2, 1), 255, np.uint8)
    mean, std = channel_statistics(ArrayImages(pixels, np.zeros(300, np.int64)), np.arange(300))
    assert mean.tolist() == [1.0] and std.tolist() == [1 / 255]


def test_fingerprint_sees_pixels_labels_splits_and_classes() -> None:
    classes = ("a", "b")
    source = images()
    first = fingerprint(classes, source, SPLITS)
    assert first == fingerprint(classes, images(), dict(reversed(SPLITS.items())))
    changed_pixels, changed_labels = images(), images()
    changed_pixels.pixels[3, 4, 5, 2] ^= 1
    changed_labels.labels[3] = 0
    moved: dict[Split, IntArray] = {**SPLITS, "weights": np.array([0]), "architecture": np.array([1, 2])}
    others = {
        fingerprint(classes, changed_pixels, SPLITS),
        fingerprint(classes, changed_labels, SPLITS),
        fingerprint(classes, source, moved),
        fingerprint(("a", "c"), source, SPLITS),
    }
    assert len(others | {first}) == 5
