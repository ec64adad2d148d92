from __future__ import annotations

import re
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from sample_run import ranking, trace

from pipeline.report.charts import (
    _apart,
    accuracy_chart,
    limit_text,
    ranking_chart,
    tier_colours,
    trace_charts,
)
from pipeline.types import Json


def texts(svg: str) -> list[str]:
    root = ElementTree.fromstring(svg)
    return [element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}text")]


def test_accuracy_chart_names_tiers_and_budgets(manifest: Json) -> None:
    shown = texts(accuracy_chart(manifest["tiers"], "latency_ms"))
    assert {"S", "M", "L", "test", "architecture"} <= set(shown)
    assert {"≤ 0.15 ms", "≤ 0.3 ms", "≤ 0.6 ms"} <= set(shown)


def test_one_budget_of_all_tiers_is_drawn_once(manifest: Json) -> None:
    assert texts(accuracy_chart(manifest["tiers"], "params")).count("≤ 500 k") == 1


def test_a_metric_without_budgets_has_no_lines(manifest: Json) -> None:
    svg = accuracy_chart(manifest["tiers"], "flops")
    assert "≤" not in svg and "10 M" in texts(svg)


def test_a_wide_range_gets_round_numbers_on_a_logarithmic_axis(manifest: Json) -> None:
    for tier, flops in zip(manifest["tiers"], (1e6, 3e7, 6e7), strict=True):
        tier["measured"]["flops"] = flops
    assert {"1 M", "10 M", "50 M"} <= set(texts(accuracy_chart(manifest["tiers"], "flops")))


def test_one_tier_is_enough(manifest: Json) -> None:
    assert "M" in texts(accuracy_chart(manifest["tiers"][1:2], "latency_ms"))


def test_figures_are_the_same_bytes_whatever_a_user_has_set(manifest: Json) -> None:
    first = accuracy_chart(manifest["tiers"], "latency_ms"), ranking_chart(ranking()), trace_charts(trace())
    with matplotlib.rc_context({"axes.grid": True, "font.size": 30, "svg.fonttype": "path"}):
        again = (
            accuracy_chart(manifest["tiers"], "latency_ms"),
            ranking_chart(ranking()),
            trace_charts(trace()),
        )
    assert first == again


def test_drawing_leaves_settings_alone(manifest: Json) -> None:
    before = dict(matplotlib.rcParams)
    accuracy_chart(manifest["tiers"], "latency_ms")
    assert dict(matplotlib.rcParams) == before


def test_svg_fits_a_page(manifest: Json) -> None:
    svg = accuracy_chart(manifest["tiers"], "latency_ms")
    opening = svg[: svg.index(">")]
    assert svg.startswith("<svg ") and "viewBox" in opening and "width" not in opening
    assert "<style" not in svg and "<metadata" not in svg and "font-family" not in svg
    assert set(re.findall(r' id="([^"]+)"', svg)) <= set(re.findall(r'(?:url\(#|href="#)([^)"]+)', svg))
    assert "var(--muted, #69727c)" in svg and "var(--rule, #dfe3e7)" in svg


def test_trace_charts_show_what_was_traced() -> None:
    charts = trace_charts(trace())
    assert list(charts) == ["usage", "loss", "entropy", "effective_sample_size"]
    assert {"S", "M", "L", "training"} <= set(texts(charts["loss"]))
    assert "training" not in texts(charts["usage"])


def test_devices_are_named_where_there_are_several_and_gaps_are_left_out() -> None:
    def record(i: int) -> Json:
        first = {"tier": "cpu/S", "usage": None if i == 3 else 1.0 - i / 100}
        return {"iteration": i, "tiers": [first, {"tier": "pi/S", "usage": 0.5}]}

    charts = trace_charts([record(i) for i in range(9)])
    assert list(charts) == ["usage"]
    assert {"cpu/S", "pi/S"} <= set(texts(charts["usage"]))


def test_no_trace_no_charts() -> None:
    assert trace_charts([]) == {}
    assert trace_charts([{"iteration": 0, "evaluations": 4}] * 3) == {}


def test_long_traces_stay_small() -> None:
    assert len(trace_charts(trace(3000))["usage"]) < 40_000


def test_colours_have_contrast_on_white_and_black() -> None:
    def luminance(colour: str) -> float:
        rgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    colours = tier_colours([str(i) for i in range(15)]).values()
    assert len(set(colours)) == 15
    for value in map(luminance, colours):
        assert 1.05 / (value + 0.05) >= 3 and (value + 0.05) / 0.05 >= 3


def test_labels_are_moved_apart_evenly() -> None:
    moved = _apart({"a": 0.5, "b": 0.5, "c": 0.9}, gap=0.1)
    assert moved == pytest.approx({"a": 0.45, "b": 0.55, "c": 0.9}, abs=1e-6)


@pytest.mark.parametrize(
    ("metric", "limit", "wanted"),
    [
        ("latency_ms", 0.6, "0.6 ms"),
        ("params", 300e3, "300 k"),
        ("weight_bytes", 1.5 * 2**20, "1.5 MiB"),
        ("latency_ms", 20, "20 ms"),
    ],
)
def test_limits_for_people(metric: str, limit: float, wanted: str) -> None:
    assert limit_text(metric, limit) == wanted
