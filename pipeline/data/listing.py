"""The image files of a folder of class folders: found, counted, and known again by what their headers
said.

Made for a million files: names are one block of bytes, a file is opened once per machine, not once per
run, and only its first 4 KiB are read. What was read is kept in the cache folder with the file's size
and time of change; a file that agrees in both is not opened again, unless it was changed within two
seconds before it was read, since such a change can leave size and time as they were.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline.artifacts import read_arrays, write_arrays
from pipeline.data.base import Split
from pipeline.data.decode import Attempts, Header, read_headers, refuse, some
from pipeline.errors import DataError
from pipeline.types import Arrays, IntArray, Progress

_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
_VALIDATION_NAMES = {"val", "valid", "validation"}
_LIKE_A_SPLIT = {*_VALIDATION_NAMES, "train", "training", "test", "testing", "dev", "eval", "evaluation"}
_BESIDE_A_SPLIT = {"set", "data", "images", "imgs", "split", "folder"}
_FILES_PER_BLOCK = 256
_FILES_FOR_PROCESSES = 20_000  # from here on headers are read by processes: Pillow's parsers hold the lock
_BLOCKS_AHEAD = 64
_SETTLED_NS = 2_000_000_000

T = TypeVar("T")
R = TypeVar("R")


# ---------------------------------------------------------------------------------------------------- finding


@dataclass(frozen=True)
class Names:
    """Strings in one block of bytes: N lists of Python's strings would be five times as large, and would
    be copied into every process that only reads them."""

    block: NDArray[np.uint8]
    end_N: IntArray

    @classmethod
    def of(cls, names: Sequence[str]) -> Names:
        encoded = [os.fsencode(name) for name in names]
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
        return cls(np.frombuffer(b"".join(encoded), np.uint8), np.cumsum(lengths))

    @classmethod
    def joined(cls, parts: Sequence[Names]) -> Names:
        starts = np.cumsum([0, *(len(part.block) for part in parts)])
        ends = [part.end_N + start for part, start in zip(parts, starts.tolist(), strict=False)]
        return cls(np.concatenate([part.block for part in parts]), np.concatenate(ends))

    def __len__(self) -> int:
        return len(self.end_N)

    def __getitem__(self, index: int) -> str:
        start = int(self.end_N[index - 1]) if index else 0
        return os.fsdecode(self.block[start : int(self.end_N[index])].tobytes())

    def __iter__(self) -> Iterator[str]:
        return map(self.__getitem__, range(len(self)))


class _File(NamedTuple):
    parts: tuple[str, ...]
    size: int
    changed_ns: int


class Files(NamedTuple):
    """N files: paths below the root with `/`, sizes in bytes, and when they were changed last."""

    names: Names
    size_N: IntArray
    changed_ns_N: IntArray

    @classmethod
    def of(cls, files: Sequence[_File]) -> Files:
        return cls(
            Names.of(["/".join(file.parts) for file in files]),
            np.array([file.size for file in files], np.int64),
            np.array([file.changed_ns for file in files], np.int64),
        )

    @classmethod
    def joined(cls, parts: Sequence[Files]) -> Files:
        sizes, times = ([getattr(part, name) for part in parts] for name in cls._fields[1:])
        names = Names.joined([part.names for part in parts])
        return cls(names, np.concatenate(sizes), np.concatenate(times))

    def take(self, indices: IntArray) -> Files:
        if len(indices) == len(self.names) and np.array_equal(indices, np.arange(len(indices))):
            return self
        names = Names.of([self.names[index] for index in indices.tolist()])
        return Files(names, self.size_N[indices], self.changed_ns_N[indices])


@dataclass(frozen=True)
class Scan:
    """Image files in order, their classes, the splits that folders give, and how many files are no
    images."""

    files: Files
    labels: IntArray
    classes: tuple[str, ...]
    given: dict[Split, IntArray]
    num_ignored: int


def scan(root: Path) -> Scan:
    """With train/ and test/, those are the splits, and a val/ beside them is the architecture split;
    with train/ and val/ alone, val/ is the test split; train/ alone is divided; else the folders are
    classes. Raises DataError."""
    if not root.is_dir():
        raise DataError(f"{root}: wanted a folder of class folders, but {_what_is(root)}")
    folders = _subfolders(root)
    roles = _roles({folder.name for folder in folders})
    if not roles:
        _refuse_other_splits(root, folders)
    parts: list[tuple[str, Split | None]] = [(name, split) for name, split in roles.items()]
    parts = parts or [("", None)]
    classes = _classes([root / part for part, _ in parts])
    found: list[Files] = []  # per part and class: arrays, since lists of a million files would be large
    given: dict[Split, IntArray] = {}
    num_files = num_ignored = 0
    for part, split in parts:
        start = num_files
        for name in classes:
            above = (part, name) if part else (name,)
            images, ignored = _images_below(root.joinpath(*above), above)
            found.append(Files.of(images))
            num_files += len(images)
            num_ignored += ignored
        if split is not None:
            given[split] = np.arange(start, num_files)
    label_of_each = np.tile(np.arange(len(classes)), len(parts))
    labels = np.repeat(label_of_each, [len(files.names) for files in found])
    return Scan(Files.joined(found), labels, classes, given, num_ignored)


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


def _refuse_other_splits(root: Path, folders: Sequence[Path]) -> None:
    """Two folders that are called like different splits are no classes where they have the same folders in
    them, or one has several and the other, as of images to be guessed, has none. Raises DataError."""
    for split, other in combinations(sorted(f for f in folders if _split_in(f.name) is not None), 2):
        if _split_in(split.name) == _split_in(other.name):  # classes that are numbered
            continue
        inside, beside = ({f.name for f in _subfolders(folder)} for folder in (split, other))
        shared, either, names = inside & beside, inside | beside, f"'{split.name}' and '{other.name}'"
        if len(shared) > 1:
            found = f"{names} have the same folders in them ({some(sorted(shared))})"
        elif len(either) > 1 and not (inside and beside):
            found = f"of {names} one has folders in it ({some(sorted(either))})"
        else:
            continue
        raise DataError(
            f"{root}: {found}, as splits have; wanted 'train', 'val' and 'test' (or 'train' and one of the "
            "others, or 'train' alone) and nothing beside them, found "
            f"{some(sorted(folder.name for folder in folders))}"
        )


def _split_in(name: str) -> str | None:
    """Which split a folder is called like: `test1`, `val_set`, `Training data`."""
    words = {word for word in re.split(r"[\W\d_]+|(?<=[a-z])(?=set$|data$)", name.lower()) if word}
    telling = words - _BESIDE_A_SPLIT
    return telling.pop() if len(telling) == 1 and telling <= _LIKE_A_SPLIT else None


def _classes(folders: Sequence[Path]) -> tuple[str, ...]:
    first, *others = folders
    names = {folder.name for folder in _subfolders(first)}
    if len(names) < 2:
        found = f"only '{next(iter(names))}'" if names else "none"
        raise DataError(f"{first}: wanted at least 2 class folders with images in them, found {found}")
    for name in sorted(names):
        try:
            name.encode()
        except UnicodeEncodeError:
            raise DataError(
                f"{first}: the name of class folder {name!a} is not UTF-8, and it would stand in the files "
                "that ship; rename it"
            ) from None
    for other in others:
        differing = names ^ {folder.name for folder in _subfolders(other)}
        if differing:
            raise DataError(
                f"{other}: wanted the same class folders as in {first}, but these are in one of them only: "
                f"{some(sorted(differing))}"
            )
    return tuple(sorted(names))


def _subfolders(folder: Path) -> list[Path]:
    return [entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")]


def _images_below(folder: Path, above: tuple[str, ...]) -> tuple[list[_File], int]:
    """Image files at any depth in sorted order, and how many other files there are. Links to folders are
    not followed; what is hidden (thumbnails, checkpoints of notebooks) is not looked at."""
    images: list[_File] = []
    num_ignored = 0
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                if not entry.is_symlink():
                    deeper, ignored = _images_below(Path(entry.path), (*above, entry.name))
                    images += deeper
                    num_ignored += ignored
            elif os.path.splitext(entry.name)[1].lower() in _SUFFIXES:
                status = entry.stat()
                images.append(_File((*above, entry.name), status.st_size, status.st_mtime_ns))
            else:
                num_ignored += 1
    return sorted(images), num_ignored


# ---------------------------------------------------------------------------------------------------- headers


class Headers(NamedTuple):
    """Of N files: stored width and height in pixels, whether there is no colour, a hash of the first 4
    KiB."""

    width_N: IntArray
    height_N: IntArray
    grey_N: NDArray[np.bool_]
    head_N: NDArray[np.uint64]

    @property
    def area_N(self) -> IntArray:
        return self.width_N * self.height_N

    @classmethod
    def empty(cls, num_files: int) -> Headers:
        sizes = np.zeros((2, num_files), np.int64)
        return cls(sizes[0], sizes[1], np.zeros(num_files, np.bool_), np.zeros(num_files, np.uint64))

    def put(self, indices: IntArray, headers: Sequence[Header]) -> None:
        for array, values in zip(self, zip(*headers, strict=True), strict=True):
            array[indices] = values


Processes = Callable[[], AbstractContextManager[Executor]]


def headers_of(root: Path, files: Files, known: Path, processes: Processes, progress: Progress) -> Headers:
    """From `known`, a file of the cache, as far as files have not changed, else read, and then kept
    there.

    Raises DataError naming the files that cannot be read."""
    headers, is_known_N = _recall(files, known)
    missing = np.flatnonzero(~is_known_N)
    if len(missing):
        read_at_ns = time.time_ns()
        _read_into(headers, missing, root, files, processes, progress)
        _remember(known, files, headers, files.changed_ns_N < read_at_ns - _SETTLED_NS)
    return headers


def _read_into(
    headers: Headers, missing: IntArray, root: Path, files: Files, processes: Processes, progress: Progress
) -> None:
    many = len(missing) >= _FILES_FOR_PROCESSES
    blocks = np.split(missing, range(_FILES_PER_BLOCK, len(missing), _FILES_PER_BLOCK))
    faults = []
    with (
        processes() if many else ThreadPoolExecutor(os.cpu_count()) as executor,
        progress.track("reading image headers", len(missing)) as advance,
    ):
        paths = ([root / files.names[index] for index in block.tolist()] for block in blocks)
        for block, attempts in zip(blocks, map_ahead(executor, read_headers, paths), strict=True):
            faults += attempts.faults
            if not attempts.faults:
                headers.put(block, attempts.results)
            advance(len(block), "")
    refuse(faults, len(files.names), root)


def _recall(files: Files, known: Path) -> tuple[Headers, NDArray[np.bool_]]:
    """What is known of the files, and of which of them it is."""
    headers = Headers.empty(len(files.names))
    is_known_N = np.zeros(len(files.names), np.bool_)
    if not known.exists():
        return headers, is_known_N
    kept = read_arrays(known)
    row_N = _rows_of(files.names, Names(kept["names"], kept["ends"]))
    there = np.flatnonzero(row_N >= 0)
    row = row_N[there]
    same = (kept["size"][row] == files.size_N[there]) & (kept["changed_ns"][row] == files.changed_ns_N[there])
    there, row = there[same], row[same]
    for name, array in headers._asdict().items():
        array[there] = kept[name][row]
    is_known_N[there] = True
    return headers, is_known_N


def _rows_of(wanted: Names, kept: Names) -> IntArray:
    """Where each wanted name stands among the kept ones, or −1."""
    if np.array_equal(wanted.block, kept.block) and np.array_equal(wanted.end_N, kept.end_N):
        return np.arange(len(wanted))
    row_of = {name: row for row, name in enumerate(kept)}
    return np.fromiter((row_of.get(name, -1) for name in wanted), np.int64, len(wanted))


def _remember(known: Path, files: Files, headers: Headers, settled_N: NDArray[np.bool_]) -> None:
    kept = np.flatnonzero(settled_N)
    if not len(kept):
        return
    files = files.take(kept)
    arrays: Arrays = {
        "names": files.names.block,
        "ends": files.names.end_N,
        "size": files.size_N,
        "changed_ns": files.changed_ns_N,
        **{name: array[kept] for name, array in headers._asdict().items()},
    }
    write_arrays(known, arrays)


def listing_digest(files: Files, headers: Headers) -> str:
    """sha256 over the files' names, their sizes in bytes and the hashes of their first 4 KiB: one that
    is added, removed, renamed, moved to another class, or replaced by another image shows. What does not
    is a change beyond the first 4 KiB that leaves the size as it was. Times do not count, so that copies
    of a folder on several machines are the same."""
    digest = hashlib.sha256()
    for array in (files.names.block, files.names.end_N, files.size_N, headers.head_N):
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def each_in_threads(
    work: Callable[[Sequence[Path]], Attempts[None]],
    files: Sequence[Path],
    root: Path,
    label: str,
    progress: Progress,
) -> None:
    """`work` of blocks of the files; DataError names the ones that cannot be read."""
    blocks = [files[start : start + 16] for start in range(0, len(files), 16)]
    faults = []
    with ThreadPoolExecutor(os.cpu_count()) as threads, progress.track(label, len(files)) as advance:
        for block, attempts in zip(blocks, map_ahead(threads, work, blocks), strict=True):
            faults += attempts.faults
            advance(len(block), "")
    refuse(faults, len(files), root)


def map_ahead(
    executor: Executor, work: Callable[[T], Attempts[R]], items: Iterable[T]
) -> Iterator[Attempts[R]]:
    """As `executor.map`, without asking for more than a few dozen items before their turn."""
    waiting: deque[Future[Attempts[R]]] = deque()
    for item in items:
        waiting.append(executor.submit(work, item))
        if len(waiting) >= _BLOCKS_AHEAD:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
