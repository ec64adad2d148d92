"""Fashion-MNIST (Xiao et al. 2017, arXiv 1708.07747): 60,000 + 10,000 grey 28×28 images of clothes.

Read from torchvision's layout, `FashionMNIST/raw/`, each file packed (.gz) or unpacked; downloaded where
it is not there.
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.data.arrays import ArrayImages, Padding, TaskSettings, build_task
from pipeline.data.base import ImageTask
from pipeline.data.download import downloaded
from pipeline.data.splits import split_images
from pipeline.errors import DataError
from pipeline.types import IntArray, Progress

_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
_PARTS = ("train", "t10k")
_NAMES = tuple(f"{part}-{kind}-ubyte" for part in _PARTS for kind in ("images-idx3", "labels-idx1"))
_LAYOUT = Path("FashionMNIST", "raw")


class FashionMnistSettings(TaskSettings):
    crop_padding: Padding = 2


def load(
    path: Path | None, settings: FashionMnistSettings, *, name: str, seed: int, progress: Progress
) -> ImageTask:
    """`path` holds `FashionMNIST/raw/`, or is that folder. The official test images are the test split."""
    assert path is not None, "the catalogue gives a default folder"
    folder = _folder_with_files(path, progress)
    parts = [_read_part(folder, part) for part in _PARTS]
    pixels = np.concatenate([images for images, _ in parts])[..., None]
    labels = np.concatenate([labels for _, labels in parts])
    splits = split_images(
        labels,
        _CLASSES,
        {"test": np.arange(len(parts[0][1]), len(labels))},
        test_share=0.0,
        architecture_share=settings.architecture_share,
        limit=settings.limit,
        seed=seed,
        where=name,
    )
    return build_task(
        name,
        _CLASSES,
        ArrayImages(pixels, labels),
        splits,
        flip=settings.flip,
        crop_padding=settings.crop_padding,
    )


def read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """An idx file of unsigned bytes with that many dimensions (format: the MNIST page of Y. LeCun).

    Four bytes of magic (0, 0, 8 for uint8, number of dimensions), the sizes as big-endian 32-bit integers,
    then the values. Raises DataError naming the file when it is anything else or cut short."""
    content = _read_packed(path)
    header_bytes = 4 * (1 + dimensions)
    if content[:4] != bytes((0, 0, 8, dimensions)) or len(content) < header_bytes:
        raise DataError(
            f"{path}: wanted an idx file of bytes with {dimensions} dimensions, got {len(content)} bytes "
            f"that begin with {content[:4].hex(' ') or 'nothing'}; remove it to have it downloaded again"
        )
    shape = tuple(int(size) for size in np.frombuffer(content[4:header_bytes], ">u4"))
    wanted_bytes = header_bytes + math.prod(shape)
    if len(content) != wanted_bytes:
        raise DataError(
            f"{path}: its header promises {wanted_bytes} bytes, it has {len(content)}: the file is truncated "
            "or damaged; remove it to have it downloaded again"
        )
    return np.frombuffer(content, np.uint8, offset=header_bytes).reshape(shape)


def _read_packed(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if path.suffix == ".gz" else content
    except (EOFError, gzip.BadGzipFile, zlib.error) as failure:
        raise DataError(
            f"{path}: is truncated or damaged ({failure}); remove it to have it downloaded again"
        ) from None
    except OSError as failure:
        raise DataError(f"{path}: cannot be read ({failure.strerror or failure})") from None


def _read_part(folder: Path, part: str) -> tuple[NDArray[np.uint8], IntArray]:
    image_file = _find(folder, f"{part}-images-idx3-ubyte")
    label_file = _find(folder, f"{part}-labels-idx1-ubyte")
    assert image_file is not None and label_file is not None
    images = read_idx(image_file, 3)
    labels = read_idx(label_file, 1).astype(np.int64)
    if len(images) != len(labels) or images.shape[1:] != (28, 28):
        raise DataError(
            f"{image_file}: wanted one 28×28 image for each of the {len(labels)} labels of {label_file.name}"
            f", got {len(images)} images of {images.shape[1]}×{images.shape[2]}"
        )
    if labels.max(initial=0) >= len(_CLASSES):
        raise DataError(f"{label_file}: wanted labels 0 to {len(_CLASSES) - 1}, got {labels.max()}")
    return images, labels


def _find(folder: Path, name: str) -> Path | None:
    """The unpacked file where it is there, else the packed one, else None."""
    return next((file for file in (folder / name, folder / f"{name}.gz") if file.is_file()), None)


def _folder_with_files(path: Path, progress: Progress) -> Path:
    for folder in (path / _LAYOUT, path / "raw", path):
        if all(_find(folder, name) for name in _NAMES):
            return folder
    folder = path / _LAYOUT
    _download([name for name in _NAMES if _find(folder, name) is None], folder, progress)
    return folder


def _download(names: list[str], folder: Path, progress: Progress) -> None:
    from torchvision.datasets import FashionMNIST

    md5_of = dict(FashionMNIST.resources)
    advice = (
        f"put {', '.join(f'{name}.gz' for name in names)} from github.com/zalandoresearch/fashion-mnist "
        f"into {folder}, or name the folder that has FashionMNIST/raw: fashion-mnist:PATH"
    )
    for name in names:
        progress.say(f"downloading Fashion-MNIST's {name}.gz to {folder}")
        packed = f"{name}.gz"
        with downloaded(FashionMNIST.mirrors[0] + packed, md5_of[packed], folder, advice) as file:
            file.replace(folder / packed)
