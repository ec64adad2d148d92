"""Files are found once, opened once, and known again; what a fingerprint sees, and what it does not."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data import decode, listing
from pipeline.data.listing import Files, Headers, Names
from pipeline.errors import DataError
from pipeline.progress import Silent

MakeFolder = Callable[..., Path]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files whose headers were read."""
    names: list[str] = []
    read = decode.read_header

    def watched(file: Path) -> decode.Header:
        names.append(file.name)
        return read(file)

    monkeypatch.setattr(decode, "read_header", watched)
    return names


def age(folder: Path) -> None:
    """Make all files older than what could still be changing."""
    for file in folder.rglob("*.*"):
        os.utime(file, (1e9, 1e9))


def headers(folder: Path, known: Path) -> tuple[Files, Headers]:
    files = listing.scan(folder).files
    return files, listing.headers_of(folder, files, known, lambda: ThreadPoolExecutor(1), Silent())


def digest(folder: Path, known: Path) -> str:
    return listing.listing_digest(*headers(folder, known))


def test_names_are_a_sequence() -> None:
    names = ["a.png", "", "größe.jpg", os.fsdecode(b"\xff.png"), "b"]
    packed = Names.of(names)
    assert list(packed) == names and len(packed) == 5 and packed[2] == "größe.jpg"
    assert list(Names.of([])) == []
    assert list(Names.joined([packed, Names.of([]), Names.of(["x", "yz"])])) == [*names, "x", "yz"]


def test_files_can_be_taken() -> None:
    files = Files(Names.of(["a", "bb", "ccc"]), np.array([1, 2, 3]), np.array([4, 5, 6]))
    taken = files.take(np.array([2, 0]))
    assert list(taken.names) == ["ccc", "a"]
    assert taken.size_N.tolist() == [3, 1] and taken.changed_ns_N.tolist() == [6, 4]
    assert files.take(np.arange(3)) is files


def test_files_are_sorted_by_their_parts_and_measured(make_folder: MakeFolder) -> None:
    folder = make_folder(per_class=3)
    (folder / "cat" / "1").mkdir()
    (folder / "cat" / "0.png").rename(folder / "cat" / "1" / "z.png")
    files = listing.scan(folder).files
    assert list(files.names)[:3] == ["cat/1/z.png", "cat/1.png", "cat/2.png"]
    assert files.size_N.tolist() == [(folder / name).stat().st_size for name in files.names]


@pytest.mark.parametrize(
    "parts",
    [
        ("training", "validation", "testing"),
        ("train", "dev", "test"),
        ("Train", "Val"),
        ("train", "test", "notes"),
    ],
    ids=",".join,
)
def test_splits_under_other_names_are_not_taken_for_classes(
    make_folder: MakeFolder, parts: tuple[str, ...]
) -> None:
    root = make_folder(parts=parts)
    with pytest.raises(
        DataError, match=r"the same folders in them \(cat, dog\).*wanted 'train', 'val' and 'test'"
    ):
        listing.scan(root)


@pytest.mark.parametrize("beside", ["test1", "val_set", "Test Images", "testset"])
def test_images_to_be_guessed_beside_classes_are_no_class(make_folder: MakeFolder, beside: str) -> None:
    root = make_folder(parts=("train",))
    shutil.copytree(root / "train" / "cat", root / beside)
    with pytest.raises(DataError, match=r"one has folders in it \(cat, dog\), as splits have; wanted"):
        listing.scan(root)
    shutil.rmtree(root / beside)
    shutil.copytree(root / "train", root / beside)
    with pytest.raises(DataError, match=r"the same folders in them \(cat, dog\)"):
        listing.scan(root)


def test_a_class_may_be_called_like_a_split_and_classes_may_have_the_same_folders(
    make_folder: MakeFolder,
) -> None:
    root = make_folder(classes=("bus", "train", "test"))
    assert listing.scan(root).classes == ("bus", "test", "train")
    numbered = (
        make_folder(classes=("left", "right"), parts=("numbered/Test 1", "numbered/Test 2")) / "numbered"
    )
    assert listing.scan(numbered).classes == ("Test 1", "Test 2")
    years = make_folder(classes=("2019", "2020"), parts=("deep/owl", "deep/train")) / "deep"
    assert listing.scan(years).classes == ("owl", "train")


def test_train_alone_is_to_be_divided(make_folder: MakeFolder) -> None:
    found = listing.scan(make_folder(parts=("train",)))
    assert found.classes == ("cat", "dog") and not found.given


def test_a_file_is_opened_once(make_folder: MakeFolder, tmp_path: Path, opened: list[str]) -> None:
    folder, known = make_folder(size=(12, 9)), tmp_path / "known.npz"
    age(folder)
    _, first = headers(folder, known)
    assert len(opened) == 10
    assert first.width_N.tolist() == [12] * 10 and first.height_N.tolist() == [9] * 10
    assert not first.grey_N.any() and len(set(first.head_N.tolist())) == 10
    _, again = headers(folder, known)
    assert len(opened) == 10
    for one, other in zip(first, again, strict=True):
        assert np.array_equal(one, other)


def test_what_is_new_or_changed_is_opened_again(
    make_folder: MakeFolder, tmp_path: Path, opened: list[str]
) -> None:
    folder, known = make_folder(), tmp_path / "known.npz"
    age(folder)
    headers(folder, known)
    opened.clear()
    Image.new("L", (5, 5)).save(folder / "cat" / "new.png")
    (folder / "dog" / "0.png").unlink()
    os.utime(folder / "dog" / "3.png", (1e9 + 1, 1e9 + 1))
    files, found = headers(folder, known)
    assert sorted(opened) == ["3.png", "new.png"]
    new = list(files.names).index("cat/new.png")
    assert (found.width_N[new], found.grey_N[new]) == (5, True)


def test_a_file_changed_a_moment_ago_is_not_trusted(
    make_folder: MakeFolder, tmp_path: Path, opened: list[str]
) -> None:
    """A second change within the clock's tick would leave size and time as they are."""
    folder, known = make_folder(), tmp_path / "known.npz"
    age(folder)
    os.utime(folder / "cat" / "0.png")
    headers(folder, known)
    opened.clear()
    headers(folder, known)
    assert opened == ["0.png"]


def test_the_digest_sees_names_sizes_and_beginnings(make_folder: MakeFolder, tmp_path: Path) -> None:
    folder = make_folder()
    digests = [digest(folder, tmp_path / "0.npz")]

    def changed(number: int) -> str:
        digests.append(digest(folder, tmp_path / f"{number}.npz"))
        return digests[-1]

    for number, file in enumerate(folder.rglob("*.png")):
        os.utime(file, (number, number))
    assert changed(1) == digests[0], "times do not count"
    (folder / "cat" / "0.png").rename(folder / "cat" / "00.png")
    changed(2)
    with (folder / "cat" / "1.png").open("ab") as file:
        file.write(b"\0")
    changed(3)
    content = bytearray((folder / "cat" / "2.png").read_bytes())
    content[-30] ^= 1  # no larger than 4 KiB: all of it counts
    (folder / "cat" / "2.png").write_bytes(content)
    changed(4)
    (folder / "cat" / "3.png").rename(folder / "dog" / "3b.png")
    changed(5)
    assert len(set(digests)) == 5


def test_the_digest_does_not_see_beyond_the_first_4_kib(make_folder: MakeFolder, tmp_path: Path) -> None:
    """What a cheap fingerprint costs, written down."""
    folder = make_folder(size=(64, 64))
    before = digest(folder, tmp_path / "a.npz")
    file = folder / "cat" / "0.png"
    content = bytearray(file.read_bytes())
    assert len(content) > 6000
    content[5000] ^= 1
    file.write_bytes(content)
    assert digest(folder, tmp_path / "b.npz") == before
    content[4000] ^= 1
    file.write_bytes(content)
    assert digest(folder, tmp_path / "c.npz") != before


def test_many_files_are_read_by_processes(
    make_folder: MakeFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "_FILES_FOR_PROCESSES", 10)
    monkeypatch.setattr(listing, "_FILES_PER_BLOCK", 3)
    folder = make_folder()
    files = listing.scan(folder).files
    started = []

    def processes() -> ThreadPoolExecutor:
        started.append(1)
        return ThreadPoolExecutor(2)

    found = listing.headers_of(folder, files, tmp_path / "known.npz", processes, Silent())
    assert started == [1] and found.width_N.tolist() == [12] * 10
