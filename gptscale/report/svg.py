"""Curves and shares as SVG that a screen reader can name and a phone can show. Everything from outside is escaped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

import numpy as np

from gptscale.report.curves import Axis, Curve, Floats, finite, thinned, tick_texts
from gptscale.report.style import COLOURS, DASHES

WIDTH, HEIGHT = 480, 280
"""Of the drawing, in its own units. On a phone a unit is 0.65 pixels; the style sheet then doubles as large a text."""
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 10, 50
COLUMNS = 240
"""Parts of the x axis that keep their extremes."""
MARK = 4.0


@dataclass(frozen=True)
class Bar:
    """From 0 up to `value`, over x from `low` to `high`."""

    low: float
    high: float
    value: float


@dataclass(frozen=True)
class Chart:
    """One drawing. `identity` is unique on its page."""

    identity: str
    title: str
    unit: str
    """Of y, and what else the caption says in plain letters."""
    x_label: str
    x: Axis
    y: Axis
    curves: Sequence[Curve]
    description: str
    """The drawing in a sentence or two, for who cannot see it."""
    sessions: Sequence[float] = field(default=())
    """x at which the run was resumed."""
    skipped: Sequence[float] = field(default=())
    """x of updates that were left out because the gradient was not finite."""
    explains_events: bool = False
    """Whether its key says what the two are: it need not be said under every chart of a page."""
    bars: Sequence[Bar] = field(default=())
    """Of a histogram, which has no curves."""
    colour: int = 0
    """Of the bars."""


def figure(chart: Chart) -> str:
    """The chart with its caption and, where there is more than one curve, its key."""
    named = [curve for curve in chart.curves if curve.name]
    entries = [f"<li>{_swatch(curve)}{escape(curve.name)}</li>" for curve in named] if len(named) > 1 else []
    if chart.sessions and chart.explains_events:
        entries.append(f"<li>{_upright('session')}resumed</li>")
    if chart.skipped and chart.explains_events:
        entries.append(f"<li>{_upright('skipped')}update skipped</li>")
    key = f'<ul class="key">{"".join(entries)}</ul>' if entries else ""
    scale = " (logarithmic)" if chart.y.log else f" × {_power(chart.y.unit)}" if chart.y.unit != 1 else ""
    caption = f"<figcaption>{escape(chart.title)} <span>{escape(chart.unit)}{scale}</span></figcaption>"
    return f"<figure>{caption}{draw(chart)}{key}</figure>"


def draw(chart: Chart) -> str:
    title, description = f"{chart.identity}-title", f"{chart.identity}-desc"
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="{title} {description}">'
        f'<title id="{title}">{escape(chart.title)}</title><desc id="{description}">{escape(chart.description)}</desc>'
        f"{_axes(chart)}{_bars(chart)}{_events(chart)}"
        f"{''.join(_curve(chart, curve) for curve in chart.curves)}</svg>"
    )


def _across(axis: Axis, values: Floats) -> Floats:
    return LEFT + axis.share(values) * (WIDTH - LEFT - RIGHT)


def _up(axis: Axis, values: Floats) -> Floats:
    return HEIGHT - BOTTOM - axis.share(values) * (HEIGHT - TOP - BOTTOM)


def _axes(chart: Chart) -> str:
    parts = []
    for y, text in zip(_up(chart.y, np.array(chart.y.ticks)).tolist(), _texts(chart.y), strict=True):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{y:.1f}" dy=".35em" text-anchor="end">{text}</text>')
    base = HEIGHT - BOTTOM
    for x, text in zip(_across(chart.x, np.array(chart.x.ticks)).tolist(), _texts(chart.x), strict=True):
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{base}" y2="{base + 4}"/>')
        anchor = "end" if x > WIDTH - RIGHT - 12 else "middle"
        right = min(x + 10, WIDTH - 2) if anchor == "end" else x
        parts.append(f'<text x="{right:.1f}" y="{base + 19}" text-anchor="{anchor}">{text}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle:.0f}" y="{HEIGHT - 9}" text-anchor="middle">{escape(chart.x_label)}</text>')
    return "".join(parts)


def _bars(chart: Chart) -> str:
    """One unit of air between neighbours; what is above 0 is at least a unit high, so that it is seen."""
    parts = []
    base = HEIGHT - BOTTOM
    for bar in chart.bars:
        left, right = _across(chart.x, np.array([bar.low, bar.high])).tolist()
        height = max(1.0, base - float(_up(chart.y, np.array(bar.value)))) if bar.value > 0 else 0.0
        if height:
            parts.append(
                f'<rect class="part c{chart.colour % COLOURS}" x="{left + 0.5:.1f}" y="{base - height:.1f}" '
                f'width="{max(1.0, right - left - 1):.1f}" height="{height:.1f}"/>'
            )
    return "".join(parts)


def _power(unit: float) -> str:
    digits = str(round(-math.log10(unit))).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"10⁻{digits}"


def _texts(axis: Axis) -> list[str]:
    if axis.log and min(axis.ticks, default=0) >= 1:  # 100, 1,000, 10k: each in the form that suits it
        return [text for tick in axis.ticks for text in tick_texts([tick])]
    return tick_texts([tick / axis.unit for tick in axis.ticks])


def _events(chart: Chart) -> str:
    parts = []
    base = HEIGHT - BOTTOM
    for x in _pixels(chart.x, chart.sessions):
        parts.append(f'<line class="session" x1="{x}" x2="{x}" y1="{TOP}" y2="{base}"/>')
    for x in _pixels(chart.x, chart.skipped):
        parts.append(f'<line class="skipped" x1="{x}" x2="{x}" y1="{base - 7}" y2="{base}"/>')
    return "".join(parts)


def _pixels(axis: Axis, values: Sequence[float]) -> list[float]:
    """Places across, without those that would be drawn on each other."""
    return sorted({round(2 * x) / 2 for x in _across(axis, np.array(values, dtype=np.float64)).tolist()})


def _curve(chart: Chart, curve: Curve) -> str:
    known = finite(curve)
    if not len(known):
        return ""
    x, y = thinned(curve.x, curve.y, COLUMNS)
    places = list(zip(_across(chart.x, x).tolist(), _up(chart.y, y).tolist(), strict=True))
    colour = f"c{curve.colour % COLOURS}"
    path, lonely = _path(places)
    look = "faint" if curve.look == "faint" else "line"
    dash = DASHES[curve.colour // COLOURS % len(DASHES)] if curve.look == "points" else ""
    drawn = f'<path class="{look} {colour}"{_dash(dash)} d="{path}"/>' if path else ""
    if curve.look == "points":
        crowded = len(places) > 60
        marked = [place for place in places if place[1] == place[1]]
        return drawn + "".join(_mark(place, curve.colour, MARK * (0.6 if crowded else 1)) for place in marked)
    return drawn + "".join(f'<circle class="mark {colour}" cx="{a:.1f}" cy="{b:.1f}" r="2"/>' for a, b in lonely)


def _path(places: Sequence[tuple[float, float]]) -> tuple[str, list[tuple[float, float]]]:
    """Lines between neighbours, broken at gaps, and the points that have no neighbour."""
    pieces: list[list[tuple[float, float]]] = [[]]
    for place in places:
        if place[1] == place[1]:
            pieces[-1].append(place)
        elif pieces[-1]:
            pieces.append([])
    lines = ["M" + " ".join(f"{x:.1f},{y:.1f}" for x, y in piece) for piece in pieces if len(piece) > 1]
    return "".join(lines), [piece[0] for piece in pieces if len(piece) == 1]


def _mark(place: tuple[float, float], number: int, radius: float) -> str:
    """Circle, square, triangle or diamond by number."""
    x, y = place
    paint = f'class="mark c{number % COLOURS}"'
    match number % 4:
        case 0:
            return f'<circle {paint} cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}"/>'
        case 1:
            side = 1.7 * radius
            return (
                f'<rect {paint} x="{x - side / 2:.1f}" y="{y - side / 2:.1f}" width="{side:.1f}" height="{side:.1f}"/>'
            )
        case 2:
            r = 1.15 * radius
            return f'<path {paint} d="M{x:.1f},{y - r:.1f} {x + r:.1f},{y + r:.1f} {x - r:.1f},{y + r:.1f}Z"/>'
        case _:
            r = 1.3 * radius
            return (
                f'<path {paint} d="M{x:.1f},{y - r:.1f} {x + r:.1f},{y:.1f} {x:.1f},{y + r:.1f} {x - r:.1f},{y:.1f}Z"/>'
            )


def _dash(dash: str) -> str:
    return f' stroke-dasharray="{dash}"' if dash else ""


def _swatch(curve: Curve) -> str:
    colour = f"c{curve.colour % COLOURS}"
    look = "faint" if curve.look == "faint" else "line"
    dash = DASHES[curve.colour // COLOURS % len(DASHES)] if curve.look == "points" else ""
    mark = _mark((14.0, 6.0), curve.colour, MARK) if curve.look == "points" else ""
    line = f'<path class="{look} {colour}"{_dash(dash)} d="M1,6 27,6"/>'
    return f'<svg viewBox="0 0 28 12" aria-hidden="true">{line}{mark}</svg>'


def _upright(look: str) -> str:
    return f'<svg viewBox="0 0 28 12" aria-hidden="true"><line class="{look}" x1="14" x2="14" y1="0" y2="12"/></svg>'


def shares_bar(identity: str, title: str, shares: Sequence[tuple[str, float, int]]) -> str:
    """One bar cut into parts, each a name, a share and the number of its colour."""
    total = sum(share for _, share, _ in shares) or 1.0
    parts, x = [], 0.0
    for name, share, number in shares:
        width = 1000 * share / total
        if width > 0:
            parts.append(
                f'<rect class="part c{number % COLOURS}" x="{x:.1f}" width="{max(0.0, width - 3):.1f}" height="10">'
                f"<title>{escape(name)}: {100 * share / total:.1f} %</title></rect>"
            )
        x += width
    said = ", ".join(f"{name} {100 * share / total:.1f} %" for name, share, _ in shares)
    return (
        f'<svg class="bar" viewBox="0 0 1000 10" preserveAspectRatio="none" role="img" '
        f'aria-labelledby="{identity}-title {identity}-desc"><title id="{identity}-title">{escape(title)}</title>'
        f'<desc id="{identity}-desc">{escape(said)}</desc>{"".join(parts)}</svg>'
    )


def square(number: int) -> str:
    """The colour of a part of a bar, for its row in a table."""
    return (
        f'<svg class="square" width="12" height="12" viewBox="0 0 12 12" aria-hidden="true">'
        f'<rect class="part c{number % COLOURS}" width="12" height="12" rx="2"/></svg> '
    )
