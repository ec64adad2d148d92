"""The ways from bytes to a batch agree: in memory, on the device, and uploaded."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from pipeline.data import loader
from pipeline.data.ahead import Images
from pipeline.data.base import ImageTask
from pipeline.data.batches import Batches, evaluation_batches
from pipeline.types import FloatArray, IntArray

MakeTask = Callable[..., ImageTask]

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device here")


@dataclass(frozen=True)
class Answered:
    given: Images

    def pixels(self) -> Images:
        return self.given

    def cancel(self) -> None:
        pass


class Lazy:
    """A LazySource over one in memory, for what cannot lie on a device in full."""

    def __init__(self, source: object) -> None:
        self._source = source

    shape = property(lambda self: self._source.shape)
    labels = property(lambda self: self._source.labels)

    def read(self, indices: IntArray) -> Images:
        pixels: Images = self._source.read(indices)  # type: ignore[attr-defined]
        return pixels

    def request(self, indices: IntArray, crops: FloatArray | None = None) -> Answered:
        return Answered(self.read(indices))

    def batches_ahead(self, batch_size: int) -> int:
        return 2


def batches(task: ImageTask, **changed: object) -> Batches:
    settings: dict[str, object] = {"seed": 7, "augment": True, "drop_last": False, **changed}
    return Batches(task, "weights", 8, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("cutout", [0, 4])
@pytest.mark.parametrize("options", [{}, {"flip": False}, {"crop_padding": 0}, {"channels": 1}])
@pytest.mark.parametrize("lazy", [False, True])
def test_on_the_device_is_as_on_the_host(
    make_task: MakeTask, options: dict[str, object], cutout: int, lazy: bool
) -> None:
    task = make_task(**options)
    there = replace(task, source=Lazy(task.source)) if lazy else task
    host, device = batches(task, cutout=cutout), batches(there, cutout=cutout, on_device=True)
    assert (device._loader._upload is not None) == lazy
    for step in (0, 1, 2, 7, 8, 3, 3, 11, 4):
        (images, labels), (ours, our_labels) = host.at(step), device.at(step)
        assert torch.equal(images, ours) and torch.equal(labels, our_labels)
        assert ours.is_contiguous(memory_format=torch.channels_last)


def test_cutout_covers_and_changes_nothing_else(make_task: MakeTask) -> None:
    task = make_task()
    (plain, _), (covered, _) = (batches(task, cutout=size).at(5) for size in (0, 4))
    hidden = covered == 0
    assert torch.equal(covered[~hidden], plain[~hidden])
    assert (hidden.all(dim=1).sum(dim=(1, 2)) >= 4).all(), "at least a corner of the square lies inside"


def test_images_lie_on_a_device_once(make_task: MakeTask) -> None:
    gc.collect()  # what other tests have left
    task = make_task()
    one, other = (batches(task, on_device=True, seed=seed) for seed in (1, 2))
    assert one._loader._resident is other._loader._resident is not None
    known = len(loader._RESIDENTS)
    del one, other
    gc.collect()
    assert len(loader._RESIDENTS) == known - 1, "they stay while somebody uses them"


def test_images_that_are_too_large_for_a_gpu_are_uploaded(
    make_task: MakeTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_task().source
    nbytes = source.pixels.nbytes  # type: ignore[attr-defined]
    for free, fits in ((nbytes, False), (3 * nbytes, True)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, free))
        assert loader._has_room(torch.device("cuda"), nbytes) == fits
    assert loader._has_room(torch.device("cpu"), nbytes)


@needs_cuda
@pytest.mark.parametrize("lazy", [False, True])
def test_a_gpus_batches_are_the_cpus(make_task: MakeTask, lazy: bool) -> None:
    task = make_task(size=16)
    there = replace(task, source=Lazy(task.source)) if lazy else task
    host, device = batches(task, cutout=4), batches(there, cutout=4, device="cuda")
    for step in (0, 1, 2, 9, 3):
        (images, labels), (ours, our_labels) = host.at(step), device.at(step)
        assert ours.device.type == "cuda" and torch.equal(our_labels.cpu(), labels)
        torch.testing.assert_close(ours.cpu(), images, rtol=0, atol=1e-6)


@needs_cuda
def test_a_gpus_evaluation_is_the_cpus(make_task: MakeTask) -> None:
    task = make_task()
    ours = evaluation_batches(task, "architecture", 5, "cuda")
    for (images, labels), (there, on_gpu) in zip(
        evaluation_batches(task, "architecture", 5), ours, strict=True
    ):
        torch.testing.assert_close(there.cpu(), images, rtol=0, atol=1e-6)
        assert torch.equal(on_gpu.cpu(), labels)


def test_pixels_of_the_next_steps_are_asked_for_before_their_turn(make_task: MakeTask) -> None:
    task = make_task()
    source = Lazy(task.source)
    asked: list[list[int]] = []

    def request(indices: IntArray, crops: FloatArray | None = None) -> Answered:
        asked.append(indices.tolist())
        return Answered(task.source.read(indices))

    source.request = request  # type: ignore[method-assign]
    stream = batches(replace(task, source=source), augment=False)
    plain = batches(task, augment=False)
    wanted = [np.sort(plain._batch(step).indices).tolist() for step in range(8)]
    stream.at(0)
    assert [sorted(indices) for indices in asked] == wanted[:3]
    stream.at(1)
    assert [sorted(indices) for indices in asked] == wanted[:4]
    asked.clear()
    stream.at(3)  # a stride of two: 5 and 7 come next; 3 was asked for already
    assert [sorted(indices) for indices in asked] == [wanted[5], wanted[7]]
