from __future__ import annotations

import pytest

from pipeline.deploy.answer import MIN_SPEED_UP, choose

BUDGETS = {"latency_ms": 1.0, "weight_bytes": 1000.0}


def costs(latency_ms: float, weight_bytes: float = 900) -> dict[str, float]:
    return {"latency_ms": latency_ms, "weight_bytes": weight_bytes, "params": 1}


@pytest.mark.parametrize(
    ("float32", "int8", "refusal", "lower", "reason"),
    [
        (costs(0.9), costs(0.6), None, True, "int8 is faster than float32 (1.50 times its speed)"),
        (costs(0.9), costs(0.6), "int8 loses 2 points", False, "int8 loses 2 points"),
        (costs(0.6), costs(0.9), None, False, "int8 is slower than float32 (0.67 times its speed)"),
        (costs(0.9), costs(0.9 / MIN_SPEED_UP * 1.001), None, False, "no faster than float32 (1.03 times"),
        (costs(0.9), costs(0.9 / MIN_SPEED_UP * 0.999), None, True, "faster than float32 (1.03 times"),
        (costs(0.9), costs(0.6, 1100), None, False, "and misses a budget: weight_bytes is 1.07 KiB"),
        (costs(1.01), costs(0.99), None, True, "which misses its budget of latency_ms"),
        (costs(1.2), costs(1.1), None, False, "misses a budget: latency_ms is 1.10 ms, at most 1.00 ms"),
    ],
)
def test_the_answer_is_the_faster_file_that_keeps_everything(
    float32: dict[str, float], int8: dict[str, float], refusal: str | None, lower: bool, reason: str
) -> None:
    answer = choose(float32, int8, BUDGETS, precision="int8", refusal=refusal)
    assert answer.lower == lower and reason in answer.reason


def test_without_budgets_speed_alone_decides() -> None:
    assert choose(costs(5), costs(2), {}, precision="fp16").lower
    assert not choose(costs(2), costs(5), {}, precision="fp16").lower
