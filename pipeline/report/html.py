"""The report that people read: one HTML file with its style and figures inside, opening from disk.

Nothing is loaded from a network and nothing runs: no script, every text escaped.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from pipeline.report.charts import (
    METRIC_TITLES,
    Colours,
    accuracy_chart,
    limit_text,
    ranking_chart,
    tier_colours,
    trace_charts,
)
from pipeline.report.manifest import answer_file, tier_key
from pipeline.types import Json
from pipeline.units import format_value

TEMPLATE = "report.html.j2"


def render_report(manifest: Json, trace: Sequence[Json] = ()) -> str:
    """The report as HTML, from what `build_manifest` made and the search's trace (`trace_charts`)."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "value": lambda value, metric: format_value(metric, value),
        "limit": lambda value, metric: limit_text(metric, value),
        "percent": percent,
        "duration": duration,
        "count_text": count_text,
        "flat": flat,
    }
    colours = _colours(manifest["tiers"])
    page = environment.get_template(TEMPLATE).render(
        m=manifest,
        devices=[
            _device(manifest, name, list(tiers), colours) for name, tiers in _by_device(manifest["tiers"])
        ],
        titles=METRIC_TITLES,
        summary=_summary(manifest),
        trace_charts=trace_charts(trace, colours),
        ranking=_ranking(manifest, colours),
    )
    return page + "\n"


def _by_device(tiers: Sequence[Json]) -> Any:
    device = operator.itemgetter("device")
    return groupby(sorted(tiers, key=device), key=device)


def _colours(tiers: Sequence[Json]) -> Colours:
    """One a tier on the whole page, from the smallest to the largest; by `device/name`, and where no other
    tier has the name, by name as well."""
    keys = [tier_key(tier) for tier in sorted(tiers, key=lambda tier: float(tier["params"]))]
    of_key = tier_colours(keys)
    names = Counter(tier["name"] for tier in tiers)
    alone = {tier["name"]: of_key[tier_key(tier)] for tier in tiers if names[tier["name"]] == 1}
    return {**of_key, **alone}


def _device(manifest: Json, name: str, tiers: list[Json], colours: Colours) -> Json:
    metrics = [m for m in METRIC_TITLES if any(m in tier["measured"] for tier in tiers)]
    metrics += sorted({m for tier in tiers for m in tier["measured"]} - set(metrics))
    limited = [m for m in metrics if any(m in tier["budgets"] for tier in tiers)]
    drawn = [metric for metric in metrics if metric != "memory_bytes" or metric in limited]
    own = {tier["name"]: colours[tier_key(tier)] for tier in tiers}
    return {
        "name": name,
        "profile": manifest["profiles"][name],
        "costs": manifest["costs"].get(name),
        "tiers": [{**tier, "file": answer_file(tier)} for tier in tiers],
        "precisions": [(tier, _both_files(tier)) for tier in tiers if tier.get("precision")],
        "limited": limited,
        "free": [metric for metric in ("params", "flops", "weight_bytes") if metric not in limited],
        "colours": own,
        "recipes": _recipes(tiers),
        "charts": [accuracy_chart(tiers, metric, own) for metric in drawn],
    }


def _both_files(tier: Json) -> Json:
    """The float32 file and the one of the precision asked for, of the role that was timed, with the accuracy
    of their kind."""
    role = answer_file(tier)["role"]

    def file_of(precision: str) -> Json:
        files = [file for file in tier["files"] if file["precision"] == precision]
        timed = next(file for file in files if file["role"] == role)
        accuracy = next(file["accuracy"] for file in files if file["role"] == "onnx")
        return {**timed, "accuracy": accuracy}

    return {"float32": file_of("fp32"), "lower": file_of(tier["precision"]["asked"])}


def _recipes(tiers: Sequence[Json]) -> list[tuple[list[str], Json]]:
    """The different training recipes, each with the names of its tiers."""
    found: list[tuple[list[str], Json]] = []
    for tier in tiers:
        names = next((names for names, recipe in found if recipe == tier["training"]["recipe"]), None)
        if names is None:
            found.append(([tier["name"]], tier["training"]["recipe"]))
        else:
            names.append(tier["name"])
    return found


def _summary(manifest: Json) -> Json:
    tests = [tier["accuracy"]["test"] for tier in manifest["tiers"]]
    uses = [share for tier in manifest["tiers"] for share in tier["use"].values()]
    return {
        "networks": len(manifest["tiers"]),
        "devices": ", ".join(sorted({tier["device"] for tier in manifest["tiers"]})),
        "lowest": min(tests),
        "highest": max(tests),
        "largest_use": max(uses, default=None),
        "seconds": sum(manifest["stages"].values()),
    }


def _ranking(manifest: Json, colours: Colours) -> Json | None:
    ranking = manifest["search"].get("ranking")
    if ranking is None:
        return None
    several = len(ranking.get("points") or ()) > 1
    return {**ranking, "chart": ranking_chart(ranking, colours) if several else None}


# ------------------------------------------------------------------------------------------ values for people


def percent(share: float, digits: int = 2) -> str:
    """`0.98125` → `98.12 %`."""
    return f"{100 * share:.{digits}f} %"


def duration(seconds: float) -> str:
    """`4.2 s`, `3 min 12 s`, `1 h 05 min`."""
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def count_text(count: float) -> str:
    """`50000` → `50 000` with thin spaces, `2.3e10` → `2.3 × 10^10`."""
    if count < 1e9:
        return f"{round(count):,}".replace(",", "\u202f")
    mantissa, _, power = f"{count:.1e}".partition("e")
    return f"{mantissa} × 10^{int(power)}"


def flat(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """A nested record as (dotted name, text) rows, in its own order."""
    if isinstance(value, dict) and value:
        return [
            row
            for key, inner in value.items()
            for row in flat(inner, f"{prefix}.{key}" if prefix else str(key))
        ]
    if isinstance(value, list | tuple) and any(isinstance(inner, dict) for inner in value):
        return [row for index, inner in enumerate(value) for row in flat(inner, f"{prefix}.{index}")]
    return [(prefix, _text(value))]


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or value == {}:
        return "—"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return ", ".join(_text(item) for item in value) or "—"
    return str(value)
