"""Curves and tables in plain text, as wide as the terminal."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import numpy as np

from gptscale.report.curves import Floats, tick_texts, x_axis, y_axis

# Braille patterns: 2 × 4 dots a letter (Unicode 16.0, chapter 21.1). Bit of a dot by its column and row from the top.
_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
_BARS = "▁▂▃▄▅▆▇█"
_PARTS = " ▏▎▍▌▋▊▉"
LABEL = 8
"""Letters left of a chart."""


def line_chart(
    curves: Sequence[tuple[Floats, Floats]], points: Sequence[tuple[Floats, Floats]], width: int, height: int, x: str
) -> list[str]:
    """Lines, and points shown as o, over a common x from 0; `x` says what runs along it. Without a number: nothing.

    Each letter stands for 2 × 4 dots, so a chart of 60 × 10 letters shows 120 × 40.
    """
    values = [ys[np.isfinite(ys)] for _, ys in (*curves, *points)]
    ends = [float(xs[-1]) for xs, _ in (*curves, *points) if len(xs)]
    if not any(len(found) for found in values):
        return []
    across, up = x_axis(max(ends)), y_axis(np.concatenate(values))
    # Beside the last tick, of which half hangs over, stands the name of the axis.
    inner = max(8, width - LABEL - len(x) - 6)
    dots = np.zeros((height, inner), dtype=np.int64)
    for xs, ys in curves:
        known = np.isfinite(ys)
        columns = np.rint(across.share(xs[known]) * (2 * inner - 1)).astype(int)
        rows = np.rint((1 - up.share(ys[known])) * (4 * height - 1)).astype(int)
        for column, row in _connected(columns, rows):
            dots[row // 4, column // 2] |= _DOTS[column % 2][row % 4]
    letters = [[chr(0x2800 + bits) if bits else " " for bits in line] for line in dots.tolist()]
    for xs, ys in points:
        known = np.isfinite(ys)
        for column, row in zip(across.share(xs[known]), 1 - up.share(ys[known]), strict=True):
            letters[round(float(row) * (height - 1))][round(float(column) * (inner - 1))] = "o"
    labels = [""] * height
    for tick, text in zip(up.ticks, tick_texts(up.ticks), strict=True):
        labels[round(float(1 - up.share(np.array(tick))) * (height - 1))] = text
    lines = [
        f"{label:>{LABEL}} {'┤' if label else '│'}{''.join(row)}" for label, row in zip(labels, letters, strict=True)
    ]
    return [*(line.rstrip() for line in lines), *_x_labels(across.ticks, across.high, inner, x)]


def _connected(columns: Floats, rows: Floats) -> set[tuple[int, int]]:
    """The dots on straight lines between neighbours."""
    found = set(zip(columns.tolist(), rows.tolist(), strict=True))
    for (x0, y0), (x1, y1) in zip(
        zip(columns[:-1].tolist(), rows[:-1].tolist(), strict=True),
        zip(columns[1:].tolist(), rows[1:].tolist(), strict=True),
        strict=True,
    ):
        length = max(abs(x1 - x0), abs(y1 - y0))
        for part in range(1, length):
            found.add((round(x0 + (x1 - x0) * part / length), round(y0 + (y1 - y0) * part / length)))
    return found


def _x_labels(ticks: Sequence[float], high: float, inner: int, name: str) -> list[str]:
    axis = ["─"] * inner
    labels = [" "] * (inner + 8)
    free = 0
    for tick, text in zip(ticks, tick_texts(ticks), strict=True):
        column = round(tick / high * (inner - 1))
        start = max(free, column - len(text) // 2)
        if start + len(text) > len(labels):
            continue
        axis[column] = "┬"
        labels[start : start + len(text)] = text
        free = start + len(text) + 1
    margin = " " * (LABEL + 2)
    return [" " * (LABEL + 1) + "└" + "".join(axis), (margin + "".join(labels)).rstrip() + f"  {name}"]


def sparkline(values: Floats, width: int) -> str:
    """The course of values in one line of bars: the mean of each equal part; a blank where there is none."""
    if not np.isfinite(values).any():
        return ""
    parts = [part[np.isfinite(part)] for part in np.array_split(values, min(width, len(values)))]
    means = [float(part.mean()) if len(part) else float("nan") for part in parts]
    low, high = np.nanmin(means), np.nanmax(means)
    span = high - low
    bars = [
        " " if mean != mean else _BARS[min(7, int((mean - low) / span * 8))] if span > 0 else _BARS[3] for mean in means
    ]
    return "".join(bars)


def columns(rows: Sequence[Sequence[str]], right: Sequence[int] = (), indent: str = "  ") -> list[str]:
    """A table without lines: the columns in `right` are set to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        (
            indent
            + "  ".join(
                cell.rjust(width) if column in right else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
        ).rstrip()
        for row in rows
    ]


def printable(text: str, most: int) -> str:
    """One line without what would move a terminal's cursor or colour it."""
    line = "".join(letter if letter.isprintable() else " " for letter in " ".join(text.split()))
    return line if len(line) <= most else line[: most - 1] + "…"


def visible(text: str) -> str:
    """Text with everything escaped that would move a cursor, change a colour or turn the direction of writing.

    `\\x1b`, `\\u202e`, … as Python writes them; what ends a line too. Spaces of any kind become a plain one.
    """
    return "".join(letter if letter.isprintable() else _escaped(letter) for letter in text)


def _escaped(letter: str) -> str:
    if unicodedata.category(letter) == "Zs":
        return " "
    return letter.encode("unicode_escape").decode()


def text_lines(text: str, width: int, most: int) -> list[str]:
    """The first `most` lines of a text that are not empty, each `visible` and cut to `width` letters."""
    lines = (line.expandtabs(4).rstrip() for line in text.replace("\r\n", "\n").split("\n"))
    shown = [visible(line) for line in lines if line][:most]
    return [line if len(line) <= width else line[: width - 1] + "…" for line in shown]


def bar(share: float, width: int) -> str:
    """A bar of at most `width` letters, in eighths of one; what is above 0 shows."""
    eighths = max(round(share * width * 8), 1 if share > 0 else 0)
    return "█" * (eighths // 8) + (_PARTS[eighths % 8] if eighths % 8 else "")
