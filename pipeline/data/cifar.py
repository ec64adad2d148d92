"""CIFAR-10 (Krizhevsky 2009): 50,000 + 10,000 colour 32×32 images of ten classes.

Read from the published binary layout, `cifar-10-batches-bin/`, which is also what is downloaded, or from the
python layout, `cifar-10-batches-py/`, that torchvision unpacks. The latter are pickles, and no pickle is
loaded here: their opcodes are listed (nothing is imported, built or called), the one string of pixels and the
labels are picked out, and what comes out must have the md5 that the same batch has in the binary layout.
"""

from __future__ import annotations

import hashlib
import pickletools
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.data.arrays import ArrayImages, Padding, TaskSettings, build_task
from pipeline.data.base import ImageTask
from pipeline.data.download import downloaded
from pipeline.data.splits import split_images
from pipeline.errors import DataError
from pipeline.types import IntArray, Progress

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
URL_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"  # stated on https://www.cs.toronto.edu/~kriz/cifar.html
BATCH_MD5 = {  # of the files in that archive
    "data_batch_1": "5dd7e06a14cb22eb9f671a540d1b7c25",
    "data_batch_2": "5ea93a67294ea407fff1d09f752e9692",
    "data_batch_3": "942cd6a4bcdd0dd3c604fbe906cb4421",
    "data_batch_4": "ae636b3ba5c66a11e91e8cb52e771fcb",
    "data_batch_5": "53f37980c15c3d472c316c40844f3f0d",
    "test_batch": "803d5f7f4d78ea53de84dbe85f74fb6d",
}
IMAGES_PER_BATCH = 10_000
_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_BINARY, _PYTHON = "cifar-10-batches-bin", "cifar-10-batches-py"
_SIZE = 32
_PIXEL_BYTES = 3 * _SIZE * _SIZE

Records = NDArray[np.uint8]  # (N, 1 + 3072): the label, then the red, green and blue planes row by row


class CifarSettings(TaskSettings):
    crop_padding: Padding = 4


def load(
    path: Path | None, settings: CifarSettings, *, name: str, seed: int, progress: Progress
) -> ImageTask:
    """`path` holds one of the two layouts, or is its folder. The official test batch is the test split."""
    assert path is not None, "the catalogue gives a default folder"
    read, files = _batches(path, progress)
    pixels = np.empty((len(files) * IMAGES_PER_BATCH, _SIZE, _SIZE, 3), np.uint8)
    labels = np.empty(len(pixels), np.int64)
    for number, file in enumerate(files):
        part = slice(number * IMAGES_PER_BATCH, (number + 1) * IMAGES_PER_BATCH)
        pixels[part], labels[part] = _images_and_labels(read(file), file)
    splits = split_images(
        labels,
        _CLASSES,
        {"test": np.arange(len(labels) - IMAGES_PER_BATCH, len(labels))},
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


def read_binary_batch(file: Path) -> Records:
    """One `.bin` file; DataError names it when it has not exactly 10,000 records."""
    content = np.fromfile(file, np.uint8)
    wanted_bytes = IMAGES_PER_BATCH * (1 + _PIXEL_BYTES)
    if len(content) != wanted_bytes:
        raise DataError(
            f"{file}: wanted {wanted_bytes} bytes ({IMAGES_PER_BATCH} images), got {len(content)}: the file "
            "is truncated or damaged; remove it to have the data set downloaded again"
        )
    return content.reshape(IMAGES_PER_BATCH, 1 + _PIXEL_BYTES)


def read_python_batch(file: Path) -> Records:
    """One batch of the python layout, read without loading the pickle that it is (see the module's head)."""
    try:
        pixels, labels = _scan_pickle(file.read_bytes())
    except ValueError as failure:
        raise DataError(
            f"{file}: is not a batch of CIFAR-10 ({failure}); {_binary_advice(file.parent)}"
        ) from None
    records = np.concatenate([labels[:, None], pixels.reshape(-1, _PIXEL_BYTES)], axis=1)
    if hashlib.md5(records.data, usedforsecurity=False).hexdigest() != BATCH_MD5[file.name]:
        raise DataError(
            f"{file}: its images do not have CIFAR-10's published md5; it is not loaded as a pickle, "
            f"{_binary_advice(file.parent)}"
        )
    return records


def _scan_pickle(content: bytes) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Pixels (N · 3072,) and labels (N,) of a pickled batch; ValueError where they cannot be told.

    Python 2 wrote them: the pixels are the only string of their length, the labels the small integers between
    the key 'labels' and the next string."""
    pixels: str | None = None
    labels: list[int] = []
    in_labels = False
    for opcode, argument, _ in pickletools.genops(content):
        if isinstance(argument, str):
            in_labels = argument == "labels"
            if len(argument) == IMAGES_PER_BATCH * _PIXEL_BYTES:
                pixels = argument
        elif in_labels and opcode.name == "BININT1" and isinstance(argument, int):
            labels.append(argument)
    if pixels is None or len(labels) != IMAGES_PER_BATCH:
        raise ValueError(f"{len(labels)} labels, {'some' if pixels else 'no'} pixels")
    return np.frombuffer(pixels.encode("latin-1"), np.uint8), np.array(labels, np.uint8)


def _images_and_labels(records: Records, file: Path) -> tuple[NDArray[np.uint8], IntArray]:
    labels = records[:, 0].astype(np.int64)
    if labels.max() >= len(_CLASSES):
        raise DataError(
            f"{file}: wanted labels 0 to {len(_CLASSES) - 1}, got {labels.max()}; the file is damaged"
        )
    return records[:, 1:].reshape(-1, 3, _SIZE, _SIZE).transpose(0, 2, 3, 1), labels


def _batches(path: Path, progress: Progress) -> tuple[Callable[[Path], Records], list[Path]]:
    """The reader and the six files, training batches first, of the layout found; downloaded if none is."""
    layouts: list[tuple[str, str, Callable[[Path], Records]]] = [
        (_BINARY, ".bin", read_binary_batch),
        (_PYTHON, "", read_python_batch),
    ]
    for layout, suffix, read in layouts:
        for folder in (path / layout, path):
            files = [folder / f"{batch}{suffix}" for batch in BATCH_MD5]
            if all(file.is_file() for file in files):
                return read, files
    folder = path / _BINARY
    _download(folder, progress)
    return read_binary_batch, [folder / f"{batch}.bin" for batch in BATCH_MD5]


def _download(folder: Path, progress: Progress) -> None:
    progress.say(f"downloading CIFAR-10 (170 MB) to {folder}")
    with downloaded(URL, URL_MD5, folder.parent, _binary_advice(folder.parent)) as archive:
        with tarfile.open(archive) as members:
            for batch in BATCH_MD5:
                member = members.extractfile(f"{_BINARY}/{batch}.bin")
                assert member is not None, "the archive has the published md5"
                draft = archive.parent / f"{batch}.bin"
                draft.write_bytes(member.read())
                folder.mkdir(exist_ok=True)
                draft.replace(folder / draft.name)


def _binary_advice(folder: Path) -> str:
    return f"unpack {URL} in {folder}, or name the folder that has {_BINARY}: cifar10:PATH"
