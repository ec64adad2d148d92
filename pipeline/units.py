"""Limits and values with their units: what a person writes (`0.6 ms`, `300 k`, `30 %`) and what they read.

A *quantity* is what a profile limits (`latency`); a *metric* is the column it is compared with, and names its
own unit (`latency_ms`). Byte prefixes are exact: kB and MB are powers of 1000, KiB and MiB powers of 1024.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pipeline.errors import ConfigError
from pipeline.types import Limit

_COUNT = {"k": 1e3, "M": 1e6, "G": 1e9}
_BYTES = {"B": 1.0, "kB": 1e3, "KiB": 2.0**10, "MB": 1e6, "MiB": 2.0**20, "GB": 1e9, "GiB": 2.0**30}


@dataclass(frozen=True, slots=True)
class Metric:
    """One thing that a tier can limit. `units` maps a unit to its size in the metric's own unit; `shown`
    lists the units that people are shown, smallest first ("" for a bare count)."""

    quantity: str
    units: Mapping[str, float]
    shown: tuple[str, ...]
    example: str
    description: str


METRICS: dict[str, Metric] = {
    "latency_ms": Metric(
        "latency",
        {"ns": 1e-6, "us": 1e-3, "µs": 1e-3, "μs": 1e-3, "ms": 1.0, "s": 1e3},
        ("ms",),
        "0.6 ms",
        "time of one run on the device, measured with ONNX Runtime",
    ),
    "params": Metric("params", _COUNT, ("", "k", "M", "G"), "300 k", "trained parameters"),
    "flops": Metric(
        "flops",
        _COUNT,
        ("", "k", "M", "G"),
        "12 M",
        "FLOPs of one image; one multiply-add is one FLOP, as in fvcore",
    ),
    "weight_bytes": Metric(
        "weights",
        _BYTES,
        ("B", "KiB", "MiB", "GiB"),
        "1.5 MiB",
        "bytes of the deployed weights",
    ),
    "memory_bytes": Metric(
        "memory",
        _BYTES,
        ("B", "KiB", "MiB", "GiB"),
        "2 MiB",
        "bytes of the weights and of the feature maps that are alive at once",
    ),
}

METRIC_OF: dict[str, str] = {metric.quantity: name for name, metric in METRICS.items()}
"""Quantity → metric name."""

_NUMBER_AND_UNIT = re.compile(r"([+-]?(?:nan|inf(?:inity)?|[\d.]+(?:[eE][+-]?\d+)?))\s*(\S*)", re.IGNORECASE)


def parse_limit(quantity: str, text: object, where: str) -> Limit:
    """A limit as a person states it. A percentage becomes a share in (0, 1] of the space's largest network.

    `where` names the file and the section that holds `quantity`. Raises ConfigError."""
    if quantity not in METRIC_OF:
        raise ConfigError(
            f"{where}: unknown metric '{quantity}'{_nearest(quantity, METRIC_OF)}; "
            f"a tier can limit: {', '.join(METRIC_OF)}"
        )
    name = METRIC_OF[quantity]
    metric = METRICS[name]
    field = f"{where}: '{quantity}' is {text!r}"
    number, unit = _split(text, field, metric)
    if unit == "%":
        if number > 100:
            raise ConfigError(f"{field}: a share of the largest network is at most 100 %")
        return Limit(name, number / 100, relative=True, stated=str(text).strip())
    if not unit:
        raise ConfigError(
            f"{field}: the unit is missing; {_expected(metric)} or '30 %' of the largest network"
        )
    return Limit(name, _scaled(number, unit, field, metric), relative=False, stated=str(text).strip())


def parse_value(metric: str, text: object, where: str | None = None) -> float:
    """A value in `metric`'s own unit, from the command line: a bare number already is in that unit.

    `where` names the flag for the message. Raises ConfigError."""
    if metric not in METRICS:
        raise ConfigError(
            f"unknown metric '{metric}'{_nearest(metric, METRICS)}; there are: {', '.join(METRICS)}"
        )
    field = f"{where or metric} is {str(text)!r}"
    number, unit = _split(text, field, METRICS[metric])
    return _scaled(number, unit, field, METRICS[metric]) if unit else number


def format_value(metric: str, value: float) -> str:
    """`value` with three significant digits and its unit, for people: `0.612 ms`, `312 k`, `1.50 MiB`."""
    known = METRICS.get(metric)
    if known is None or not math.isfinite(value):
        return f"{value:g}"
    scales = [(known.units.get(unit, 1.0), unit) for unit in known.shown]
    scale, unit = next((s for s in reversed(scales) if abs(value) >= 0.9995 * s[0]), scales[0])
    return f"{_three_digits(value / scale, whole=scale == 1.0 and len(scales) > 1)} {unit}".rstrip()


def _three_digits(value: float, whole: bool) -> str:
    if whole or value == 0:
        return f"{value:.0f}"
    magnitude = math.floor(math.log10(abs(float(f"{value:.2e}"))))
    return f"{value:.{max(0, 2 - magnitude)}f}"


def _split(text: object, field: str, metric: Metric) -> tuple[float, str]:
    """Number (positive, finite) and unit ("" when there is none)."""
    if isinstance(text, bool) or not isinstance(text, str | int | float):
        raise ConfigError(f"{field}: {_expected(metric)}")
    match = _NUMBER_AND_UNIT.fullmatch(str(text).strip())
    try:
        number = float(match.group(1)) if match else math.nan
    except ValueError:
        match = None
    if match is None:
        raise ConfigError(f"{field}: is not a number with a unit; {_expected(metric)}")
    if not math.isfinite(number) or number <= 0:
        raise ConfigError(f"{field}: must be a finite number above zero")
    return number, match.group(2)


def _scaled(number: float, unit: str, field: str, metric: Metric) -> float:
    if unit not in metric.units:
        raise ConfigError(
            f"{field}: unknown unit '{unit}'{_nearest_unit(unit, metric.units)}; {_expected(metric)}; "
            f"units: {', '.join(metric.units)}"
        )
    value = number * metric.units[unit]
    if not math.isfinite(value) or value == 0:
        raise ConfigError(f"{field}: is out of range")
    return value


def _expected(metric: Metric) -> str:
    return f"write for example '{metric.example}'"


def _nearest(name: str, valid: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(valid), n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""


def _nearest_unit(unit: str, units: Iterable[str]) -> str:
    same = [known for known in units if known.lower() == unit.lower()]
    return f" (did you mean '{same[0]}'?)" if same else ""
