"""report.html: a run in one self-contained file, drawn from metrics.jsonl. No scripts, no network."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gptscale.runtime.files import write_bytes_atomically
from gptscale.train.metrics import read_metrics

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT, LEFT, BOTTOM = 640, 260, 64, 34
MAX_POINTS = 600

STYLE = """
:root { color-scheme: light dark; --line: #2563eb; --mark: #d97706; --grid: #8884; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 44rem; margin: 2rem auto; padding: 0 1rem; }
svg { width: 100%; height: auto; font-size: 12px; }
svg text { fill: currentColor; } .grid { stroke: var(--grid); }
.line { fill: none; stroke: var(--line); stroke-width: 1.5; } .mark { fill: var(--mark); }
table { border-collapse: collapse; width: 100%; } td { padding: .1rem .6rem .1rem 0; vertical-align: top; }
td + td { font-variant-numeric: tabular-nums; overflow-wrap: anywhere; } pre { overflow-x: auto; }
"""


def write_report(target: Path, metrics: Path, title: str, facts: Mapping[str, str], config_yaml: str) -> None:
    """Draw the curves of a run and write them with its facts and settings."""
    lines = read_metrics(metrics)
    steps = [line for line in lines if "train/loss" in line]
    evaluations = [line for line in lines if "eval/loss" in line]
    tokens_at = {line["step"]: line["tokens"] for line in steps}
    heldout = [(tokens_at[line["step"]], line["eval/loss"]) for line in evaluations if line["step"] in tokens_at]
    sections = [
        _section("Loss (nats a token) against tokens; dots: held-out", _points(steps, "train/loss"), heldout),
        _section("Gradient norm before clipping", _points(steps, "train/grad_norm")),
        _section("Learning rate", _points(steps, "train/lr")),
        _section("Tokens a second", _points(steps, "throughput/tokens_per_sec")),
    ]
    rows = "".join(f"<tr><td>{html.escape(k)}</td><td>{html.escape(v)}</td></tr>" for k, v in facts.items())
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>"
        f"<h1>{html.escape(title)}</h1><table>{rows}</table>{''.join(sections)}"
        f"<h2>Settings</h2><pre>{html.escape(config_yaml)}</pre></body></html>\n"
    )
    write_bytes_atomically(target, page.encode())


def _points(lines: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """(tokens, value) of every line with a finite value, thinned evenly."""
    found = [(float(line["tokens"]), float(line[key])) for line in lines if line[key] is not None]
    return found[:: max(1, math.ceil(len(found) / MAX_POINTS))]


def _section(title: str, points: Points, marks: Points = ()) -> str:
    return f"<h2>{html.escape(title)}</h2>{chart(points, marks)}" if points else ""


def chart(points: Points, marks: Points = ()) -> str:
    """An SVG line through `points` with `marks` as dots, axes labelled at three ticks each."""
    xs = [x for x, _ in (*points, *marks)]
    ys = [y for _, y in (*points, *marks)]
    low_x, high_x, low_y, high_y = min(xs), max(xs), min(ys), max(ys)

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - low_x) / (high_x - low_x) if high_x > low_x else 0.5
        up = (y - low_y) / (high_y - low_y) if high_y > low_y else 0.5
        return LEFT + across * (WIDTH - LEFT - 12), 10 + (1 - up) * (HEIGHT - BOTTOM - 10)

    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in points))
    dots = "".join(f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="4"/>' for x, y in (at(*mark) for mark in marks))
    ticks = ""
    for share in (0.0, 0.5, 1.0):
        value_x, value_y = low_x + share * (high_x - low_x), low_y + share * (high_y - low_y)
        x, _ = at(value_x, low_y)
        _, y = at(low_x, value_y)
        anchor = {0.0: "start", 0.5: "middle", 1.0: "end"}[share]
        ticks += f'<line class="grid" x1="{LEFT}" x2="{WIDTH - 12}" y1="{y:.1f}" y2="{y:.1f}"/>'
        ticks += f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_short(value_y)}</text>'
        ticks += f'<text x="{x:.1f}" y="{HEIGHT - 12}" text-anchor="{anchor}">{_short(value_x)}</text>'
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{ticks}<polyline class="line" points="{path}"/>{dots}</svg>'


def _short(value: float) -> str:
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{suffix}"
    return f"{value:.3g}"
