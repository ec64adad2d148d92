"""Chance is drawn once and applied in two ways, which agree; what it does is what it says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.data import augment
from pipeline.data.augment import Draws
from pipeline.data.base import ImageTask
from pipeline.data.decode import CROP_DRAWS

MakeTask = Callable[..., ImageTask]


def test_crops_are_all_windows_of_the_padded_image() -> None:
    image = np.arange(1, 4 * 5 * 2 + 1, dtype=np.uint8).reshape(1, 4, 5, 2)
    padded = np.pad(image[0], ((1, 1), (1, 1), (0, 0)))
    offsets = [(top, left) for top in range(3) for left in range(3)]
    crops = augment.crop(np.repeat(image, 9, axis=0), 1, np.array(offsets).T)
    for (top, left), crop in zip(offsets, crops, strict=True):
        assert np.array_equal(crop, padded[top : top + 4, left : left + 5])


def test_mirrored_images_are_left_to_right() -> None:
    pixels = np.arange(2 * 3 * 4 * 2, dtype=np.uint8).reshape(2, 3, 4, 2)
    flipped = augment.mirror(pixels, np.array([False, True]))
    assert np.array_equal(flipped[0], pixels[0]) and np.array_equal(flipped[1], pixels[1, :, ::-1])


def test_offsets_cover_their_range_and_half_is_mirrored(make_task: MakeTask) -> None:
    draws = augment.draw(make_task(crop_padding=2), 2000, 0, np.random.default_rng(0))
    assert draws.offsets_2N is not None and draws.mirrored_N is not None
    assert {tuple(offset) for offset in draws.offsets_2N.T.tolist()} == {
        (top, left) for top in range(5) for left in range(5)
    }
    assert 900 < draws.mirrored_N.sum() < 1100
    assert draws.crops is None and draws.centres_2N is None


def test_cutout_leaves_the_other_draws_as_they_were(make_task: MakeTask) -> None:
    """A seed means the same images with and without it."""
    plain, covered = (augment.draw(make_task(), 9, size, np.random.default_rng(5)) for size in (0, 4))
    assert np.array_equal(plain.offsets_2N, covered.offsets_2N)
    assert np.array_equal(plain.mirrored_N, covered.mirrored_N)
    assert covered.centres_2N is not None and covered.centres_2N.shape == (2, 9)


def test_resized_crops_take_the_place_of_padded_ones(make_task: MakeTask) -> None:
    draws = augment.draw(replace(make_task(), resized_crop=True), 3, 0, np.random.default_rng(0))
    assert draws.offsets_2N is None and draws.crops is not None and draws.crops.shape == (3, *CROP_DRAWS)


@pytest.mark.parametrize("padding", [0, 1, 3])
@pytest.mark.parametrize("mirrored", [True, False])
def test_a_tensor_is_augmented_as_memory_is(padding: int, mirrored: bool) -> None:
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 256, (30, 6, 7, 3), dtype=np.uint8)
    rows = rng.permutation(30)[:12]
    draws = Draws(
        offsets_2N=rng.integers(0, 2 * padding + 1, (2, 12)) if padding else None,
        mirrored_N=rng.random(12) < 0.5 if mirrored else None,
    )
    wanted = augment.host(pixels[rows], draws, padding)
    came = augment.on_device(torch.from_numpy(pixels), torch.from_numpy(rows), draws, padding)
    assert came.dtype == torch.uint8 and np.array_equal(came.numpy(), wanted)
    whole = augment.on_device(torch.from_numpy(pixels[rows]), None, draws, padding)
    assert np.array_equal(whole.numpy(), wanted)


@pytest.mark.parametrize(
    ("centre", "covered"),
    [
        ((4, 4), (slice(2, 6), slice(2, 6))),
        ((0, 7), (slice(0, 2), slice(5, 8))),
        ((7, 1), (slice(5, 8), slice(0, 3))),
    ],
)
def test_cutout_covers_a_square_that_the_border_cuts(
    centre: tuple[int, int], covered: tuple[slice, slice]
) -> None:
    images = torch.ones(1, 3, 8, 8)
    draws = Draws(centres_2N=np.array(centre)[:, None])
    wanted = torch.ones(3, 8, 8)
    wanted[:, covered[0], covered[1]] = 0
    assert torch.equal(augment.cut_out(images, 4, draws)[0], wanted)


def test_every_pixel_is_a_centre_of_cutout_at_some_time(make_task: MakeTask) -> None:
    draws = augment.draw(make_task(), 3000, 4, np.random.default_rng(0))
    assert draws.centres_2N is not None
    assert {tuple(centre) for centre in draws.centres_2N.T.tolist()} == {
        (row, column) for row in range(8) for column in range(8)
    }
