from __future__ import annotations

import copy
import math

import pytest

from pipeline.errors import ConfigError
from pipeline.report.select import nearest, select
from pipeline.types import Json


def name(tier: Json | None) -> str | None:
    return None if tier is None else str(tier["name"])


@pytest.mark.parametrize(
    ("limits", "wanted"),
    [
        ({}, "L"),
        ({"latency_ms": 1.0}, "L"),
        ({"latency_ms": 0.573}, "L"),  # exactly at the limit is kept
        ({"latency_ms": 0.572}, "M"),  # although L's budget of 0.6 is what it was searched for
        ({"latency_ms": 1.0, "params": 100_000}, "S"),
        ({"latency_ms": 0.1}, None),
        ({"flops": 9_180_000, "weight_bytes": 700_000}, "M"),
    ],
)
def test_most_accurate_that_keeps_all_limits(
    manifest: Json, limits: dict[str, float], wanted: str | None
) -> None:
    assert name(select(manifest, limits)) == wanted


def test_accuracy_is_that_of_the_architecture_split(manifest: Json) -> None:
    manifest["tiers"][0]["accuracy"] = {"architecture": 0.93, "test": 0.1}
    assert name(select(manifest, {})) == "S"


def test_a_tie_goes_to_the_smaller(manifest: Json) -> None:
    for tier in manifest["tiers"]:
        tier["accuracy"]["architecture"] = 0.9
    assert name(select(manifest, {})) == "S"


def test_a_metric_that_was_not_measured(manifest: Json) -> None:
    with pytest.raises(ConfigError, match="'peak_memory_bytes'; this run measured: flops, latency_ms"):
        select(manifest, {"peak_memory_bytes": 1e6})


def test_a_tier_without_the_metric_does_not_qualify(manifest: Json) -> None:
    manifest["tiers"][0]["measured"]["peak_memory_bytes"] = 5.0
    assert name(select(manifest, {"peak_memory_bytes": 10.0})) == "S"


@pytest.mark.parametrize("limit", [0.0, -1.0, math.nan, math.inf])
def test_senseless_limits(manifest: Json, limit: float) -> None:
    with pytest.raises(ConfigError, match="above zero"):
        select(manifest, {"latency_ms": limit})


def test_several_devices(manifest: Json) -> None:
    other = copy.deepcopy(manifest["tiers"][2])
    other["device"], other["measured"]["latency_ms"] = "pi", 4.0
    manifest["tiers"].append(other)
    with pytest.raises(ConfigError, match="--device, one of cpu-1thread, pi"):
        select(manifest, {"latency_ms": 5.0})
    found = select(manifest, {"latency_ms": 5.0}, device="pi")
    assert found is not None and found["device"] == "pi"
    assert select(manifest, {"latency_ms": 3.0}, device="pi") is None
    assert name(select(manifest, {"params": 100_000})) == "S"
    with pytest.raises(ConfigError, match="no tier for device 'gpu'.*cpu-1thread, pi"):
        select(manifest, {}, device="gpu")


def test_nearest_is_the_cheapest(manifest: Json) -> None:
    assert nearest(manifest, "latency_ms")["name"] == "S"
