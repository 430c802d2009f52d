"""Points and axes: nothing is lost that one would want to see, and numbers are round."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptscale.report.curves import (
    Axis,
    entering,
    nice_ticks,
    smoothed,
    thinned,
    tick_texts,
    x_axis,
    y_axis,
)


def test_thinning_keeps_extremes_ends_and_gaps() -> None:
    x = np.arange(100_000, dtype=np.float64)
    y = np.sin(x / 5000)
    y[31_337], y[77_777], y[50_000] = 9.0, -9.0, np.nan
    thin_x, thin_y = thinned(x, y, 240)
    assert len(thin_x) <= 5 * 240
    assert (thin_x[0], thin_x[-1]) == (x[0], x[-1])
    assert (np.nanmax(thin_y), np.nanmin(thin_y)) == (9.0, -9.0)
    assert np.isnan(thin_y).sum() == 1
    assert (np.diff(thin_x) > 0).all()
    every = thinned(x[::200], y[::200], 240)
    assert len(every[0]) == 500, "few points all stay"


def test_smoothing_follows_the_plain_recursion_over_nulls() -> None:
    """Against the definition, written as one would by hand; also where the blocks of the fast way meet."""
    generator = np.random.default_rng(0)
    values = generator.normal(3, 1, 2500)
    values[[0, 7, 1234]] = np.nan
    window, mean, count, wanted = 5, 0.0, 0, []
    for value in values:
        if np.isnan(value):
            wanted.append(np.nan)
            continue
        count += 1
        mean += (value - mean) / min(window, max(1.0, count / 8))
        wanted.append(mean)
    np.testing.assert_allclose(smoothed(values, window), wanted, rtol=1e-10)
    assert smoothed(values, 1) is values


@given(st.floats(-1e12, 1e12), st.floats(1e-9, 1e12))
def test_ticks_are_few_round_and_inside(low: float, span: float) -> None:
    high = low + span
    if high - low < 1e-9 * max(abs(low), abs(high), 1e-9):
        return
    ticks = nice_ticks(low, high, 5)
    assert 1 <= len(ticks) <= 7
    slack = 1e-6 * (high - low)
    assert all(low - slack <= tick <= high + slack for tick in ticks)


@pytest.mark.parametrize(
    ("ticks", "texts"),
    [
        ((0.0, 0.5, 1.0), ["0", "0.5", "1"]),
        ((0.0, 250_000.0, 500_000.0), ["0", "250k", "500k"]),
        ((0.0, 5e8, 1e9, 1.5e9), ["0", "0.5B", "1B", "1.5B"]),
        ((0.0, 1e-4, 2.5e-4), ["0", "1e−4", "2.5e−4"]),
        ((-2.0, 0.0, 2.0), ["−2", "0", "2"]),
    ],
)
def test_labels(ticks: tuple[float, ...], texts: list[str]) -> None:
    assert tick_texts(ticks) == texts


def test_axes() -> None:
    hours = x_axis(2.5, 3600)
    assert hours.high == 9000
    assert [tick / hours.unit for tick in hours.ticks] == [0, 0.5, 1, 1.5, 2, 2.5]
    assert y_axis(np.array([1.0, 1.1, 1.0, 900.0])).log
    assert not y_axis(np.array([1.0, 2.0, 9.0])).log
    flat = y_axis(np.array([2.0, 2.0]))
    assert flat.low < 2 < flat.high
    assert y_axis(np.array([0.0, 3e-4]), zero=True).unit == pytest.approx(1e-4)
    nothing = y_axis(np.array([0.0]), zero=True)
    assert nothing.low <= 0 < nothing.high
    assert Axis(1, 100, (), log=True).share(np.array([10.0])) == pytest.approx(0.5)


def test_a_line_enters_from_above() -> None:
    values = np.array([10.0, 9.0, 8.0, 3.0, 2.0, 9.0, 1.0])
    np.testing.assert_array_equal(entering(values, 5.0), [np.nan, np.nan, 5.0, 3.0, 2.0, 5.0, 1.0])
