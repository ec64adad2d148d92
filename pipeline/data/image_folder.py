"""Any folder of class folders, maybe below train/ and test/ (or val/), decoded by Pillow into uint8 memory.

With train/ and test/, those are the splits, and a val/ beside them is the architecture split; with train/ and
val/ alone, val/ is the test split; otherwise a stratified test split is drawn. Alpha is dropped; 16-bit grey
keeps its upper eight bits; the EXIF orientation is applied; an animation gives its first frame. Files are
taken in sorted order, so the same files give the same task.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from pipeline.data.arrays import ArrayImages, Padding, Share, TaskSettings, build_task
from pipeline.data.base import ImageTask, Split
from pipeline.data.splits import split_images
from pipeline.errors import ConfigError, DataError
from pipeline.types import IntArray, Progress

if TYPE_CHECKING:
    from PIL import Image

_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
_VALIDATION_NAMES = {"val", "valid", "validation"}
_GREY_MODES = {"1", "L", "LA", "La"}
_NAMED_AT_MOST = 5
_FILES_PER_BLOCK = 256
_MEMORY_SHARE = 0.5

T = TypeVar("T")


class ImageFolderSettings(TaskSettings):
    architecture_share: Share = 0.2
    test_share: Share = 0.2
    image_size: int | None = Field(
        None, ge=8, le=1024, description="pixels; resize the shorter side to it, then cut the centre square"
    )
    crop_padding: Padding | None = Field(None, description="pixels; an eighth of the image size unless given")


@dataclass(frozen=True)
class _Scan:
    """Image files in order, their classes, the splits that folders give, and how many files are no images."""

    files: list[Path]
    labels: IntArray
    classes: tuple[str, ...]
    given: dict[Split, IntArray]
    num_ignored: int


@dataclass(frozen=True)
class _Header:
    """Width and height in pixels as stored, and whether the image has no colour."""

    size: tuple[int, int]
    grey: bool


def load(
    path: Path | None, settings: ImageFolderSettings, *, name: str, seed: int, progress: Progress
) -> ImageTask:
    """Only the files of the three splits are opened, so `limit` also shortens decoding."""
    if path is None:
        raise ConfigError(f"data '{name}': an image folder needs its path; write image-folder:PATH")
    scan = _scan(path)
    _refuse_settings_without_effect(settings, scan.given, path)
    if scan.num_ignored:
        progress.say(f"{path}: ignored {scan.num_ignored} files that are not images")
    splits = split_images(
        scan.labels,
        scan.classes,
        scan.given,
        test_share=settings.test_share,
        architecture_share=settings.architecture_share,
        limit=settings.limit,
        seed=seed,
        where=str(path),
    )
    used = np.sort(np.concatenate(list(splits.values())))
    files = [scan.files[index] for index in used]
    headers = _each(_read_header, files, path, "reading image headers", progress)
    size = settings.image_size or _common_size(headers, path)
    channels = 1 if all(header.grey for header in headers) else 3
    _refuse_too_large(len(files) * size * size * channels, len(files), path)
    pixels = np.empty((len(files), size, size, channels), np.uint8)
    _decode_into(pixels, files, path, progress)
    return build_task(
        name,
        scan.classes,
        ArrayImages(pixels, scan.labels[used]),
        {split: np.searchsorted(used, indices) for split, indices in splits.items()},
        flip=settings.flip,
        crop_padding=size // 8 if settings.crop_padding is None else settings.crop_padding,
    )


# ---------------------------------------------------------------------------------------------- finding files


def _scan(root: Path) -> _Scan:
    if not root.is_dir():
        raise DataError(f"{root}: wanted a folder of class folders, but {_what_is(root)}")
    roles = _roles({folder.name for folder in _subfolders(root)})
    parts: list[tuple[Path, Split | None]] = [(root / name, split) for name, split in roles.items()]
    parts = parts or [(root, None)]
    classes = _classes([folder for folder, _ in parts])
    files: list[Path] = []
    labels: list[int] = []
    given: dict[Split, IntArray] = {}
    num_ignored = 0
    for folder, split in parts:
        start = len(files)
        for label, name in enumerate(classes):
            found, ignored = _image_files(folder / name)
            files += found
            labels += [label] * len(found)
            num_ignored += ignored
        if split is not None:
            given[split] = np.arange(start, len(files))
    return _Scan(files, np.array(labels, np.int64), classes, given, num_ignored)


def _what_is(path: Path) -> str:
    return "it is a file" if path.exists() else "nothing is there"


def _roles(names: set[str]) -> dict[str, Split | None]:
    """Top-level folder → its split, None for the one to divide; empty when the folders are classes."""
    validation = names & _VALIDATION_NAMES
    if "train" not in names or names - validation - {"train", "test"} or len(validation) > 1:
        return {}
    roles: dict[str, Split | None] = {"train": None}
    for name in validation:
        roles[name] = "architecture" if "test" in names else "test"
    if "test" in names:
        roles["test"] = "test"
    return roles


def _classes(folders: Sequence[Path]) -> tuple[str, ...]:
    first, *others = folders
    names = {folder.name for folder in _subfolders(first)}
    if len(names) < 2:
        found = f"only '{next(iter(names))}'" if names else "none"
        raise DataError(f"{first}: wanted at least 2 class folders with images in them, found {found}")
    for other in others:
        differing = names ^ {folder.name for folder in _subfolders(other)}
        if differing:
            raise DataError(
                f"{other}: wanted the same class folders as in {first}, but these are in one of them only: "
                f"{_some(sorted(differing))}"
            )
    return tuple(sorted(names))


def _subfolders(folder: Path) -> list[Path]:
    return [entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")]


def _image_files(folder: Path) -> tuple[list[Path], int]:
    """Image files at any depth, sorted by path below `folder`, and how many other files there are."""
    everything = [
        Path(parent, name)
        for parent, _, names in os.walk(folder, onerror=_raise)
        for name in names
        if not name.startswith(".")
    ]
    images = [file for file in everything if file.suffix.lower() in _SUFFIXES]
    return sorted(images, key=lambda file: file.relative_to(folder).parts), len(everything) - len(images)


def _raise(failure: OSError) -> NoReturn:
    raise failure


def _refuse_settings_without_effect(
    settings: ImageFolderSettings, given: Mapping[Split, IntArray], path: Path
) -> None:
    shares: dict[Split, str] = {"test": "test_share", "architecture": "architecture_share"}
    for split, field in shares.items():
        if split in given and field in settings.model_fields_set:
            raise ConfigError(
                f"{path}: has its own folder for the {split} split, so '{field}' has no effect; remove it"
            )


# --------------------------------------------------------------------------------------------- reading images


def _each(
    work: Callable[[Path], T], files: Sequence[Path], root: Path, label: str, progress: Progress
) -> list[T]:
    """`work` of every file, in threads; DataError names the files that cannot be read."""
    done: list[T | _Unreadable] = []
    with ThreadPoolExecutor(os.cpu_count()) as threads, progress.track(label, len(files)) as advance:
        for start in range(0, len(files), _FILES_PER_BLOCK):
            block = files[start : start + _FILES_PER_BLOCK]
            done += threads.map(lambda file: _attempt(work, file), block)
            advance(len(block), "")
    faults = [
        f"{fault.file.relative_to(root)} ({fault.reason})" for fault in done if isinstance(fault, _Unreadable)
    ]
    if faults:
        raise DataError(
            f"{root}: {len(faults)} of {len(files)} images cannot be read: {_some(faults)}; repair or remove "
            "them"
        )
    return [result for result in done if not isinstance(result, _Unreadable)]


@dataclass(frozen=True)
class _Unreadable:
    file: Path
    reason: str


def _attempt(work: Callable[[Path], T], file: Path) -> T | _Unreadable:
    """Pillow's decoders raise errors of many kinds on damaged files; only lack of memory is not damage."""
    from PIL import UnidentifiedImageError

    try:
        return work(file)
    except MemoryError:
        raise
    except UnidentifiedImageError:
        return _Unreadable(file, "not an image")
    except Exception as failure:
        return _Unreadable(file, str(failure).partition("\n")[0] or type(failure).__name__)


def _read_header(file: Path) -> _Header:
    from PIL import Image

    with Image.open(file) as image:
        if image.mode == "F":
            raise ValueError("floating-point pixels have no known range")
        return _Header(image.size, image.mode in _GREY_MODES or image.mode.startswith("I"))


def _common_size(headers: Sequence[_Header], root: Path) -> int:
    sizes = Counter(header.size for header in headers)
    (width, height), count = min(sizes.items(), key=lambda item: (-item[1], item[0]))
    if len(sizes) > 1:
        raise DataError(
            f"{root}: images have {len(sizes)} different sizes (most often {width}×{height}, {count} of "
            f"{len(headers)}); set image_size to resize and cut them all to one square"
        )
    if width != height:
        raise DataError(
            f"{root}: images are {width}×{height}, but networks take squares; set image_size to resize "
            "and cut them"
        )
    return width


def _refuse_too_large(num_bytes: int, num_images: int, root: Path) -> None:
    import psutil

    available = psutil.virtual_memory().available
    if num_bytes > _MEMORY_SHARE * available:
        raise DataError(
            f"{root}: {num_images} decoded images are held in memory, {num_bytes / 2**30:.1f} GiB, more "
            f"than half of the {available / 2**30:.1f} GiB available; set a smaller image_size, or a limit"
        )


def _decode_into(pixels: NDArray[np.uint8], files: Sequence[Path], root: Path, progress: Progress) -> None:
    _, size, _, channels = pixels.shape
    position = {file: index for index, file in enumerate(files)}

    def decode(file: Path) -> None:
        image = _decode(file, size, channels)
        pixels[position[file]] = np.asarray(image).reshape(size, size, channels)

    _each(decode, files, root, "decoding images", progress)


def _decode(file: Path, size: int, channels: int) -> Image.Image:
    from PIL import Image, ImageOps

    with Image.open(file) as image:
        image.draft(None, (size, size))  # a JPEG that is much larger is decoded at a fraction of its size
        upright = _eight_bit(ImageOps.exif_transpose(image), "L" if channels == 1 else "RGB")
    if upright.size == (size, size):
        return upright
    return ImageOps.fit(upright, (size, size), Image.Resampling.BILINEAR)


def _eight_bit(image: Image.Image, mode: str) -> Image.Image:
    from PIL import Image

    if image.mode.startswith("I"):
        values: NDArray[Any] = np.asarray(image).clip(0, 2**16 - 1)
        image = Image.fromarray((values >> 8).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert(mode)


def _some(names: Sequence[str]) -> str:
    more = len(names) - _NAMED_AT_MOST
    return ", ".join(names[:_NAMED_AT_MOST]) + (f" and {more} more" if more > 0 else "")
