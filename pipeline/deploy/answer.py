"""Which of a tier's files is its answer: the float32 one, or the one of the precision that was asked for.

The family is searched and budgeted in float32 (in float16, which needs no images, where the profile says
so). A file of lower precision is made of the finished network and timed beside the float32 one. It is the
answer where it keeps the accuracy that was asked for and all budgets, and is faster; else the float32 file
is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from pipeline.units import format_value

LATENCY = "latency_ms"
MIN_SPEED_UP = 1.03
"""What a latency repeats within: less than this is not known to be faster, and not worth any accuracy."""


class Answer(NamedTuple):
    """Whether it is the file of lower precision, and why."""

    lower: bool
    reason: str


def choose(
    float32: Mapping[str, float],
    lower: Mapping[str, float],
    budgets: Mapping[str, float],
    *,
    precision: str,
    refusal: str | None = None,
) -> Answer:
    """`float32` and `lower` are what the two files were measured to cost, metric → value, `latency_ms` among
    them; `refusal` says why the lower one may not be used whatever it costs, None where it may."""
    if refusal is not None:
        return Answer(False, refusal)
    speed_up = float32[LATENCY] / lower[LATENCY]
    word = "slower" if speed_up < 1 else "no faster" if speed_up < MIN_SPEED_UP else "faster"
    compared = f"{precision} is {word} than float32 ({speed_up:.2f} times its speed)"
    missed = _missed(lower, budgets)
    if missed is not None:
        came, limit = (format_value(missed, value) for value in (lower[missed], budgets[missed]))
        return Answer(False, f"{compared} and misses a budget: {missed} is {came}, at most {limit} was asked")
    missed = _missed(float32, budgets)
    if missed is not None:
        return Answer(True, f"{compared}, which misses its budget of {missed}")
    return Answer(speed_up >= MIN_SPEED_UP, compared)


def _missed(measured: Mapping[str, float], budgets: Mapping[str, float]) -> str | None:
    return next((metric for metric, limit in budgets.items() if measured[metric] > limit), None)
