"""The catalogue, and the named data sets: digits, Fashion-MNIST, CIFAR-10."""

from __future__ import annotations

import gzip
import pickle
import struct
import subprocess
import sys
import urllib.error
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torchvision.datasets.utils

from pipeline.data import DATA, cache_folder, cifar, load_task
from pipeline.data.base import ImageTask
from pipeline.data.fashion_mnist import read_idx
from pipeline.errors import ConfigError, DataError, StorageError


@pytest.fixture(params=sorted(DATA))
def any_task(
    request: pytest.FixtureRequest, make_folder: Callable[..., Path], real_data: Callable[[str], Path]
) -> ImageTask:
    """The task of every data set in the catalogue; a new one needs a line here only if it needs files."""
    needs = {"cifar10": "cifar-10-batches-bin", "fashion-mnist": "FashionMNIST/raw"}
    if request.param in needs:
        real_data(needs[request.param])
    spec = f"image-folder:{make_folder()}" if request.param == "image-folder" else request.param
    return load_task(spec, seed=1)


def test_every_data_set_has_three_disjoint_stratified_splits(any_task: ImageTask) -> None:
    splits = any_task.splits
    assert set(splits) == {"weights", "architecture", "test"}
    joined = np.concatenate(list(splits.values()))
    assert len(joined) == len(np.unique(joined))
    labels = any_task.source.labels
    sizes = np.array(
        [np.bincount(labels[indices], minlength=len(any_task.classes)) for indices in splits.values()]
    )
    shares = sizes / sizes.sum(axis=1, keepdims=True)
    assert np.ptp(shares, axis=0).max() < 0.01


def test_every_data_set_is_consistent(any_task: ImageTask) -> None:
    channels, height, width = any_task.image_shape
    pixels = any_task.source.read(np.array([0, 1]))
    assert pixels.shape == (2, height, width, channels) and pixels.dtype == np.uint8
    assert len(any_task.mean) == len(any_task.std) == channels
    assert any_task.source.labels.max() == len(any_task.classes) - 1
    assert len(any_task.fingerprint) == 64


def test_the_catalogue_imports_nothing_heavy() -> None:
    code = "import pipeline.data, sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "pipeline.data" in loaded.split()
    assert not {"torch", "torchvision", "sklearn", "PIL", "matplotlib"} & set(loaded.split())


def test_unknown_names_and_settings_are_explained() -> None:
    with pytest.raises(ConfigError, match="unknown data set 'digit' .did you mean 'digits'"):
        load_task("digit", seed=0)
    with pytest.raises(ConfigError, match="unknown key 'imagesize'"):
        load_task("digits", seed=0, settings={"imagesize": 8})
    with pytest.raises(ConfigError, match="'architecture_share' is 1.5"):
        load_task("digits", seed=0, settings={"architecture_share": 1.5})
    with pytest.raises(ConfigError, match="take no path"):
        load_task("digits:/tmp", seed=0)


def test_cache_folder_follows_the_environment() -> None:
    assert cache_folder({"BUDGETLINE_CACHE": "/data"}) == Path("/data")
    assert cache_folder({}) == Path.home() / ".cache" / "budgetline"


# ------------------------------------------------------------------------------------------------- digits


def test_digits() -> None:
    task = load_task("digits", seed=0)
    assert task.image_shape == (1, 8, 8) and len(task.classes) == 10
    assert (task.flip, task.crop_padding) == (False, 1)
    assert {name: len(indices) for name, indices in task.splits.items()} == {
        "test": 359,
        "architecture": 287,
        "weights": 1151,
    }
    values = np.unique(task.source.read(np.arange(1797)))
    assert values.tolist() == [round(value * 255 / 16) for value in range(17)]
    assert task.fingerprint == load_task("digits", seed=99).fingerprint


def test_settings_reach_the_task() -> None:
    settings = {"architecture_share": 0.5, "limit": 100, "flip": True, "crop_padding": 0}
    task = load_task("digits", seed=0, settings=settings)
    assert (len(task.splits["weights"]), len(task.splits["architecture"])) == (50, 50)
    assert (task.flip, task.crop_padding) == (True, 0)
    assert task.fingerprint != load_task("digits", seed=1, settings=settings).fingerprint


# ------------------------------------------------------------------------------------------ Fashion-MNIST


def write_idx(path: Path, values: np.ndarray) -> None:
    content = struct.pack(">BBBB", 0, 0, 8, values.ndim) + struct.pack(f">{values.ndim}I", *values.shape)
    content += values.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content, 1) if path.suffix == ".gz" else content)


@pytest.fixture
def small_fashion_mnist(tmp_path: Path) -> Path:
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, number, suffix in (("train", 60, ".gz"), ("t10k", 20, "")):
        write_idx(raw / f"{part}-images-idx3-ubyte{suffix}", rng.integers(0, 256, (number, 28, 28)))
        write_idx(raw / f"{part}-labels-idx1-ubyte{suffix}", np.arange(number) % 10)
    return tmp_path


def test_fashion_mnist_reads_packed_and_unpacked(small_fashion_mnist: Path) -> None:
    task = load_task(f"fashion-mnist:{small_fashion_mnist}", seed=0)
    assert task.image_shape == (1, 28, 28) and (task.flip, task.crop_padding) == (True, 2)
    assert task.splits["test"].tolist() == list(range(60, 80))
    again = load_task(f"fashion-mnist:{small_fashion_mnist / 'FashionMNIST' / 'raw'}", seed=0)
    assert again.fingerprint == task.fingerprint


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte.gz", "t10k-images-idx3-ubyte"])
def test_a_truncated_file_is_named(small_fashion_mnist: Path, name: str) -> None:
    file = small_fashion_mnist / "FashionMNIST" / "raw" / name
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DataError, match=rf"{name}: .*truncated or damaged"):
        load_task(f"fashion-mnist:{small_fashion_mnist}", seed=0)


def test_a_file_of_another_kind_is_named(tmp_path: Path) -> None:
    file = tmp_path / "labels"
    write_idx(file, np.zeros((2, 3)))
    with pytest.raises(DataError, match="labels: wanted an idx file of bytes with 1 dimensions.*00 00 08 02"):
        read_idx(file, 1)
    file.write_bytes(b"\0\0\x08\x01\0")
    with pytest.raises(DataError, match="labels: wanted an idx file.*got 5 bytes"):
        read_idx(file, 1)


def test_labels_out_of_range_and_unequal_counts_are_refused(small_fashion_mnist: Path) -> None:
    raw = small_fashion_mnist / "FashionMNIST" / "raw"
    write_idx(raw / "t10k-labels-idx1-ubyte", np.full(20, 10))
    with pytest.raises(DataError, match="t10k-labels-idx1-ubyte: wanted labels 0 to 9, got 10"):
        load_task(f"fashion-mnist:{small_fashion_mnist}", seed=0)
    write_idx(raw / "t10k-labels-idx1-ubyte", np.zeros(19))
    with pytest.raises(DataError, match="each of the 19 labels .*, got 20 images of 28×28"):
        load_task(f"fashion-mnist:{small_fashion_mnist}", seed=0)


def test_real_fashion_mnist(real_fashion_mnist: Path) -> None:
    task = load_task(f"fashion-mnist:{real_fashion_mnist}", seed=0)
    assert {name: len(indices) for name, indices in task.splits.items()} == {
        "weights": 54_000,
        "architecture": 6_000,
        "test": 10_000,
    }
    # The training images' published mean and deviation are 0.2860 and 0.3530.
    assert (task.mean[0], task.std[0]) == (pytest.approx(0.286, abs=1e-3), pytest.approx(0.353, abs=1e-3))
    assert [task.classes[label] for label in task.source.labels[:3]] == [
        "Ankle boot",
        "T-shirt/top",
        "T-shirt/top",
    ]


# ----------------------------------------------------------------------------------------------- downloads


def no_network(url: str, *_: object) -> None:
    raise urllib.error.URLError("no route")


def test_without_a_network_the_message_says_what_to_put_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torchvision.datasets.utils, "download_url", no_network)
    with pytest.raises(
        DataError, match=r"put train-images-idx3-ubyte.gz, .* into .*FashionMNIST/raw"
    ) as fault:
        load_task(f"fashion-mnist:{tmp_path}", seed=0)
    assert "no route" in str(fault.value)
    with pytest.raises(
        DataError, match=r"cifar-10-binary.tar.gz in .*, or name the folder that has cifar-10-batches"
    ):
        load_task(f"cifar10:{tmp_path}", seed=0)
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]


@pytest.mark.parametrize("name", ["cifar10", "fashion-mnist"])
def test_nothing_is_downloaded_to_a_folder_that_is_not_there(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torchvision.datasets.utils, "download_url", lambda *_: pytest.fail("downloaded"))
    with pytest.raises(
        DataError, match=rf"{tmp_path}/typo: wanted a folder that has {name}, .* say {name} alone"
    ):
        load_task(f"{name}:{tmp_path / 'typo'}", seed=0)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_a_storage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torchvision.datasets.utils, "download_url", full)
    with pytest.raises(StorageError, match="no space left"):
        load_task(f"cifar10:{tmp_path}", seed=0)


def test_only_missing_files_of_fashion_mnist_are_downloaded(
    small_fashion_mnist: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = small_fashion_mnist / "FashionMNIST" / "raw"
    kept = (raw / "train-labels-idx1-ubyte.gz").read_bytes()
    (raw / "train-labels-idx1-ubyte.gz").unlink()
    asked: list[tuple[str, str]] = []

    def download(url: str, folder: str, name: str, md5: str) -> None:
        asked.append((name, md5))
        Path(folder, name).write_bytes(kept)

    monkeypatch.setattr(torchvision.datasets.utils, "download_url", download)
    load_task(f"fashion-mnist:{small_fashion_mnist}", seed=0)
    assert asked == [("train-labels-idx1-ubyte.gz", "25c81989df183df01b3e8a0aad5dffbe")]
    assert not list(raw.glob(".download-*"))


# ------------------------------------------------------------------------------------------------- CIFAR-10


def make_records(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    labels = np.arange(cifar.IMAGES_PER_BATCH) % 10
    pixels = rng.integers(0, 256, (cifar.IMAGES_PER_BATCH, 3072))
    return np.concatenate([labels[:, None], pixels], axis=1).astype(np.uint8)


def python_two_pickle(records: np.ndarray) -> bytes:
    """What Python 2 wrote (protocol 2) for {'labels': [...], 'data': uint8 array}."""

    def text(value: bytes) -> bytes:
        return b"U" + bytes([len(value)]) + value

    labels = b"](" + b"".join(b"K" + bytes([label]) for label in records[:, 0]) + b"e"
    pixels = records[:, 1:].tobytes()
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85" + text(b"b") + b"\x87R("
    array += b"K\x01M" + struct.pack("<H", len(records)) + b"M\0\x0c\x86cnumpy\ndtype\n" + text(b"u1")
    array += b"K\0K\x01\x87R(K\x03" + text(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"
    array += b"\x89T" + struct.pack("<I", len(pixels)) + pixels + b"tb"
    return b"\x80\x02}(" + text(b"labels") + labels + text(b"data") + array + b"u."


@pytest.fixture
def small_cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cifar, "IMAGES_PER_BATCH", 40)
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for seed, batch in enumerate(cifar.BATCH_MD5):
        make_records(seed).tofile(folder / f"{batch}.bin")
    return tmp_path


def test_cifar10_pixels_are_planes_of_rows(small_cifar10: Path) -> None:
    task = load_task(f"cifar10:{small_cifar10}", seed=0)
    assert task.image_shape == (3, 32, 32) and (task.flip, task.crop_padding) == (True, 4)
    assert task.splits["test"].tolist() == list(range(200, 240))
    record = make_records(1)[7]
    image = task.source.read(np.array([47]))[0]
    assert (image[2, 5] == [record[1 + plane * 1024 + 2 * 32 + 5] for plane in range(3)]).all()
    assert (
        load_task(f"cifar10:{small_cifar10 / 'cifar-10-batches-bin'}", seed=0).fingerprint == task.fingerprint
    )


def test_a_truncated_batch_is_named(small_cifar10: Path) -> None:
    file = small_cifar10 / "cifar-10-batches-bin" / "data_batch_3.bin"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"data_batch_3.bin: wanted 122920 bytes .40 images., got 122919"):
        load_task(f"cifar10:{small_cifar10}", seed=0)


def test_a_wrong_label_is_named(small_cifar10: Path) -> None:
    file = small_cifar10 / "cifar-10-batches-bin" / "test_batch.bin"
    file.write_bytes(b"\x0a" + file.read_bytes()[1:])
    with pytest.raises(DataError, match="test_batch.bin: wanted labels 0 to 9, got 10"):
        load_task(f"cifar10:{small_cifar10}", seed=0)


def test_real_cifar10(real_cifar10: Path) -> None:
    task = load_task(f"cifar10:{real_cifar10}", seed=0)
    assert {name: len(indices) for name, indices in task.splits.items()} == {
        "weights": 45_000,
        "architecture": 5_000,
        "test": 10_000,
    }
    # The training images' published means and deviations.
    assert task.mean == pytest.approx((0.4914, 0.4822, 0.4465), abs=1e-3)
    assert task.std == pytest.approx((0.2470, 0.2435, 0.2616), abs=1e-3)
    assert [task.classes[label] for label in task.source.labels[:3]] == ["frog", "truck", "truck"]


def test_real_python_layout_gives_the_same_records_without_unpickling(
    real_cifar10: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = cifar.read_binary_batch(real_cifar10 / "cifar-10-batches-bin" / "test_batch.bin")
    file = tmp_path / "test_batch"
    file.write_bytes(python_two_pickle(records))

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a pickle was loaded")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    assert np.array_equal(cifar.read_python_batch(file), records)
    file.rename(tmp_path / "data_batch_1")
    with pytest.raises(DataError, match="data_batch_1: its images do not have CIFAR-10's published md5"):
        cifar.read_python_batch(tmp_path / "data_batch_1")


def test_the_python_layout_is_found(small_cifar10: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hashlib

    wanted = load_task(f"cifar10:{small_cifar10}", seed=0).fingerprint
    folder = small_cifar10 / "cifar-10-batches-py"
    folder.mkdir()
    for seed, batch in enumerate(list(cifar.BATCH_MD5)):
        records = make_records(seed)
        (folder / batch).write_bytes(python_two_pickle(records))
        monkeypatch.setitem(cifar.BATCH_MD5, batch, hashlib.md5(records.tobytes()).hexdigest())
        (small_cifar10 / "cifar-10-batches-bin" / f"{batch}.bin").unlink()
    assert load_task(f"cifar10:{small_cifar10}", seed=0).fingerprint == wanted


class Attack:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("raise SystemExit('the pickle ran')",))


def test_a_hostile_pickle_is_refused_and_does_not_run(tmp_path: Path) -> None:
    file = tmp_path / "data_batch_1"
    for content in (pickle.dumps(Attack()), b"", b"not a pickle", b"\x80\x02T\xff\xff\xff\x7f"):
        file.write_bytes(content)
        with pytest.raises(DataError, match="data_batch_1: is not a batch of CIFAR-10"):
            cifar.read_python_batch(file)


def test_the_made_python_two_pickle_is_a_faithful_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader's other tests stand on it, so Python itself must read it as those arrays."""
    monkeypatch.setattr(cifar, "IMAGES_PER_BATCH", 40)
    records = make_records(0)
    loaded = pickle.loads(python_two_pickle(records), encoding="bytes")
    assert loaded[b"labels"] == records[:, 0].tolist()
    assert np.array_equal(loaded[b"data"], records[:, 1:])


def test_cifar10_is_unpacked_from_the_published_archive(
    small_cifar10: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tarfile

    def download(url: str, folder: str, name: str, md5: str) -> None:
        assert (url, md5) == (cifar.URL, "c32a1d4ab5d03f1284b67883e8d87530")
        with tarfile.open(Path(folder, name), "w:gz") as archive:
            archive.add(small_cifar10 / "cifar-10-batches-bin", "cifar-10-batches-bin")

    monkeypatch.setattr(torchvision.datasets.utils, "download_url", download)
    fresh = tmp_path_factory.mktemp("fresh") / "not" / "there"
    monkeypatch.setenv("BUDGETLINE_CACHE", str(fresh))
    task = load_task("cifar10", seed=0)
    assert task.fingerprint == load_task(f"cifar10:{small_cifar10}", seed=0).fingerprint
    assert [entry.name for entry in fresh.iterdir()] == ["cifar-10-batches-bin"]
