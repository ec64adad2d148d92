from __future__ import annotations

import pytest

from pipeline.errors import ConfigError
from pipeline.units import METRIC_OF, METRICS, format_value, parse_limit, parse_value


@pytest.mark.parametrize(
    ("quantity", "text", "metric", "value"),
    [
        ("latency", "0.6 ms", "latency_ms", 0.6),
        ("latency", "600us", "latency_ms", 0.6),
        ("latency", "600 µs", "latency_ms", 0.6),
        ("latency", "600 μs", "latency_ms", 0.6),
        ("latency", "2e5 ns", "latency_ms", 0.2),
        ("latency", "1.5 s", "latency_ms", 1500),
        ("params", "300 k", "params", 300_000),
        ("flops", " 12 M ", "flops", 12_000_000),
        ("weights", "1.5 MiB", "weight_bytes", 1_572_864),
        ("weights", "1.5 MB", "weight_bytes", 1_500_000),
        ("weights", "2KiB", "weight_bytes", 2048),
    ],
)
def test_absolute_limits_are_in_the_metrics_own_unit(
    quantity: str, text: str, metric: str, value: float
) -> None:
    limit = parse_limit(quantity, text, "p.yaml")
    assert (limit.metric, limit.relative, limit.stated) == (metric, False, text.strip())
    assert limit.value == pytest.approx(value)


def test_a_percentage_is_a_share_of_the_largest_network() -> None:
    limit = parse_limit("params", "30 %", "p.yaml")
    assert (limit.value, limit.relative) == (pytest.approx(0.3), True)
    assert parse_limit("params", "100%", "p.yaml").value == 1


@pytest.mark.parametrize(
    ("quantity", "text", "said"),
    [
        ("latency", 0.6, "unit is missing"),
        ("latency", "0.6", "write for example '0.6 ms'"),
        ("latency", "-1 ms", "above zero"),
        ("latency", "0 ms", "above zero"),
        ("latency", "nan ms", "finite"),
        ("latency", "inf ms", "finite"),
        ("latency", "1e999 ms", "finite"),
        ("latency", "100.1 %", "at most 100 %"),
        ("latency", "1 MS", "did you mean 'ms'"),
        ("latency", "fast", "not a number with a unit"),
        ("latency", "1.2.3 ms", "not a number with a unit"),
        ("latency", True, "write for example"),
        ("latency", None, "write for example"),
        ("params", "300 ms", "unknown unit 'ms'"),
        ("latancy", "1 ms", "did you mean 'latency'"),
        ("energy", "1 J", "latency, params, flops, weights"),
    ],
)
def test_a_bad_limit_says_where_and_what(quantity: str, text: object, said: str) -> None:
    with pytest.raises(ConfigError) as failure:
        parse_limit(quantity, text, "profiles/p.yaml: tiers[0]")
    assert said in str(failure.value)
    assert str(failure.value).startswith("profiles/p.yaml: tiers[0]: ")
    assert quantity in str(failure.value)


@pytest.mark.parametrize(
    ("metric", "text", "value"),
    [
        ("params", "300k", 3e5),
        ("latency_ms", "1.0", 1.0),
        ("latency_ms", "900 us", 0.9),
        ("weight_bytes", 7, 7.0),
    ],
)
def test_values_on_the_command_line_may_leave_out_the_metrics_own_unit(
    metric: str, text: object, value: float
) -> None:
    assert parse_value(metric, text) == pytest.approx(value)


@pytest.mark.parametrize(
    ("metric", "text"), [("params", "30 %"), ("params", "0"), ("latency_ms", ""), ("ms", "1")]
)
def test_bad_values_on_the_command_line(metric: str, text: str) -> None:
    with pytest.raises(ConfigError):
        parse_value(metric, text)


@pytest.mark.parametrize(
    ("metric", "value", "text"),
    [
        ("latency_ms", 0.612, "0.612 ms"),
        ("latency_ms", 0.08125, "0.0813 ms"),
        ("latency_ms", 0.99996, "1.00 ms"),
        ("latency_ms", 25.12, "25.1 ms"),
        ("latency_ms", 1250, "1250 ms"),
        ("params", 312_345, "312 k"),
        ("params", 12_340_000, "12.3 M"),
        ("params", 999_600, "1.00 M"),
        ("params", 940, "940"),
        ("params", 0, "0"),
        ("weight_bytes", 1.5 * 2**20, "1.50 MiB"),
        ("weight_bytes", 12, "12 B"),
        ("accuracy", 0.5, "0.5"),
    ],
)
def test_values_are_shown_with_three_digits_and_a_unit(metric: str, value: float, text: str) -> None:
    assert format_value(metric, value) == text


def test_every_example_of_the_catalogue_is_a_valid_limit() -> None:
    for name, metric in METRICS.items():
        assert parse_limit(metric.quantity, metric.example, "here").metric == name
        assert METRIC_OF[metric.quantity] == name
