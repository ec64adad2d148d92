"""Plain lines where nobody watches, bars on a terminal; both say how long is left."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from pipeline import ui
from pipeline.ui import Bars, Lines, clock, progress_for


class Clock:
    """Seconds that pass only when a test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(ui.time, "monotonic", lambda: self.now)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (42, "42 s"), (59.4, "59 s"), (59.9, "1:00"), (187, "3:07"), (3731, "1:02:11")],
)
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_a_line_comes_every_ten_seconds_and_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    time, stream = Clock(monkeypatch), io.StringIO()
    with Lines(stream, every_s=10).track("search", 100) as advance:
        for _ in range(8):
            time.now += 5
            advance(10, "loss 1.2")
    assert stream.getvalue().splitlines() == [
        "search: 20/100, 40 s left, loss 1.2",
        "search: 40/100, 30 s left, loss 1.2",
        "search: 60/100, 20 s left, loss 1.2",
        "search: 80/100, 10 s left, loss 1.2",
        "search: done in 40 s",
    ]


def test_time_left_after_a_resume_counts_only_what_was_done_since(monkeypatch: pytest.MonkeyPatch) -> None:
    time, stream = Clock(monkeypatch), io.StringIO()
    with Lines(stream, every_s=10).track("retrain", 100, done=80) as advance:
        time.now += 10
        advance(5, "")
        assert stream.getvalue() == "retrain: 85/100, 30 s left\n"


def test_work_that_was_done_before_says_nothing() -> None:
    stream = io.StringIO()
    with Lines(stream).track("search", 10, done=10):
        pass
    assert stream.getvalue() == ""


def test_work_that_fails_is_not_called_done() -> None:
    stream = io.StringIO()
    with pytest.raises(ValueError, match="no"), Lines(stream).track("search", 10):
        raise ValueError("no")
    assert stream.getvalue() == ""


def test_bars_are_drawn_and_leave_a_line() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=100)
    progress = progress_for(console)
    assert isinstance(progress, Bars)
    with progress.track("measure", 4) as advance:
        advance(2, "round 1")
        progress.say("found [b]brackets[/b]")
    assert "measure" in stream.getvalue() and "2/4" in stream.getvalue() and "round 1" in stream.getvalue()
    assert "found [b]brackets[/b]" in stream.getvalue()
    assert "measure: done in 0 s" in stream.getvalue()


def test_one_bar_after_the_other() -> None:
    progress = Bars(Console(file=io.StringIO(), force_terminal=True))
    for label in ("first", "second"):
        with progress.track(label, 1) as advance:
            advance(1, "")


def test_no_terminal_no_bars() -> None:
    assert isinstance(progress_for(Console(file=io.StringIO())), Lines)
