"""Figures of the report as SVG text: no fixed size, the page's own font, the same bytes every time.

Colours follow the page's light or dark scheme through its variables `--ink`, `--muted`, `--rule`, `--page`.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape

import numpy as np

from pipeline.types import FloatArray, Json
from pipeline.units import METRICS, format_value

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Matplotlib draws with these; the SVG gets the variable in their place, and the colour as its fallback.
_INK, _MUTED, _RULE, _PAGE = "#1c2126", "#69727c", "#dfe3e7", "#fdfdfe"
_VARIABLES = {_INK: "--ink", _MUTED: "--muted", _RULE: "--rule", _PAGE: "--page"}

# Small to large: a walk through the hues at one lightness, at least 3:1 against a white and a black page.
_RAMP = ("#0b93a3", "#3b82d6", "#7c6cf0", "#b558cf", "#d9527f")

_WIDTH, _HEIGHT = 5.2, 3.3  # inches
_SMALL, _TEXT = 8.5, 9.5  # points
_LOG_FROM = 6.0  # ratio of the largest to the smallest value from which an axis is logarithmic
_LABEL_WIDTH = 0.17  # of the axes
_MAX_POINTS = 240

METRIC_TITLES = {
    "latency_ms": "latency",
    "params": "parameters",
    "flops": "FLOPs",
    "weight_bytes": "size of the weights",
    "memory_bytes": "memory",
}


def tier_colours(names: Sequence[str]) -> dict[str, str]:
    """A colour per tier, given from the smallest to the largest."""
    ramp = np.array([[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in _RAMP], dtype=float)
    at = np.linspace(0, len(ramp) - 1, len(names)) if len(names) != 1 else np.array([1.0])
    rgb = np.stack([np.interp(at, np.arange(len(ramp)), ramp[:, channel]) for channel in range(3)], axis=1)
    return {name: "#" + "".join(f"{round(v):02x}" for v in row) for name, row in zip(names, rgb, strict=True)}


# ------------------------------------------------------------------------------------------ accuracy and cost


Colours = Mapping[str, str]
"""Of tiers by name, or by `device/name` where there are several devices."""


def accuracy_chart(tiers: Sequence[Json], metric: str, colours: Colours | None = None) -> str:
    """Accuracy of one device's tiers against a measured metric, with the budgets drawn in. `colours` has
    those of all tiers by name."""
    tiers = sorted((t for t in tiers if metric in t["measured"]), key=lambda t: float(t["measured"][metric]))
    given = colours or tier_colours([tier["name"] for tier in tiers])
    colours = {tier["name"]: given[tier["name"]] for tier in tiers}
    cost_K = np.array([tier["measured"][metric] for tier in tiers], dtype=float)
    percent = {
        split: np.array([100 * t["accuracy"][split] for t in tiers]) for split in ("test", "architecture")
    }
    budgets = {tier["name"]: float(tier["budgets"][metric]) for tier in tiers if metric in tier["budgets"]}

    def draw(axes: Axes) -> None:
        _scale_x(axes, np.array([*cost_K, *budgets.values()]), metric)
        _scale_y(axes, np.concatenate(list(percent.values())), below=0.20)
        _draw_budgets(axes, budgets, colours, metric)
        _draw_accuracies(axes, cost_K, percent, list(colours.values()))
        for x, y, (name, colour) in zip(cost_K, np.minimum(*percent.values()), colours.items(), strict=True):
            _note(axes, name, (x, y), (0, -7), colour, ha="center", va="top", size=_TEXT, weight="bold")

    title = METRIC_TITLES.get(metric, metric)
    return _svg(draw, f"accuracy-{metric}", "accuracy, %", title, top=0.84 if budgets else 0.90)


def _draw_budgets(axes: Axes, budgets: Mapping[str, float], colours: Mapping[str, str], metric: str) -> None:
    """Dashed lines; their values above the axes, on a second row where they would run into each other."""
    last = [-math.inf, -math.inf]
    for limit in sorted(set(budgets.values())):
        own = [name for name, value in budgets.items() if value == limit]
        colour = colours[own[0]] if len(own) == 1 else _MUTED
        axes.axvline(limit, color=colour, linewidth=1.1, dashes=(3.5, 2.5), zorder=1)
        at = float(axes.transAxes.inverted().transform(axes.transData.transform((limit, 0)))[0])
        row = 0 if at - last[0] >= _LABEL_WIDTH or last[0] < last[1] else 1
        last[row] = at
        text = f"≤ {limit_text(metric, limit)}"
        _note(axes, text, (limit, axes.get_ylim()[1]), (0, 4 + 11 * row), colour, ha="center", va="bottom")


def limit_text(metric: str, limit: float) -> str:
    """A limit for people, without zeros that say nothing: `0.6 ms`, not `0.600 ms`."""
    number, _, unit = format_value(metric, limit).partition(" ")
    number = number.rstrip("0").rstrip(".") if "." in number else number
    return f"{number} {unit}".rstrip()


def _draw_accuracies(
    axes: Axes, cost_K: FloatArray, percent: Mapping[str, FloatArray], colours: Sequence[str]
) -> None:
    for split, accuracy_K in percent.items():
        solid = split == "test"
        axes.plot(
            cost_K, accuracy_K, color=_MUTED, linewidth=1.2, linestyle="-" if solid else (0, (1, 2)), zorder=2
        )
        faces = colours if solid else [_PAGE] * len(colours)
        axes.scatter(cost_K, accuracy_K, s=34, c=faces, edgecolors=colours, linewidths=1.5, zorder=3)
    _label_ends(axes, {split: float(accuracy_K[-1]) for split, accuracy_K in percent.items()}, {})


# ----------------------------------------------------------------------------------------------- search trace

TRACES = {
    "usage": "expected cost, % of the budget",
    "loss": "loss",
    "entropy": "entropy of the distributions, share of the largest",
    "effective_sample_size": "effective sample size",
}


def trace_charts(trace: Sequence[Json], colours: Colours | None = None) -> dict[str, str]:
    """What was traced of the search: quantity → figure over its iterations. What was not traced is left out.

    A record has `iteration`, and may have `fit_loss` and `tiers`: a list with, per tier, its key `tier`
    (`device/name`) and any of the quantities in TRACES."""
    charts = {}
    for quantity, title in TRACES.items():
        lines = _traced(trace, quantity)
        fit = _line(trace, lambda record: record.get("fit_loss")) if quantity == "loss" else None
        if lines or fit is not None:
            charts[quantity] = _trace_chart(quantity, title, lines, fit, colours or tier_colours(list(lines)))
    return charts


Line = tuple[FloatArray, FloatArray]


def _traced(trace: Sequence[Json], quantity: str) -> dict[str, Line]:
    """Tier → its line, in the trace's order."""
    keys = list(dict.fromkeys(tier["tier"] for record in trace for tier in record.get("tiers", ())))
    several = len({key.partition("/")[0] for key in keys}) > 1
    found = {
        key if several else key.partition("/")[2]: _line(
            trace, partial(_value_of, key=key, quantity=quantity)
        )
        for key in keys
    }
    return {name: line for name, line in found.items() if line is not None}


def _value_of(record: Json, key: str, quantity: str) -> float | None:
    return next((tier.get(quantity) for tier in record.get("tiers", ()) if tier["tier"] == key), None)


def _line(trace: Sequence[Json], value: Callable[[Json], float | None]) -> Line | None:
    """Iterations and values, long ones as means over equal stretches; None for fewer than two values."""
    pairs = [(record["iteration"], value(record)) for record in trace]
    points = np.array([(x, y) for x, y in pairs if y is not None and math.isfinite(y)], dtype=float)
    if len(points) < 2:
        return None
    means = np.array([part.mean(axis=0) for part in np.array_split(points, min(len(points), _MAX_POINTS))])
    return means[:, 0], means[:, 1]


def _trace_chart(
    quantity: str, title: str, lines: Mapping[str, Line], fit: Line | None, colours: Colours
) -> str:
    scale = 100.0 if quantity == "usage" else 1.0

    def draw(axes: Axes) -> None:
        every = [*lines.values(), *([fit] if fit is not None else [])]
        edges = np.concatenate([x for x, _ in every])
        axes.set_xlim(edges.min(), edges.max())
        values = np.concatenate([scale * y for _, y in every])
        _scale_y(axes, np.append(values, 100.0) if quantity == "usage" else values)
        axes.xaxis.set_major_locator(_ticks(5, integer=True))
        if quantity == "usage":
            axes.axhline(100, color=_INK, linewidth=1.0, dashes=(3.5, 2.5), zorder=2)
        if fit is not None:
            axes.plot(*fit, color=_MUTED, linewidth=0.9, alpha=0.7, zorder=1)
        for name, (x, y) in lines.items():
            axes.plot(x, scale * y, color=colours[name], linewidth=1.5, zorder=3)
        ends = {name: float(scale * y[-1]) for name, (_, y) in lines.items()}
        _label_ends(
            axes, {**ends, **({"training" if lines else "": float(fit[1][-1])} if fit else {})}, colours
        )

    return _svg(draw, f"trace-{quantity}", title, "iteration", top=0.90)


def _label_ends(axes: Axes, ends: Mapping[str, float], colours: Mapping[str, str]) -> None:
    """Names beside the lines' right ends, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    at = {name: (value - low) / (high - low) for name, value in ends.items()}
    for name, y in _apart(at, gap=0.058).items():
        colour = colours.get(name, _MUTED)
        axes.text(1.02, y, name, transform=axes.transAxes, color=colour, fontsize=_SMALL, va="center")


def _apart(at: Mapping[str, float], gap: float) -> dict[str, float]:
    """Heights pushed apart, each pair by the same amount, until neighbours are `gap` from each other."""
    names = sorted(at, key=lambda name: at[name])
    heights = np.array([at[name] for name in names])
    for _ in range(200):
        short = np.maximum(gap - np.diff(heights), 0.0)
        heights[:-1] -= short / 2
        heights[1:] += short / 2
    return dict(zip(names, heights.tolist(), strict=True))


# ---------------------------------------------------------------------------------------------- ranking check


def ranking_chart(ranking: Json, colours: Colours | None = None) -> str:
    """Briefly trained accuracy of some networks against the loss the search gave them, by tier."""
    several = len({tier["device"] for tier in ranking["tiers"]}) > 1

    def name_of(entry: Json) -> str:
        return f"{entry['device']}/{entry['name']}" if several else str(entry["name"])

    colours = colours or tier_colours([name_of(tier) for tier in ranking["tiers"]])
    points: dict[str, list[tuple[float, float]]] = {name_of(tier): [] for tier in ranking["tiers"]}
    for point in ranking["points"]:
        points[name_of(point)].append((point["loss"], 100 * point["accuracy"]))
    points = {name: own for name, own in points.items() if own}

    def draw(axes: Axes) -> None:
        losses, accuracies = np.array([point for own in points.values() for point in own]).T
        margin = 0.06 * (float(np.ptp(losses)) or 1.0)
        axes.set_xlim(losses.max() + margin, losses.min() - margin)
        axes.xaxis.set_major_locator(_ticks(5))
        _scale_y(axes, accuracies)
        for name, own in points.items():
            loss_N, accuracy_N = np.array(own).T
            axes.scatter(loss_N, accuracy_N, s=30, color=colours[name], linewidths=0, zorder=3)
        means = {name: float(np.mean([accuracy for _, accuracy in own])) for name, own in points.items()}
        _label_ends(axes, means, colours)

    return _svg(
        draw,
        "ranking",
        "accuracy when trained on its own, %",
        "loss in the search, better to the right",
        top=0.90,
    )


# --------------------------------------------------------------------------------------------------- plumbing


def _ticks(count: int, integer: bool = False) -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(count, integer=integer, steps=[1, 2, 2.5, 5, 10])


def _scale_x(axes: Axes, values: FloatArray, metric: str) -> None:
    """Limits, and ticks at round numbers of the unit that the largest value is shown in."""
    low, high = float(values.min()), float(values.max())
    unit = format_value(metric, high).partition(" ")[2]
    scale = METRICS[metric].units.get(unit, 1.0) if metric in METRICS else 1.0
    if low > 0 and high / low >= _LOG_FROM:
        margin = (high / low) ** 0.08
        axes.set_xscale("log")
        left, right = low / margin, high * margin
        ticks = _round_numbers(left / scale, right / scale)
    else:
        margin = 0.10 * ((high - low) or high or 1.0)
        left, right = max(0.0, low - margin), high + margin
        ticks = [tick for tick in _ticks(4).tick_values(left / scale, right / scale) if tick > 0]
    axes.set_xlim(left, right)
    axes.set_xticks([tick * scale for tick in ticks if left <= tick * scale <= right])
    axes.set_xticks([], minor=True)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / scale:.6g} {unit}".rstrip())


def _round_numbers(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten, or over more than a factor of 300 the powers alone."""
    leading = (1, 2, 5) if high / low <= 300 else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [digit * 10.0**power for power in powers for digit in leading]


def _scale_y(axes: Axes, values: FloatArray, below: float = 0.08) -> None:
    low, high = float(values.min()), float(values.max())
    span = (high - low) or abs(high) * 0.02 or 1.0
    axes.set_ylim(low - below * span, high + 0.08 * span)
    axes.yaxis.set_major_locator(_ticks(5))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.6g}".replace("-", "−"))


def _note(
    axes: Axes,
    text: str,
    at: tuple[float, float],
    offset: tuple[float, float],
    colour: str,
    *,
    ha: Any,
    va: Any,
    size: float = _SMALL,
    weight: str = "normal",
) -> None:
    axes.annotate(
        text,
        at,
        xytext=offset,
        textcoords="offset points",
        ha=ha,
        va=va,
        color=colour,
        fontsize=size,
        weight=weight,
        zorder=5,
    )


def _svg(draw: Callable[[Axes], None], name: str, y_title: str, x_title: str, *, top: float) -> str:
    """The figure that `draw` draws on prepared axes whose top is at a share `top` of the height. A file's own
    matplotlib settings do not reach it."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    written = io.StringIO()
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": name, "axes.unicode_minus": True})
        figure = Figure(figsize=(_WIDTH, _HEIGHT))
        figure.patch.set_visible(False)
        axes = figure.add_axes((0.085, 0.135, 0.72, top - 0.135))
        _strip(axes)
        draw(axes)
        axes.set_xlabel(x_title, color=_MUTED, fontsize=_SMALL, labelpad=5)
        figure.text(0.01, 0.985, y_title, color=_MUTED, fontsize=_SMALL, ha="left", va="top")
        FigureCanvasSVG(figure)
        figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None})
    return _for_page(written.getvalue(), f"{y_title} against {x_title}")


def _strip(axes: Axes) -> None:
    """Nothing but a base line and faint horizontal rules."""
    axes.patch.set_visible(False)
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_RULE)
    axes.grid(axis="y", color=_RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=_SMALL, labelcolor=_MUTED, pad=4)


def _for_page(svg: str, label: str) -> str:
    """The bare `<svg>` element: variables for colours, the page's font, only ids that something refers to."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>\s*", "", svg, flags=re.DOTALL)
    referred = set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", svg))
    svg = re.sub(r' id="([^"]+)"', lambda m: m[0] if m[1] in referred else "", svg)
    svg = re.sub(r"font: (?:(\d+|bold) )?([\d.]+px)[^;\"]*", _font, svg)  # matplotlib < 3.9
    svg = re.sub(r" font-family: [^;\"]*;", "", svg)
    svg = re.sub(r"(<text[^>]*fill: )(#[0-9a-f]{6})", _text_colour, svg)
    for colour, variable in _VARIABLES.items():
        svg = re.sub(rf"(?<!, )(?<!oklab, ){colour}", f"var({variable}, {colour})", svg)
    opening = re.match(r"<svg[^>]*>", svg)
    assert opening is not None
    view_box = re.search(r'viewBox="[^"]+"', opening[0])
    assert view_box is not None
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    head = f'<svg {names} {view_box[0]} role="img">'
    return f"{head}<title>{escape(label)}</title>{svg[opening.end() :]}".strip()


def _font(style: re.Match[str]) -> str:
    weight = f"; font-weight: {style[1]}" if style[1] else ""
    return f"font-size: {style[2]}{weight}"


def _text_colour(found: re.Match[str]) -> str:
    """Words need more contrast than lines: a tier's colour is drawn towards the ink."""
    if found[2] in _VARIABLES:
        return found[0]
    return f"{found[1]}color-mix(in oklab, {found[2]} 72%, var(--ink, {_INK}))"
