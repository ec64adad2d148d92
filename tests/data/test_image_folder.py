from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from PIL import Image

from pipeline.data import load_task
from pipeline.data.base import ImageTask
from pipeline.errors import ConfigError, DataError

MakeFolder = Callable[..., Path]


def load(folder: Path, **settings: object) -> ImageTask:
    return load_task(f"image-folder:{folder}", seed=0, settings=settings)


def everything(task: ImageTask) -> np.ndarray:
    return task.source.read(np.arange(len(task.source.labels)))


def test_pixels_labels_and_classes(make_folder: MakeFolder) -> None:
    folder = make_folder()
    task = load(folder)
    assert task.classes == ("cat", "dog") and task.image_shape == (3, 12, 12)
    assert task.source.labels.tolist() == [0] * 5 + [1] * 5
    assert np.array_equal(everything(task)[6], np.asarray(Image.open(folder / "dog" / "1.png")))
    assert (task.flip, task.crop_padding, task.name) == (True, 1, f"image-folder:{folder}")
    assert load(folder).fingerprint == task.fingerprint


def test_grey_folders_keep_one_channel_and_one_colour_image_makes_three(make_folder: MakeFolder) -> None:
    folder = make_folder(mode="L")
    assert load(folder).image_shape == (1, 12, 12)
    Image.new("RGB", (12, 12), (255, 0, 0)).save(folder / "cat" / "0.png")
    task = load(folder)
    assert task.image_shape == (3, 12, 12)
    assert everything(task)[0, 0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    ("image", "suffix", "value"),
    [
        (Image.new("RGBA", (12, 12), (10, 20, 30, 0)), ".png", [10, 20, 30]),
        (Image.new("RGB", (12, 12), (10, 20, 30)).quantize(4), ".gif", [10, 20, 30]),
        (Image.new("LA", (12, 12), (40, 255)), ".png", [40, 40, 40]),
        (Image.new("1", (12, 12), 1), ".png", [255, 255, 255]),
        (Image.new("CMYK", (12, 12), (0, 0, 0, 255)), ".tif", [0, 0, 0]),
        (Image.fromarray(np.full((12, 12), 200 * 256 + 77, np.uint16)), ".png", [200, 200, 200]),
        (Image.fromarray(np.full((12, 12), 200 * 256 + 77, np.int32)), ".tif", [200, 200, 200]),
    ],
)
def test_every_pixel_format_becomes_one(
    make_folder: MakeFolder, image: Image.Image, suffix: str, value: list[int]
) -> None:
    folder = make_folder()
    (folder / "cat" / "0.png").unlink()
    image.save(folder / "cat" / f"0{suffix}")
    assert (everything(load(folder))[0] == value).all()


def test_a_transparent_palette_is_read_without_a_warning(make_folder: MakeFolder) -> None:
    folder = make_folder()
    image = Image.new("P", (12, 12), 1)
    image.putpalette([0, 0, 0, 9, 8, 7])
    image.save(folder / "cat" / "0.png", transparency=b"\x00\xff")
    assert (everything(load(folder))[0] == [9, 8, 7]).all()


def test_sixteen_bit_grey_alone_stays_grey(make_folder: MakeFolder) -> None:
    folder = make_folder(mode="L")
    Image.fromarray(np.full((12, 12), 65535, np.uint16)).save(folder / "cat" / "0.png")
    task = load(folder)
    assert task.image_shape == (1, 12, 12) and (everything(task)[0] == 255).all()


def test_mixed_sizes_need_image_size(make_folder: MakeFolder) -> None:
    folder = make_folder()
    Image.new("RGB", (40, 20)).save(folder / "cat" / "0.png")
    with pytest.raises(
        DataError, match=r"2 different sizes .most often 12×12, 9 of 10.; set data.image_size"
    ):
        load(folder)
    assert load(folder, image_size=16).image_shape == (3, 16, 16)


def test_image_size_cuts_the_centre(make_folder: MakeFolder) -> None:
    folder = make_folder()
    stripes = np.zeros((16, 48, 3), np.uint8)
    stripes[:, 16:32] = 200
    Image.fromarray(stripes).save(folder / "cat" / "0.png")
    assert (everything(load(folder, image_size=16))[0] == 200).all()
    assert (everything(load(folder, image_size=8))[0, :, 1:-1] == 200).all()


def test_the_exif_orientation_is_applied(make_folder: MakeFolder) -> None:
    folder = make_folder()
    halves = np.zeros((12, 12, 3), np.uint8)
    halves[:6] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise: the bright top becomes the right side
    Image.fromarray(halves).save(folder / "cat" / "0.png", exif=exif)
    image = everything(load(folder))[0]
    assert (image[:, 6:] == 255).all() and (image[:, :6] == 0).all()


def test_large_jpegs_are_reduced(make_folder: MakeFolder) -> None:
    folder = make_folder()
    Image.new("RGB", (400, 300), (250, 120, 10)).save(folder / "cat" / "0.jpg")
    image = everything(load(folder, image_size=16))[0]
    assert np.abs(image.astype(int) - [250, 120, 10]).max() <= 3


def test_oblong_images_need_image_size(make_folder: MakeFolder) -> None:
    with pytest.raises(DataError, match="images are 20×12, but networks take squares; set data.image_size"):
        load(make_folder(size=(20, 12)))


@pytest.mark.parametrize("held", ["test", "val"])
def test_train_and_test_folders(make_folder: MakeFolder, held: str) -> None:
    task = load(make_folder(parts=("train", held)), architecture_share=0.4)
    labels = task.source.labels
    assert {name: np.bincount(labels[indices]).tolist() for name, indices in task.splits.items()} == {
        "test": [5, 5],
        "architecture": [2, 2],
        "weights": [3, 3],
    }
    with pytest.raises(ConfigError, match="own folder for the test split, so 'test_share' has no effect"):
        load(Path(task.name.partition(":")[2]), test_share=0.3)


def test_train_val_and_test_folders(make_folder: MakeFolder) -> None:
    folder = make_folder(parts=("train", "valid", "test"))
    task = load(folder)
    assert all(
        np.bincount(task.source.labels[indices]).tolist() == [5, 5] for indices in task.splits.values()
    )
    first = everything(task)[task.splits["architecture"][0]]
    assert np.array_equal(first, np.asarray(Image.open(folder / "valid" / "cat" / "0.png")))
    with pytest.raises(ConfigError, match="'architecture_share' has no effect"):
        load(folder, architecture_share=0.3)


def test_classes_may_be_called_train_and_test(make_folder: MakeFolder) -> None:
    assert load(make_folder(classes=("bus", "test", "train"))).classes == ("bus", "test", "train")


def test_differing_classes_in_train_and_test_are_named(make_folder: MakeFolder) -> None:
    folder = make_folder(parts=("train", "test"))
    (folder / "test" / "dog").rename(folder / "test" / "dogs")
    with pytest.raises(DataError, match="test: wanted the same class folders .*: dog, dogs"):
        load(folder)


def test_corrupt_files_are_named_up_to_five_then_counted(make_folder: MakeFolder) -> None:
    folder = make_folder(per_class=9)
    for number in range(7):
        (folder / "cat" / f"{number}.png").write_bytes(b"not a picture")
    with pytest.raises(DataError) as fault:
        load(folder)
    assert "7 of 18 images cannot be read: cat/0.png (not an image), " in str(fault.value)
    assert "cat/4.png (not an image) and 2 more; repair or remove them" in str(fault.value)


def test_truncated_files_are_named(make_folder: MakeFolder) -> None:
    folder = make_folder(size=(64, 64))
    file = folder / "dog" / "2.png"
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(DataError, match=r"1 of 10 images cannot be read: dog/2.png .*truncated"):
        load(folder)


def test_folders_that_are_not_data_sets_are_refused(tmp_path: Path, make_folder: MakeFolder) -> None:
    with pytest.raises(DataError, match="nowhere: wanted a folder of class folders, but nothing is there"):
        load(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="but it is a file"):
        load(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="at least 2 class folders with images in them, found none"):
        load(tmp_path / "empty")
    with pytest.raises(DataError, match="found only 'cat'"):
        load(make_folder(classes=("cat",)))
    with pytest.raises(ConfigError, match="image-folder:PATH"):
        load_task("image-folder", seed=0)


def test_a_folder_that_cannot_be_listed_is_named(
    make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder()
    scandir = os.scandir

    def refuse(path: Path) -> object:
        if Path(path).name == "dog":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"dog: cannot be read .Permission denied.; check the path"):
        load(folder)


def test_what_is_hidden_is_no_image(make_folder: MakeFolder) -> None:
    folder = make_folder()
    for hidden in (".thumbnails", ".ipynb_checkpoints/deeper"):
        (folder / "cat" / hidden).mkdir(parents=True)
        shutil.copy(folder / "cat" / "0.png", folder / "cat" / hidden)
    shutil.copy(folder / "cat" / "0.png", folder / "cat" / "._0.png")
    assert len(load(folder).source.labels) == 10


def test_the_way_from_a_file_to_pixels_is_told(make_folder: MakeFolder) -> None:
    folder = make_folder(size=(40, 30))
    square = load(folder, image_size=16)
    assert "the largest centred square resized to 16 × 16" in square.preparation
    resized = load(folder, image_size=16, crop="resized")
    assert "shorter side resized to 18 pixels, the centre 16 × 16 cut" in resized.preparation
    assert square.augmentation == {"flip": True, "crop_padding": 2, "resized_crop": False}
    assert resized.augmentation["resized_crop"] and square.channel_order == "RGB"


def test_a_class_whose_name_no_file_can_hold_is_refused(make_folder: MakeFolder) -> None:
    """Latin-1 from an old archive: it would end up in the manifest, after everything was trained."""
    folder = make_folder()
    try:
        (folder / "dog").rename(folder / os.fsdecode(b"caf\xe9"))
    except OSError:
        pytest.skip("this file system has no such names")
    with pytest.raises(DataError, match=r"class folder 'caf\\udce9' is not UTF-8.*rename it"):
        load(folder)


def test_a_link_back_to_the_class_does_not_count_its_images_again(make_folder: MakeFolder) -> None:
    folder = make_folder()
    (folder / "cat" / "round").symlink_to(folder / "cat")
    assert len(load(folder).source.labels) == 10


def test_too_few_images_say_how_many_are_needed(make_folder: MakeFolder) -> None:
    folder = make_folder(per_class=2)
    with pytest.raises(DataError, match="at least 3 images per class .* class 'cat' has 2, 'dog' has 2"):
        load(folder)
    (folder / "hen").mkdir()
    with pytest.raises(DataError, match="'hen' has 0"):
        load(folder)


class Listener:
    """A Progress that remembers."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.advanced: dict[str, int] = {}

    @contextmanager
    def track(self, label: str, total: int, done: int = 0) -> Iterator[Callable[[int, str], None]]:
        self.advanced[label] = 0

        def advance(steps: int, note: str) -> None:
            self.advanced[label] += steps

        yield advance

    def say(self, message: str) -> None:
        self.said.append(message)


def test_other_files_are_ignored_with_a_count_and_decoding_is_followed(make_folder: MakeFolder) -> None:
    folder = make_folder()
    (folder / "cat" / "notes.txt").write_text("")
    (folder / "cat" / ".hidden.png").write_text("")
    (folder / "dog" / "deeper").mkdir()
    (folder / "dog" / "4.png").rename(folder / "dog" / "deeper" / "4.PNG")
    listener = Listener()
    task = load_task(f"image-folder:{folder}", seed=0, progress=listener)
    assert len(task.source.labels) == 10
    assert listener.said == [f"{folder}: ignored 1 files that are not images"]
    assert listener.advanced == {"reading image headers": 10, "decoding images": 10}


def test_limit_opens_only_what_it_keeps(make_folder: MakeFolder) -> None:
    folder = make_folder(per_class=50)
    listener = Listener()
    task = load_task(f"image-folder:{folder}", seed=0, settings={"limit": 20}, progress=listener)
    assert {name: len(indices) for name, indices in task.splits.items()} == {
        "test": 20,
        "architecture": 4,
        "weights": 16,
    }
    assert listener.advanced["decoding images"] == 40
    assert np.bincount(task.source.labels[task.splits["weights"]]).tolist() == [8, 8]


def test_too_large_for_memory_is_refused_with_advice(
    make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=8000))
    with pytest.raises(
        DataError,
        match="10 decoded images are held in memory.*set data.memory to less to have them streamed, or",
    ):
        load(make_folder())
