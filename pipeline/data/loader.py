"""From the indices of a step to a batch: pixels that were asked for ahead, augmented and normalised, on
the device that computes.

Three ways, one result. On a CPU: bytes are gathered, cropped and mirrored, then normalised in one pass
over contiguous rows. On a GPU where all images fit: they lie there as bytes and are gathered, cropped,
mirrored and normalised there. On a GPU where they do not: a thread gathers the next batch's bytes in
pinned memory while the present one is used, and the rest happens there.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakValueDictionary

import numpy as np

from pipeline.data import augment
from pipeline.data.ahead import Pixels, Wanted
from pipeline.data.arrays import ArrayImages
from pipeline.data.augment import NO_DRAWS, Draws
from pipeline.data.base import ImageSource, ImageTask
from pipeline.types import IntArray

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_RESIDENT_SHARE = 0.4
"""Of a GPU's free memory, at most, for images."""


class Batch(NamedTuple):
    """What a step is made of: indices of the images, and chance."""

    indices: IntArray
    draws: Draws = NO_DRAWS

    @property
    def wanted(self) -> Wanted:
        return Wanted(self.indices, self.draws.crops)


Plan = Callable[[int], Batch | None]
"""Step → its batch, None beyond the last."""


class Loader:
    """Batches of a plan on a device, any step at any time.

    `on_device` says whether bytes are augmented and normalised there; by default on every device but the
    CPU. `cutout` is the square's side in pixels."""

    def __init__(
        self,
        task: ImageTask,
        plan: Plan,
        *,
        cutout: int = 0,
        device: str = "cpu",
        on_device: bool | None = None,
    ) -> None:
        import torch

        self._task, self._plan, self._cutout = task, plan, cutout
        self._device = torch.device(device)
        self._pixels = Pixels(task.source, self._wanted)
        self._normalise = Normalise(task, self._device)
        on_device = self._device.type != "cpu" if on_device is None else on_device
        self._resident = resident_images(task.source, self._device) if on_device else None
        self._upload = _Upload(self._gather, self._device) if on_device and not self._resident else None

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """Normalised float32 images (N, C, H, W), channels-last in memory, and int64 labels (N,)."""
        import torch

        if self._upload is not None:
            pixels, labels_N, draws = self._upload.at(step)
            pixels = augment.on_device(pixels, None, draws, self._task.crop_padding)
            return self._finished(pixels, draws), labels_N
        batch = self._plan(step)
        assert batch is not None, f"there is no step {step}"
        if self._resident is not None:
            rows_N = torch.from_numpy(batch.indices).to(self._device, non_blocking=True)
            labels_N = self._resident.labels.index_select(0, rows_N)
            pixels = augment.on_device(self._resident.pixels, rows_N, batch.draws, self._task.crop_padding)
        else:
            pixels, labels_N = self._on_host(step, batch, augment_too=True)
        return self._finished(pixels, batch.draws), labels_N

    def _finished(self, pixels: Tensor, draws: Draws) -> Tensor:
        return augment.cut_out(self._normalise(pixels), self._cutout, draws)

    def _on_host(self, step: int, batch: Batch, *, augment_too: bool) -> tuple[Tensor, Tensor]:
        import torch

        pixels = self._pixels.at(step, batch.wanted)
        if augment_too:
            pixels = augment.host(pixels, batch.draws, self._task.crop_padding)
        return torch.from_numpy(pixels), torch.from_numpy(self._task.source.labels[batch.indices])

    def _gather(self, step: int) -> _Gathered | None:
        """What is uploaded; chance is applied there."""
        batch = self._plan(step)
        if batch is None:
            return None
        return _Gathered(*self._on_host(step, batch, augment_too=False), batch.draws)

    def _wanted(self, step: int) -> Wanted | None:
        batch = self._plan(step)
        return None if batch is None else batch.wanted


class Normalise:
    """uint8 images (N, H, W, C) → float32 tensor (N, C, H, W), channels-last: (x / 255 - mean) / std."""

    def __init__(self, task: ImageTask, device: str | torch.device = "cpu") -> None:
        import torch

        _, width, _ = task.source.shape
        mean, std = np.array(task.mean), np.array(task.std)
        # One value per entry of an image row (W · C), so that the pass is over long contiguous rows.
        self._scale = torch.from_numpy(np.tile(1 / (255 * std), width).astype(np.float32)).to(device)
        self._shift = torch.from_numpy(np.tile(-mean / std, width).astype(np.float32)).to(device)

    def __call__(self, pixels: Tensor) -> Tensor:
        import torch

        num_images, height, width, channels = pixels.shape
        rows = pixels.view(num_images, height, width * channels).to(torch.float32)
        rows.mul_(self._scale).add_(self._shift)
        return rows.view(num_images, height, width, channels).permute(0, 3, 1, 2)


# ---------------------------------------------------------------------------------------------- on the device


class Resident:
    """All images and labels of a source on a device: pixels (N, H, W, C) uint8, labels (N,) int64."""

    def __init__(self, source: ArrayImages, device: torch.device) -> None:
        import torch

        self.source = source  # while this lives, so does the array that it is known by
        self.pixels = torch.tensor(source.pixels, device=device)
        self.labels = torch.tensor(source.labels, device=device)


_RESIDENTS: WeakValueDictionary[tuple[int, str], Resident] = WeakValueDictionary()


def resident_images(source: ImageSource, device: torch.device) -> Resident | None:
    """The source's images on the device, shared by all who ask; None where they are streamed or take too
    much of its memory."""
    if not isinstance(source, ArrayImages):
        return None
    key = (id(source.pixels), str(device))
    found = _RESIDENTS.get(key)
    if found is None and _has_room(device, source.pixels.nbytes):
        found = _RESIDENTS[key] = Resident(source, device)
    return found


def _has_room(device: torch.device, num_bytes: int) -> bool:
    import torch

    if device.type != "cuda":
        return True
    free_bytes, _ = torch.cuda.mem_get_info(device)
    return num_bytes <= _RESIDENT_SHARE * free_bytes


class _Gathered(NamedTuple):
    pixels: Tensor
    labels_N: Tensor
    draws: Draws


class _Upload:
    """What a step gathers, on the device; the next step's is gathered in pinned memory meanwhile."""

    def __init__(self, gather: Callable[[int], _Gathered | None], device: torch.device) -> None:
        self._gather, self._device = gather, device
        self._thread = ThreadPoolExecutor(1)
        self._next: tuple[int, Future[_Gathered | None]] | None = None
        self._last: int | None = None

    def at(self, step: int) -> _Gathered:
        if self._next is None or self._next[0] != step:
            self._next = (step, self._thread.submit(self._pinned, step))
        host = self._next[1].result()
        assert host is not None, f"there is no step {step}"
        stride = step - self._last if self._last is not None and step > self._last else 1
        self._next = (step + stride, self._thread.submit(self._pinned, step + stride))
        self._last = step
        pixels, labels_N = (tensor.to(self._device, non_blocking=True) for tensor in host[:2])
        return _Gathered(pixels, labels_N, host.draws)

    def _pinned(self, step: int) -> _Gathered | None:
        found = self._gather(step)
        if found is None or self._device.type != "cuda":
            return found
        return _Gathered(found.pixels.pin_memory(), found.labels_N.pin_memory(), found.draws)
