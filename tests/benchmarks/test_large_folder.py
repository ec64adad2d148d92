from __future__ import annotations

import io
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import image_folder


def asked(folder: Path) -> Namespace:
    return Namespace(
        folder=folder, images=600, size=16, batch_size=24, workers=2, seed=0, cache=0, keep="", rounds=1
    )


def test_images_are_their_own_and_the_same_every_time() -> None:
    made = [image_folder.synthetic_jpeg(number, 0) for number in range(12)]
    assert made == [image_folder.synthetic_jpeg(number, 0) for number in range(12)]
    images = [Image.open(io.BytesIO(content)) for content in made]
    assert len(set(made)) == 12 and len({image.size for image in images}) > 6
    assert all(64 <= side <= 256 for image in images for side in image.size)
    assert image_folder.synthetic_jpeg(0, 1) != made[0]
    assert np.asarray(images[0]).std() > 10


@pytest.mark.parametrize(("samples", "grown"), [([1, 5, 5, 4], 1.0), ([2, 2, 3, 2.5], 1.5)])
def test_growth_is_of_the_second_half(samples: list[float], grown: float) -> None:
    assert image_folder.growth(samples) == grown


def test_an_epoch_and_a_restart_in_its_middle_agree(tmp_path: Path) -> None:
    options = asked(tmp_path / "images")
    image_folder.make_folder(options.folder, options.images, options.seed)
    made = {path: path.stat().st_mtime_ns for path in options.folder.rglob("*.jpg")}
    assert len(made) == 600
    image_folder.make_folder(options.folder, options.images, options.seed)
    assert made == {path: path.stat().st_mtime_ns for path in options.folder.rglob("*.jpg")}, "made twice"
    assert image_folder.do_start(options)["images"] == 600
    epoch, restart = image_folder.do_epoch(options), image_folder.do_resume(options)
    assert epoch["digests"] == restart["digests"] and len(set(epoch["digests"])) == 8
    assert epoch["images_per_second"] > 0
