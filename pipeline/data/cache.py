"""What lies in the cache folder beside named data sets: decoded images, in files of a limited size.

A file has a row for each of the first images that fit under the limit: a checksum, height and width,
then the pixels. Any number of processes read and write rows without a lock, since all would write the
same: a row whose checksum is not right (never written, half written, torn by a power cut) is not there
yet. Rows are read and written with `pread` and `pwrite`, not mapped: a full disk is then an error and no
signal, and what the system keeps of the file in memory is not this process' memory. The file is reserved
in full when it is made, so that a disk without room is found out at the start.
"""

from __future__ import annotations

import functools
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from pipeline.artifacts import replacing
from pipeline.errors import StorageError
from pipeline.types import IntArray

_HEADER = np.dtype([("checksum", "<u4"), ("height", "<u4"), ("width", "<u4")])
_SUFFIX = ".decoded"


def cache_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Where named data sets lie: BUDGETLINE_CACHE, else ~/.cache/budgetline."""
    return Path(environment.get("BUDGETLINE_CACHE") or "~/.cache/budgetline").expanduser()


class Place(NamedTuple):
    """Where one image is kept: `num_bytes` of pixels after a header at `offset`."""

    path: Path
    offset: int
    num_bytes: int


class Rows(NamedTuple):
    """Places for some of N images; `offset_N` is −1 for those that are not kept."""

    path: Path
    offset_N: IntArray
    bytes_N: IntArray

    def place(self, index: int) -> Place | None:
        offset = int(self.offset_N[index])
        return None if offset < 0 else Place(self.path, offset, int(self.bytes_N[index]))


def reserve_rows(folder: Path, key: str, bytes_N: IntArray, order: IntArray, limit: int) -> Rows | None:
    """Rows for the first images in `order` that go into `limit` bytes, in `folder/key.decoded`, which is
    made where it is not there; None where not one goes in.

    All such files of the folder together stay below the limit: those used longest ago are removed.
    Raises StorageError where the disk has no room."""
    end_N = np.cumsum(bytes_N[order] + _HEADER.itemsize)
    num_kept = int(np.searchsorted(end_N, limit, side="right"))
    if num_kept == 0:
        return None
    path, total = folder / f"{key}{_SUFFIX}", int(end_N[num_kept - 1])
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        if not path.exists() or path.stat().st_size != total:
            _make_room(folder, path, limit - total)
            with replacing(path) as draft:
                _allocate(draft, total)
        os.utime(path)
    offset_N = np.full(len(bytes_N), -1, np.int64)
    kept = order[:num_kept]
    offset_N[kept] = end_N[:num_kept] - (bytes_N[kept] + _HEADER.itemsize)
    return Rows(path, offset_N, bytes_N)


def _make_room(folder: Path, path: Path, free: int) -> None:
    """Remove what was used longest ago until the others take no more than `free` bytes. Who has a
    removed file open goes on with it."""
    others = sorted(
        (file for file in folder.glob(f"*{_SUFFIX}") if file != path), key=lambda file: -file.stat().st_mtime
    )
    for file in others:
        free -= file.stat().st_size
        if free < 0:
            file.unlink()


def _allocate(path: Path, num_bytes: int) -> None:
    with path.open("r+b") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, num_bytes)
        file.truncate(num_bytes)


def read_row(place: Place, channels: int) -> NDArray[np.uint8] | None:
    """The pixels, shape (H, W, C), or None where they are not there yet."""
    content = os.pread(_descriptor(place.path), _HEADER.itemsize + place.num_bytes, place.offset)
    if len(content) < _HEADER.itemsize + place.num_bytes:
        return None
    header = np.frombuffer(content, _HEADER, 1)[0]
    height, width = int(header["height"]), int(header["width"])
    if not height or header["checksum"] != zlib.crc32(memoryview(content)[4:]):
        return None
    return np.frombuffer(content, np.uint8, offset=_HEADER.itemsize).reshape(height, width, channels)


def write_row(place: Place, pixels: NDArray[np.uint8]) -> None:
    """Raises StorageError where the disk is full; an image whose header promised another size is not
    kept."""
    if pixels.nbytes != place.num_bytes:
        return
    header = np.zeros(1, _HEADER)
    header["height"], header["width"] = pixels.shape[:2]
    content = np.concatenate([header.view(np.uint8), pixels.ravel()])
    header["checksum"] = zlib.crc32(content[4:].data)
    content[:4] = header.view(np.uint8)[:4]
    try:
        os.pwrite(_descriptor(place.path), content.data, place.offset)
    except OSError as failure:
        raise StorageError(
            f"{place.path}: a decoded image cannot be kept ({failure.strerror or failure}); free some space, "
            "or set data.cache to less, and run again"
        ) from None


@functools.lru_cache(maxsize=8)
def _descriptor(path: Path) -> int:
    return os.open(path, os.O_RDWR)
