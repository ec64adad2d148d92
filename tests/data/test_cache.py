"""Decoded images on disk: found again, never mistaken, and never more than the limit."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.cache import Rows, read_row, reserve_rows, write_row
from pipeline.errors import StorageError

SHAPES = ((4, 6, 3), (2, 2, 3), (5, 3, 3))
BYTES = np.array([height * width * channels for height, width, channels in SHAPES])


def pixels(index: int) -> np.ndarray:
    return np.random.default_rng(index).integers(0, 256, SHAPES[index], dtype=np.uint8)


def reserved(folder: Path, key: str = "a", limit: int = 10**6) -> Rows:
    rows = reserve_rows(folder, key, BYTES, np.array([2, 0, 1]), limit)
    assert rows is not None
    return rows


def test_rows_are_read_back_and_there_only_once_written(tmp_path: Path) -> None:
    rows = reserved(tmp_path)
    for index in (0, 2):
        place = rows.place(index)
        assert place is not None and read_row(place, 3) is None
        write_row(place, pixels(index))
    for index in (0, 2):
        place = rows.place(index)
        assert place is not None
        assert np.array_equal(read_row(place, 3), pixels(index))
    place = rows.place(1)
    assert place is not None and read_row(place, 3) is None


def test_another_process_finds_them_and_the_file_is_not_made_again(tmp_path: Path) -> None:
    place = reserved(tmp_path).place(0)
    assert place is not None
    write_row(place, pixels(0))
    again = reserved(tmp_path).place(0)
    assert again == place and np.array_equal(read_row(again, 3), pixels(0))


def test_a_torn_row_is_not_there(tmp_path: Path) -> None:
    place = reserved(tmp_path).place(0)
    assert place is not None
    write_row(place, pixels(0))
    for byte in (0, 5, 12, 12 + place.num_bytes - 1):
        with place.path.open("r+b") as file:
            file.seek(place.offset + byte)
            (value,) = file.read(1)
            file.seek(place.offset + byte)
            file.write(bytes([value ^ 1]))
        assert read_row(place, 3) is None
        write_row(place, pixels(0))
        assert read_row(place, 3) is not None


def test_the_limit_keeps_the_first_in_order(tmp_path: Path) -> None:
    rows = reserved(tmp_path, limit=int(BYTES[2] + BYTES[0]) + 24)
    assert rows.place(2) is not None and rows.place(0) is not None and rows.place(1) is None
    assert rows.path.stat().st_size == BYTES[2] + BYTES[0] + 24
    assert reserve_rows(tmp_path, "b", BYTES, np.arange(3), 50) is None
    assert reserve_rows(tmp_path, "b", BYTES, np.arange(3), 0) is None


def test_files_used_longest_ago_make_room(tmp_path: Path) -> None:
    size = int(BYTES.sum()) + 36
    for age, key in ((300, "old"), (200, "older used"), (100, "new")):
        path = reserved(tmp_path, key, 10**6).path
        os.utime(path, (1e9 - age, 1e9 - age))
    reserved(tmp_path, "old")  # used again: the youngest now
    reserved(tmp_path, "another", limit=3 * size)
    assert sorted(path.stem for path in tmp_path.glob("*.decoded")) == ["another", "new", "old"]


def test_an_image_of_another_size_than_its_header_said_is_not_kept(tmp_path: Path) -> None:
    place = reserved(tmp_path).place(0)
    assert place is not None
    write_row(place, pixels(1))
    assert read_row(place, 3) is None


def test_a_disk_without_room_is_found_out_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StorageError, match="no space left"):
        reserved(tmp_path)
    assert not list(tmp_path.glob("*.decoded"))


def test_a_disk_that_fills_up_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = reserved(tmp_path).place(0)
    assert place is not None

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StorageError, match=r"set data\.cache to less"):
        write_row(place, pixels(0))
