"""Crops and cuts are torchvision's, with the random numbers given."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import functional as tv
from torchvision.transforms.v2 import CenterCrop, Compose, Resize

from pipeline.data.cache import Place, Rows, reserve_rows
from pipeline.data.decode import CROP_DRAWS, Decoder, Request, answer_all, crop_box
from pipeline.errors import DataError


def photograph(path: Path, width: int = 61, height: int = 44, mode: str = "RGB") -> Image.Image:
    """Something with edges and gradients in it."""
    rng = np.random.default_rng(width)
    small = rng.integers(0, 256, (7, 9) if mode == "L" else (7, 9, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
    image.save(path)
    return image


def boxes(width: int, height: int, count: int = 2000) -> list[tuple[int, int, int, int]]:
    draws = np.random.default_rng(0).random((count, *CROP_DRAWS))
    return [crop_box(draw, width, height) for draw in draws]


def test_boxes_lie_inside_with_the_published_areas_and_ratios() -> None:
    areas, ratios = [], []
    for left, top, right, bottom in boxes(150, 150):
        assert 0 <= left < right <= 150 and 0 <= top < bottom <= 150
        areas.append((right - left) * (bottom - top) / (150 * 150))
        ratios.append((right - left) / (bottom - top))
    assert 0.075 < min(areas) < 0.1 and 0.95 < max(areas) <= 1
    assert 0.73 < min(ratios) < 0.77 and 1.3 < max(ratios) < 1.37
    assert np.median(np.log(ratios)) == pytest.approx(0, abs=0.03)


def test_the_first_attempt_is_the_one_with_the_given_numbers() -> None:
    draws = np.full(CROP_DRAWS, 0.99)
    draws[0] = [(0.25 - 0.08) / 0.92, 0.5, 0.0, 0.0]  # a quarter of the area, square, top left
    assert crop_box(draws, 100, 100) == (0, 0, 50, 50)
    draws[0, 2:] = np.nextafter(1.0, 0.0)
    assert crop_box(draws, 100, 100) == (50, 50, 100, 100)


@pytest.mark.parametrize(
    ("width", "height", "wanted"), [(1000, 10, (493, 0, 506, 10)), (10, 1000, (0, 493, 10, 506))]
)
def test_where_no_attempt_fits_the_largest_allowed_box_is_taken(
    width: int, height: int, wanted: tuple[int, int, int, int]
) -> None:
    draws = np.full(CROP_DRAWS, 1.0)
    assert crop_box(draws, width, height) == wanted


def test_a_crop_is_torchvisions(tmp_path: Path) -> None:
    image = photograph(tmp_path / "a.png")
    decoder = Decoder(16, 3, original=True)
    for draws in np.random.default_rng(1).random((20, *CROP_DRAWS)):
        left, top, right, bottom = crop_box(draws, *image.size)
        wanted = tv.resized_crop(image, top, left, bottom - top, right - left, [16, 16])
        came = decoder.answer(Request(tmp_path / "a.png", None, draws))
        assert np.array_equal(came, np.asarray(wanted))


@pytest.mark.parametrize("size", [(61, 44), (44, 61), (50, 50), (20, 97)])
def test_the_evaluations_cut_is_torchvisions(tmp_path: Path, size: tuple[int, int]) -> None:
    image = photograph(tmp_path / "a.png", *size)
    wanted = Compose([Resize(math.floor(28 / 0.875)), CenterCrop(28)])(image)
    came = Decoder(28, 3, original=True).whole(tmp_path / "a.png")
    assert np.array_equal(came, np.asarray(wanted))


def test_grey_stays_one_channel(tmp_path: Path) -> None:
    photograph(tmp_path / "a.png", mode="L")
    draws = np.random.default_rng(0).random(CROP_DRAWS)
    for decoder, crop in ((Decoder(16, 1), None), (Decoder(16, 1, original=True), draws)):
        assert decoder.answer(Request(tmp_path / "a.png", None, crop)).shape == (16, 16, 1)


@pytest.mark.parametrize("original", [True, False])
def test_what_is_kept_answers_as_the_file_does(tmp_path: Path, original: bool) -> None:
    sizes = [(61, 44), (30, 90), (24, 24)]
    files = [tmp_path / f"{number}.png" for number in range(3)]
    for file, size in zip(files, sizes, strict=True):
        photograph(file, *size)
    decoder = Decoder(24, 3, original)
    areas = np.array([width * height for width, height in sizes])
    rows = reserve_rows(tmp_path, "kept", decoder.kept_bytes(areas), np.arange(3), 10**9)
    assert rows is not None
    crops = np.random.default_rng(0).random((3, *CROP_DRAWS)) if original else [None] * 3

    def ask(rows: Rows | None) -> np.ndarray:
        places: list[Place | None] = [None if rows is None else rows.place(i) for i in range(3)]
        return answer_all(decoder, [Request(*each) for each in zip(files, places, crops, strict=True)])

    wanted = ask(None)
    assert np.array_equal(ask(rows), wanted)
    for file in files:
        file.unlink()
    assert np.array_equal(ask(rows), wanted), "not from where it was kept"


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    photograph(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:500])
    requests = [Request(tmp_path / name, None, None) for name in ("a.png", "b.png")]
    with pytest.raises(DataError, match=r"b\.png: cannot be read .*truncated.*; repair or remove it"):
        answer_all(Decoder(16, 3), requests)
