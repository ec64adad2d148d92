"""The pixels of any step, asked for before their turn where reading takes time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from pipeline.data.base import ImageSource
from pipeline.types import FloatArray, IntArray

Images = NDArray[np.uint8]
"""Shape (N, H, W, C)."""


class Wanted(NamedTuple):
    """Images by index, and the numbers that decide their crops, shape (N, *CROP_DRAWS); None: whole
    images."""

    indices: IntArray
    crops: FloatArray | None = None


Plan = Callable[[int], Wanted | None]
"""What each step wants; None beyond the last."""


class Answer(Protocol):
    def pixels(self) -> Images: ...
    def cancel(self) -> None: ...


@runtime_checkable
class LazySource(Protocol):
    """An ImageSource that begins to read when it is asked, and answers when it is waited for."""

    @property
    def shape(self) -> tuple[int, int, int]: ...
    @property
    def labels(self) -> IntArray: ...
    def read(self, indices: IntArray) -> Images: ...
    def request(self, indices: IntArray, crops: FloatArray | None = None) -> Answer: ...
    def batches_ahead(self, batch_size: int) -> int: ...


class Pixels:
    """The pixels of any step; of a LazySource, the following steps are asked for before their turn."""

    def __init__(self, source: ImageSource, plan: Plan) -> None:
        self._source, self._plan = source, plan
        self._pending: dict[int, Answer] = {}
        self._last: int | None = None

    def at(self, step: int, now: Wanted) -> Images:
        """What the step wants, which the caller knows as well. The stride of the last two steps says
        which come next; what was asked for and is not among them is given up, so that no more than a few
        batches are ever held."""
        if not isinstance(self._source, LazySource):
            assert now.crops is None, "a source in memory has no crops to resize"
            return self._source.read(now.indices)
        stride = step - self._last if self._last is not None and step > self._last else 1
        ahead = self._source.batches_ahead(len(now.indices))
        wanted = [step + number * stride for number in range(ahead + 1)]
        for other in self._pending.keys() - set(wanted):
            self._pending.pop(other).cancel()
        for other in wanted:
            if other not in self._pending and (planned := self._plan(other)) is not None:
                self._pending[other] = self._source.request(*planned)
        self._last = step
        return self._pending.pop(step).pixels()


def in_order(source: ImageSource, parts: Sequence[IntArray]) -> Iterator[Images]:
    """The pixels of each part, read ahead where the source can."""
    pixels = Pixels(source, lambda step: Wanted(parts[step]) if step < len(parts) else None)
    return (pixels.at(step, Wanted(part)) for step, part in enumerate(parts))
