"""Progress for work that nobody watches, and a checkpoint that keeps nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from numpy.typing import NDArray

from pipeline.types import Arrays, Json


class Silent:
    """A Progress that says nothing."""

    @contextmanager
    def track(self, label: str, total: int, done: int = 0) -> Iterator[Callable[[int, str], None]]:
        yield lambda steps, note: None

    def say(self, message: str) -> None:
        pass


class NoCheckpoint:
    """A Checkpoint that keeps nothing: the work cannot be resumed."""

    def load(self) -> tuple[Arrays, Json] | None:
        return None

    def save(self, arrays: Mapping[str, NDArray[Any]], record: Json) -> None:
        pass
