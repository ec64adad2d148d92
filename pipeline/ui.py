"""What a person sees while a run works: bars with time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING

from pipeline.types import Progress

if TYPE_CHECKING:
    from rich.console import Console

PLAIN_SECONDS = 10.0


def progress_for(console: Console) -> Progress:
    return Bars(console) if console.is_terminal else Lines(sys.stderr)


class Bars:
    """Rich bars on standard error; one at a time, gone when done."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def track(self, label: str, total: int, done: int = 0) -> Iterator[Callable[[int, str], None]]:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[note]}"),
        )
        started = time.monotonic()
        with Progress(*columns, console=self._console, transient=True) as bars:
            task = bars.add_task(label, total=total, completed=done, note="")
            yield lambda steps, note: bars.update(task, advance=steps, note=note)
        if total > done:
            self.say(f"{label}: done in {clock(time.monotonic() - started)}")

    def say(self, message: str) -> None:
        self._console.print(message, markup=False, highlight=False)


class Lines:
    """A line every ten seconds of work, and one when it ends."""

    def __init__(self, stream: IO[str], every_s: float = PLAIN_SECONDS) -> None:
        self._stream, self._every_s = stream, every_s

    @contextmanager
    def track(self, label: str, total: int, done: int = 0) -> Iterator[Callable[[int, str], None]]:
        started = shown = time.monotonic()
        first, count = done, done

        def advance(steps: int, note: str) -> None:
            nonlocal count, shown
            count += steps
            now = time.monotonic()
            if now - shown >= self._every_s and count > first:
                left = (now - started) / (count - first) * max(0, total - count)
                self.say(f"{label}: {count}/{total}, {clock(left)} left{f', {note}' if note else ''}")
                shown = now

        yield advance
        if total > first:
            self.say(f"{label}: done in {clock(time.monotonic() - started)}")

    def say(self, message: str) -> None:
        print(message, file=self._stream, flush=True)


def clock(seconds: float) -> str:
    """`42 s`, `3:07`, `1:02:11`."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
