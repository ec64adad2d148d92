"""Small data sets on disk, and synthetic tasks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data import cache_folder
from pipeline.data.arrays import ArrayImages, build_task
from pipeline.data.base import ImageTask
from pipeline.data.splits import split_images

REAL_DATA = cache_folder()
"""Taken when this is imported: tests themselves get a cache of their own."""

MakeTask = Callable[..., ImageTask]
MakeFolder = Callable[..., Path]


@pytest.fixture
def make_task() -> MakeTask:
    def make(
        num_images: int = 60, size: int = 8, channels: int = 3, flip: bool = True, crop_padding: int = 2
    ) -> ImageTask:
        rng = np.random.default_rng(3)
        pixels = rng.integers(1, 256, (num_images, size, size, channels), dtype=np.uint8)
        labels = np.arange(num_images) % 3
        splits = split_images(
            labels,
            ("a", "b", "c"),
            {},
            test_share=0.2,
            architecture_share=0.25,
            limit=None,
            seed=0,
            where="here",
        )
        source = ArrayImages(pixels, labels)
        return build_task("made", ("a", "b", "c"), source, splits, flip=flip, crop_padding=crop_padding)

    return make


@pytest.fixture
def make_folder(tmp_path: Path) -> MakeFolder:
    """A folder of class folders of noise; `parts` are folders above the class folders."""

    def make(
        classes: tuple[str, ...] = ("cat", "dog"),
        per_class: int = 5,
        size: tuple[int, int] = (12, 12),
        mode: str = "RGB",
        parts: tuple[str, ...] = ("",),
    ) -> Path:
        rng = np.random.default_rng(0)
        shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], len(mode))
        for part in parts:
            for name in classes:
                folder = tmp_path / "images" / part / name
                folder.mkdir(parents=True)
                for number in range(per_class):
                    Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(
                        folder / f"{number}.png"
                    )
        return tmp_path / "images"

    return make


@pytest.fixture
def real_data(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """The person's own cache folder where a path lies below it; skips the test otherwise."""

    def find(relative: str) -> Path:
        if not (REAL_DATA / relative).exists():
            pytest.skip(f"{REAL_DATA / relative} is not there")
        monkeypatch.setenv("BUDGETLINE_CACHE", str(REAL_DATA))
        return REAL_DATA

    return find


@pytest.fixture
def real_fashion_mnist(real_data: Callable[[str], Path]) -> Path:
    return real_data("FashionMNIST/raw")


@pytest.fixture
def real_cifar10(real_data: Callable[[str], Path]) -> Path:
    return real_data("cifar-10-batches-bin")
