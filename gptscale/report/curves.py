"""Points of a run → points worth drawing, and the numbers that stand at an axis. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """Values over a common x, in order of x; NaN is a gap."""

    name: str
    x: Floats
    y: Floats
    look: Literal["line", "faint", "points"] = "line"
    """`faint`: what lies behind a smoothed line. `points`: a line with a mark at every value."""
    colour: int = 0
    """Number of the colour, dash and mark; see `style`."""


def finite(curve: Curve) -> Floats:
    """The y that are numbers."""
    return curve.y[np.isfinite(curve.y)]


def smoothed(values: Floats, window: int) -> Floats:
    """Exponential moving average over about `window` values, at the start over an eighth of those so far, so that it
    follows a loss that falls steeply. NaN stays NaN and changes nothing."""
    if window <= 1:
        return values
    known = np.isfinite(values)
    found = values[known]
    means = np.empty(len(found))
    mean, growing = 0.0, min(len(found), 8 * window)
    for index, value in enumerate(found[:growing].tolist()):
        mean += (value - mean) / max(1.0, (index + 1) / 8)
        means[index] = mean
    keep = 1 - 1 / window
    for start in range(growing, len(found), 100 * window):  # powers of `keep` down to e⁻¹⁰⁰ lose no digits
        part = found[start : start + 100 * window]
        powers = keep ** np.arange(1, len(part) + 1)
        means[start : start + len(part)] = powers * (mean + (1 - keep) * np.cumsum(part / powers))
        mean = float(means[start + len(part) - 1])
    out = np.full(len(values), np.nan)
    out[known] = means
    return out


def smoothing_window(steps: int) -> int:
    """Steps to average over: a fiftieth of the run."""
    return max(1, round(steps / 50))


def thinned(x: Floats, y: Floats, columns: int) -> tuple[Floats, Floats]:
    """At most four points for each of `columns` equal parts of the x range: first, smallest, largest and last.

    A line through them covers the same pixels as one through all (M4: Jugel et al., VLDB 2014), so no spike is lost.
    Gaps stay: a part with NaN in it keeps one.
    """
    if len(x) <= 4 * columns:
        return x, y
    low, high = float(x[0]), float(x[-1])
    part = np.minimum(((x - low) / max(high - low, 1e-300) * columns).astype(np.int64), columns - 1)
    starts = np.flatnonzero(np.diff(part, prepend=-1))
    kept: list[int] = []
    for start, end in zip(starts.tolist(), [*starts[1:].tolist(), len(x)], strict=True):
        values = y[start:end]
        chosen = {start, end - 1}
        gaps = np.flatnonzero(~np.isfinite(values))
        if len(gaps) < len(values):
            chosen |= {start + int(np.nanargmin(values)), start + int(np.nanargmax(values))}
        if len(gaps):
            chosen.add(start + int(gaps[0]))
        kept += sorted(chosen)
    return x[kept], y[kept]


def entering(values: Floats, high: float) -> Floats:
    """What is above `high` left out, but for the ends of its stretches, which are put there: lines enter from above."""
    above = values > high
    beside = ~above
    beside[:-1] |= ~above[1:]
    beside[1:] |= ~above[:-1]
    return np.where(above, np.where(beside, high, np.nan), values)


@dataclass(frozen=True)
class Axis:
    """From the value `low` to `high`; `ticks` lie between them and are shown as so many of `unit`."""

    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False
    unit: float = 1.0

    def share(self, values: Floats) -> Floats:
        """Where values lie between the ends, from 0 to 1."""
        if self.log:
            return (np.log(values) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return (values - self.low) / (self.high - self.low)


LOG_RATIO = 30.0
"""From this largest value, in units of the middle one, on, a straight axis would hide the middle one."""


def x_axis(high: float, unit: float = 1.0) -> Axis:
    """From zero to the last value, `high` units; ticks about every fifth of it, at round numbers of units."""
    high = high if high > 0 else 1.0
    return Axis(0.0, high * unit, tuple(tick * unit for tick in nice_ticks(0.0, high, 5)), unit=unit)


def y_axis(values: Floats, zero: bool = False, log_allowed: bool = True) -> Axis:
    """Around all values with a little air; from `zero` where the amount matters and not only its change. Logarithmic
    where single values are far above most; tiny values in units of a power of ten."""
    low, high = float(values.min()), float(values.max())
    if log_allowed and low > 0 and high > LOG_RATIO * float(np.median(values)):
        low, high = low / 1.3, high * 1.3
        ticks = log_ticks(low, high)
        if len(ticks) >= 2:
            return Axis(low, high, ticks, log=True)
    if zero:
        low = min(low, 0.0)
    if high - low < 1e-9 * max(abs(high), abs(low), 1e-300):  # all the same
        around = abs(high) * 0.1 or 1.0
        low, high = (low if zero and low == 0 else low - around), high + around
    else:
        air = 0.06 * (high - low)
        low, high = (low if zero and low == 0 else low - air), high + air
    unit = 10.0 ** math.floor(math.log10(high)) if 0 < high < 5e-3 else 1.0
    return Axis(low, high, nice_ticks(low, high, 5), unit=unit)


def nice_ticks(low: float, high: float, wanted: int) -> tuple[float, ...]:
    """Multiples of 1, 2, 2.5 or 5 times a power of ten, about `wanted` of them."""
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return tuple(0.0 if index == 0 else index * step for index in range(first, last + 1))


def log_ticks(low: float, high: float) -> tuple[float, ...]:
    """1, 2 and 5 times powers of ten, or powers of ten alone where those would be many."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    powers = [10.0**exponent for exponent in range(first, last + 1)]
    ticks = [power * factor for power in powers for factor in (1, 2, 5) if low <= power * factor <= high]
    if len(ticks) > 6:
        ticks = [power for power in powers if low <= power <= high]
        ticks = ticks[:: math.ceil(len(ticks) / 6)]
    return tuple(ticks)


def tick_texts(ticks: Sequence[float]) -> list[str]:
    """The same form for all: digits as the step between them needs, k, M, B, T for large ones, 2e-4 for tiny ones."""
    largest = max((abs(tick) for tick in ticks), default=0.0)
    for limit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if largest >= limit:
            unit = {"T": 1e12, "B": 1e9, "M": 1e6, "k": 1e3}[suffix]
            return [f"{_plain(tick / unit)}{suffix}" if tick else "0" for tick in ticks]
    if 0 < largest < 5e-3:
        return [_scientific(tick) for tick in ticks]
    return [_plain(tick) for tick in ticks]


def _plain(value: float) -> str:
    text = f"{value:,.6f}".rstrip("0").rstrip(".")
    return text.replace("-", "−")


def _scientific(value: float) -> str:
    if value == 0:
        return "0"
    digits, _, exponent = f"{value:.2e}".partition("e")
    return f"{digits.rstrip('0').rstrip('.')}e−{-int(exponent)}".replace("-", "−")
