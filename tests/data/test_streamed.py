"""A folder that is streamed gives the batches that it gives from memory, in any order, and starts again
exactly."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from pipeline.data import cache_folder, load_task
from pipeline.data.ahead import LazySource
from pipeline.data.arrays import ArrayImages
from pipeline.data.base import ImageTask
from pipeline.data.batches import Batches, evaluation_batches, fixed_batch
from pipeline.data.streamed import StreamedImages
from pipeline.errors import ConfigError, DataError, WorkerLost

STREAMED = {"memory": 0, "workers": 2, "image_size": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEGs of many sizes."""
    root = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (root / name).mkdir()
        for number in range(30):
            width, height = rng.integers(20, 60, 2).tolist()
            small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
            small.resize((width, height)).save(root / name / f"{number}.jpg")
    return root


def load(folder: Path, **settings: object) -> ImageTask:
    return load_task(f"image-folder:{folder}", seed=0, settings=settings)


@pytest.fixture(scope="module")
def streamed(folder: Path) -> ImageTask:
    return load(folder, **STREAMED)


@pytest.fixture(scope="module")
def resized(folder: Path) -> ImageTask:
    return load(folder, workers=2, image_size=16, crop="resized")


def batches(task: ImageTask, batch_size: int = 5, seed: int = 3) -> Batches:
    return Batches(task, "weights", batch_size, seed=seed, augment=True, drop_last=True)


def equal(one: tuple[torch.Tensor, ...], other: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_streamed_folder_is_the_same_task_as_in_memory(folder: Path, streamed: ImageTask) -> None:
    there = load(folder, image_size=16)
    assert isinstance(there.source, ArrayImages) and isinstance(streamed.source, StreamedImages)
    assert isinstance(streamed.source, LazySource) and not isinstance(there.source, LazySource)
    assert (there.mean, there.std, there.classes) == (streamed.mean, streamed.std, streamed.classes)
    assert np.array_equal(there.source.labels, streamed.source.labels)
    ours, theirs = batches(streamed), batches(there)
    for step in range(2 * ours.steps_per_epoch + 1):
        assert equal(ours.at(step), theirs.at(step))
    for one, other in zip(
        evaluation_batches(streamed, "architecture", 4),
        evaluation_batches(there, "architecture", 4),
        strict=True,
    ):
        assert equal(one, other)
    assert equal(fixed_batch(streamed, "weights", 7, 1), fixed_batch(there, "weights", 7, 1))


@pytest.mark.parametrize("kind", ["streamed", "resized"])
def test_any_step_at_any_time(kind: str, request: pytest.FixtureRequest) -> None:
    """Forwards, backwards, by strides as ranks take them, and from the middle of an epoch."""
    task: ImageTask = request.getfixturevalue(kind)
    stream = batches(task)
    first = {step: stream.at(step) for step in range(12)}
    for order in (range(11, -1, -1), range(1, 12, 3), [4, 4, 9, 0, 1, 2, 11], range(7, 12)):
        other = batches(task)
        assert all(equal(other.at(step), first[step]) for step in order)
    assert not equal(batches(task, seed=4).at(0), first[0])


def test_resized_crops_differ_by_step_and_image_but_evaluation_does_not(resized: ImageTask) -> None:
    assert resized.resized_crop and resized.crop_padding == 0 and resized.image_shape == (3, 16, 16)
    source = resized.source
    assert isinstance(source, StreamedImages)
    alike = np.zeros(6, np.int64)
    crops = np.random.default_rng(0).random((6, 10, 4))
    cut = source.request(alike, crops).pixels()
    assert len({image.tobytes() for image in cut}) == 6
    assert np.array_equal(source.request(alike, crops).pixels(), cut)
    assert len({image.tobytes() for image in source.read(alike)}) == 1


def test_only_a_few_batches_are_asked_for_ahead(streamed: ImageTask, monkeypatch: pytest.MonkeyPatch) -> None:
    source = streamed.source
    assert isinstance(source, StreamedImages)
    asked: list[int] = []
    request = source.request
    monkeypatch.setattr(
        source, "request", lambda indices, crops=None: asked.append(1) or request(indices, crops)
    )
    stream, ahead = batches(streamed), source.batches_ahead(5)
    stream.at(0)
    assert len(asked) == ahead + 1
    for step in range(1, 10):
        stream.at(step)
    assert len(asked) == ahead + 10, "each step is asked for once"
    stream.at(500)
    assert len(stream._loader._pixels._pending) == ahead


def test_the_fingerprint_is_of_the_files_and_of_how_they_are_cut(
    folder: Path, streamed: ImageTask, resized: ImageTask
) -> None:
    assert load(folder, **STREAMED).fingerprint == streamed.fingerprint
    others = [load(folder, **{**STREAMED, **changed}) for changed in ({"image_size": 8}, {"test_share": 0.3})]
    assert len({task.fingerprint for task in (streamed, resized, *others)}) == 4


def test_decoded_images_are_kept_up_to_the_limit(folder: Path, streamed: ImageTask) -> None:
    kept = cache_folder() / "image-folders" / f"{streamed.fingerprint[:16]}.decoded"
    assert kept.stat().st_size == 60 * (16 * 16 * 3 + 12)
    few = load(folder, **{**STREAMED, "image_size": 12}, cache=10_000)
    kept = cache_folder() / "image-folders" / f"{few.fingerprint[:16]}.decoded"
    assert 10_000 - (12 * 12 * 3 + 12) < kept.stat().st_size <= 10_000
    none = load(folder, **{**STREAMED, "image_size": 8}, cache=0)
    assert not (cache_folder() / "image-folders" / f"{none.fingerprint[:16]}.decoded").exists()


def test_a_file_that_breaks_later_is_named(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "images"
    for name in ("cat", "dog"):
        (broken / name).mkdir(parents=True)
        for file in (folder / name).glob("1*.jpg"):
            content = file.read_bytes()
            (broken / name / file.name).write_bytes(content)
    task = load(broken, **STREAMED, cache=0)
    victim = broken / "cat" / "11.jpg"
    victim.write_bytes(victim.read_bytes()[:200])
    with pytest.raises(DataError, match=r"cat/11\.jpg: cannot be read"):
        task.source.read(np.arange(len(task.source.labels)))


def test_a_killed_worker_is_an_error_and_no_wait(folder: Path) -> None:
    task = load(folder, **{**STREAMED, "image_size": 10}, cache=0)
    task.source.read(np.arange(4))
    assert isinstance(task.source, StreamedImages)
    pool = task.source._pool
    for pid in list(pool._processes):  # type: ignore[union-attr]
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(WorkerLost, match="a process that decodes images has died"):
        for _ in range(100):
            task.source.read(np.arange(60))
    with pytest.raises(WorkerLost):  # also where the pool knows of it before it is asked
        task.source.read(np.arange(60))


def test_workers_end_when_their_parent_is_killed(folder: Path) -> None:
    script = (
        "import sys, time, numpy as np\n"
        "from pipeline.data import load_task\n"
        f"task = load_task('image-folder:{folder}', seed=0, settings={STREAMED!r})\n"
        "task.source.read(np.arange(40))\n"
        "print(*task.source._pool._processes, flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        workers = [psutil.Process(int(pid)) for pid in child.stdout.readline().split()]
        child.kill()
    assert workers
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive


class Listener:
    """A Progress that remembers what was said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    @contextmanager
    def track(self, label: str, total: int, done: int = 0) -> Iterator[Callable[[int, str], None]]:
        yield lambda steps, note: None

    def say(self, message: str) -> None:
        self.said.append(message)


def test_settings_without_effect_are_refused_or_said(folder: Path) -> None:
    with pytest.raises(ConfigError, match="'crop_padding' has no effect with 'crop: resized'"):
        load(folder, image_size=16, crop="resized", crop_padding=2)
    listener = Listener()
    settings = {"image_size": 16, "workers": 1, "cache": "1 GiB"}
    load_task(f"image-folder:{folder}", seed=0, settings=settings, progress=listener)
    assert listener.said[0].endswith("go into memory, so cache and workers have no effect")


def test_memory_is_a_size_with_its_unit(folder: Path) -> None:
    assert isinstance(load(folder, image_size=16, memory="46 kB").source, StreamedImages)
    assert isinstance(
        load(folder, image_size=16, memory="47 kB").source, ArrayImages
    )  # 60 · 16² · 3 = 46,080
    with pytest.raises(ConfigError, match="'memory' is 'much'"):
        load(folder, memory="much")
