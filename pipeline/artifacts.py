"""The run folder: atomic writes, checked reads, staleness, and the lock. Nobody else writes under exports/.

A record is written last: its presence means that the stage is done. It carries the sha256 of its inputs, so a
file made from inputs that have changed since is reported (StaleArtifact), never used.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import yaml
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from pipeline.errors import CorruptArtifact, RunFolderError, RunLocked, StaleArtifact, StorageError
from pipeline.types import Arrays, Json

SCHEMA = 1
_LOCK = ".lock"


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Content hash of anything that JSON can hold; key order does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sha256_arrays(arrays: Mapping[str, NDArray[Any]]) -> str:
    """Content hash over names, types, shapes and values; the order does not matter."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        value = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {value.dtype.str} {np.shape(arrays[name])} ".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()


# ----------------------------------------------------------------------------------------------- atomic files


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends well, else vanishes."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}{_DRAFT}", suffix=path.suffix)
        os.close(handle)
    except OSError as failure:
        raise _storage_error(path, failure) from None
    draft = Path(name)
    try:
        yield draft
        with draft.open("r+b") as file:  # Windows flushes only what may be written
            os.fsync(file.fileno())
        draft.chmod(0o644)
        draft.replace(path)
    except OSError as failure:
        raise _storage_error(path, failure) from None
    finally:
        draft.unlink(missing_ok=True)


_DRAFT = ".draft-"
"""In the name of what is being written: `.state.npz.draft-k2_x81ab.npz` of `state.npz`."""


def _remove_drafts(folder: Path) -> None:
    """Drafts that nobody is writing any more: the caller has the folder to itself, but for what others may
    have locked in it."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            if not (path / _LOCK).exists():
                _remove_drafts(path)
        elif path.name.startswith(".") and _DRAFT in path.name:
            path.unlink(missing_ok=True)


def _storage_error(path: Path, failure: OSError) -> StorageError:
    if failure.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(
            f"{path}: no space left on the disk; what was finished before is kept: free some space and "
            "run the same command again"
        )
    return StorageError(f"{path}: cannot be written ({failure.strerror or failure})")


def write_bytes(path: Path, content: bytes) -> None:
    with replacing(path) as draft:
        draft.write_bytes(content)


def write_json(path: Path, record: Any) -> None:
    write_bytes(path, (json.dumps(record, indent=2, allow_nan=False) + "\n").encode())


def write_yaml(path: Path, record: Json) -> None:
    write_bytes(path, yaml.safe_dump(record, sort_keys=False, allow_unicode=True).encode())


def write_arrays(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    with replacing(path) as draft, draft.open("wb") as file:
        np.savez(file, allow_pickle=False, **{name: np.asarray(value) for name, value in arrays.items()})


REMAKE = "remove this file and run the same command again to remake it"


def read_json(path: Path, remedy: str = REMAKE) -> Any:
    """Raises RunFolderError where there is none, CorruptArtifact with `remedy` where it is none."""
    return _read(path, lambda: json.loads(path.read_text()), "JSON", remedy)


def read_yaml(path: Path) -> Any:
    return _read(path, lambda: yaml.safe_load(path.read_text()), "YAML")


def read_arrays(path: Path) -> Arrays:
    def load() -> Arrays:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}

    loaded: Arrays = _read(path, load, "a numpy archive")
    return loaded


def _read(path: Path, load: Any, what: str, remedy: str = REMAKE) -> Any:
    try:
        return load()
    except FileNotFoundError:
        raise RunFolderError(f"{path}: not there") from None
    except OSError as failure:
        raise RunFolderError(f"{path}: cannot be read ({failure.strerror or failure})") from None
    except Exception as failure:
        reason = str(failure).splitlines()[0] if str(failure) else type(failure).__name__
        raise CorruptArtifact(f"{path}: is not {what} ({reason}); {remedy}") from None


# ------------------------------------------------------------------------------------------------ checkpoints


class FileCheckpoint:
    """A Checkpoint in one .npz file; the JSON record travels inside it, so the two can never disagree."""

    _RECORD = "__record__"

    def __init__(self, path: Path) -> None:
        self.path = path

    def load(self) -> tuple[Arrays, Json] | None:
        if not self.path.exists():
            return None
        arrays = read_arrays(self.path)
        try:
            record = json.loads(bytes(arrays.pop(self._RECORD)).decode())
        except (KeyError, ValueError):
            raise CorruptArtifact(
                f"{self.path}: is not a checkpoint of this project; remove it to start over"
            ) from None
        return arrays, record

    def save(self, arrays: Mapping[str, NDArray[Any]], record: Json) -> None:
        note = np.frombuffer(json.dumps(record).encode(), dtype=np.uint8)
        write_arrays(self.path, {**arrays, self._RECORD: note})

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------- run folder


@dataclass(frozen=True)
class RunFolder:
    """One run on disk."""

    root: Path

    def path(self, *parts: str | Path) -> Path:
        return self.root.joinpath(*parts)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this process, and rid it of what killed ones were writing; RunLocked when
        another one holds it."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as failure:
            raise _storage_error(self.root, failure) from None
        lock = FileLock(self.root / _LOCK, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise RunLocked(
                f"{self.root}: another process works on this run; wait for it, or choose another --out"
            ) from None
        except OSError as failure:
            raise _storage_error(self.root, failure) from None
        try:
            _remove_drafts(self.root)
            yield
        finally:
            lock.release()

    def write_record(self, path: Path, record: Json, inputs: Mapping[str, str]) -> None:
        """Finish a stage: `inputs` maps what it was made from to a content hash."""
        write_json(path, {"schema": SCHEMA, "inputs": dict(inputs), **record})

    def read_record(self, path: Path, inputs: Mapping[str, str] | None = None) -> Json | None:
        """A finished stage's record, or None when there is none. With `inputs`, hashes must still agree."""
        if not path.exists():
            return None
        record = read_json(path)
        if not isinstance(record, dict) or record.get("schema") != SCHEMA or "inputs" not in record:
            raise CorruptArtifact(f"{path}: is not a record of schema {SCHEMA}; remove it to remake it")
        if inputs is not None:
            changed = sorted(name for name, digest in inputs.items() if record["inputs"].get(name) != digest)
            if changed:
                raise StaleArtifact(
                    f"{path}: was made from another {' and '.join(changed)} than there is now; "
                    "remove it (and what stands below it) to remake it, or choose another --out"
                )
        return record


def inside(root: Path, relative: str) -> Path:
    """`root/relative`, refusing absolute paths and any that leave `root`."""
    pure = PurePosixPath(relative)
    if pure.is_absolute() or ".." in pure.parts or not pure.parts or {"\\", "\0"} & set(relative):
        raise CorruptArtifact(
            f"path {relative!r} leaves the run folder; the file that names it cannot be trusted"
        )
    path = (root / pure).resolve()
    if not path.is_relative_to(root.resolve()):
        raise CorruptArtifact(f"path {relative!r} leaves the run folder through a link")
    return path
