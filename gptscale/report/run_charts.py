"""Which curves of a run are drawn, and what is said about each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from gptscale.report.curves import Curve, Floats, entering, finite, smoothed, smoothing_window, x_axis, y_axis
from gptscale.report.record import Evaluation, RunRecord
from gptscale.report.svg import Chart
from gptscale.report.units import fixed, short

TRAINING = "training loss"
MOST_SETS = 4
"""More held-out sets would hide the training loss: then the first stands beside it, and all have a chart of theirs."""
LATER_VALUES = 100
"""Values that a run needs behind its start before the start may be left above."""


@dataclass(frozen=True)
class Across:
    """What runs along the x axis of a chart: tokens or time."""

    of_steps: Floats
    label: str
    divide: float

    def of(self, evaluation: Evaluation) -> float:
        return evaluation.elapsed_s if self.label.startswith("time") else evaluation.tokens


def tokens_across(run: RunRecord) -> Across:
    return Across(run.steps.tokens, "tokens", 1.0)


def time_across(run: RunRecord) -> Across:
    """Time of training, in the unit that suits the run."""
    end_s = float(run.elapsed_s[-1]) if len(run.elapsed_s) else 0.0
    for limit_s, unit_s, unit in ((4 * 86400, 86400, "days"), (2 * 3600, 3600, "hours"), (240, 60, "minutes")):
        if end_s >= limit_s:
            return Across(run.elapsed_s, f"time of training, {unit}", unit_s)
    return Across(run.elapsed_s, "time of training, seconds", 1.0)


def loss_charts(run: RunRecord) -> list[Chart]:
    """Loss against tokens and against time: of training, smoothed over each step, and of every held-out set."""
    charts = []
    for identity, across in (("loss-tokens", tokens_across(run)), ("loss-time", time_across(run))):
        loss = run.steps.column("train/loss")
        window = smoothing_window(len(run.steps))
        curves = [Curve("each step" if window > 1 else "", across.of_steps, loss, "faint", 0)] if window > 1 else []
        curves.append(Curve(_smoothed_name(TRAINING, window), across.of_steps, smoothed(loss, window), "line", 0))
        shown = run.set_names if len(run.set_names) <= MOST_SETS else run.set_names[:1]
        curves += heldout_curves(run, across, shown)
        said = "Loss against " + ("tokens" if identity == "loss-tokens" else "time")
        charts += _chart(run, identity, said, "nats a token", across, curves, steep_start=True, explains=True)
    return charts


def heldout_chart(run: RunRecord) -> list[Chart]:
    """Held-out loss by set alone, where there are several: their own range of y shows more."""
    if len(run.set_names) < 2:
        return []
    across = tokens_across(run)
    curves = heldout_curves(run, across, run.set_names)
    return _chart(run, "heldout", "Held-out loss by set", "nats a token", across, curves)


def optimisation_charts(run: RunRecord) -> list[Chart]:
    charts = [
        *_simple(run, "lr", "Learning rate", "", "train/lr", zero=True),
        *_simple(run, "grad-norm", "Gradient norm", "before clipping", "train/grad_norm", smooth=True),
    ]
    batch = np.diff(run.steps.tokens, prepend=0.0)
    if len(batch) > 1 and batch.min() != batch.max():
        charts += _simple(run, "batch", "Batch", "tokens an optimizer step", batch, zero=True)
    charts += _simple(
        run, "noise", "Gradient noise scale", "tokens (McCandlish et al. 2018)", "train/noise_scale_tokens", smooth=True
    )
    return charts + _simple(run, "loss-scale", "Loss scale", "of fp16 gradients", "train/loss_scale")


def speed_charts(run: RunRecord) -> list[Chart]:
    speed = _simple(run, "speed", "Throughput", "tokens a second", "throughput/tokens_per_sec", zero=True, smooth=True)
    mfu = _simple(run, "mfu", "MFU", "% of the devices' peak", 100 * run.steps.column("throughput/mfu"), zero=True)
    held = run.steps.column("memory/peak_bytes")
    largest = float(np.nanmax(held)) if np.isfinite(held).any() else 0.0
    divide, unit = (2.0**30, "GiB") if largest >= 2**30 else (2.0**20, "MiB")
    memory = _simple(run, "memory", "Memory", f"{unit}, peak of rank 0 so far", held / divide, zero=True)
    return speed + mfu + memory


def heldout_curves(run: RunRecord, across: Across, names: Sequence[str]) -> list[Curve]:
    """One for every set; colour 0 is the training's."""
    curves = []
    for number, name in enumerate(names, start=1):
        points = [(across.of(line), line.scores[name].loss) for line in run.evaluations if name in line.scores]
        x, y = np.array(points, dtype=np.float64).reshape(-1, 2).T
        curves.append(Curve(name, x, y, "points", number))
    return curves


def skipped_steps(run: RunRecord) -> Floats:
    """Which steps changed no weight because the gradient was not finite: their norm is null."""
    norm = run.steps.column("train/grad_norm")
    return np.isnan(norm) if run.steps.has("train/grad_norm") else np.zeros(len(norm), dtype=np.bool_)


def _simple(
    run: RunRecord, identity: str, title: str, unit: str, key: str | Floats, zero: bool = False, smooth: bool = False
) -> list[Chart]:
    across = tokens_across(run)
    values = run.steps.column(key) if isinstance(key, str) else key
    window = smoothing_window(len(run.steps))
    if smooth and window > 1:
        curves = [
            Curve("each step", across.of_steps, values, "faint", 0),
            Curve(_smoothed_name("smoothed", window), across.of_steps, smoothed(values, window), "line", 0),
        ]
    else:
        curves = [Curve(title, across.of_steps, values, "line", 0)]
    return _chart(run, identity, title, unit, across, curves, zero)


def _chart(
    run: RunRecord,
    identity: str,
    title: str,
    unit: str,
    across: Across,
    curves: Sequence[Curve],
    zero: bool = False,
    steep_start: bool = False,
    explains: bool = False,
) -> list[Chart]:
    """None where there is no value at all. `steep_start`: the first steps may lie above the chart."""
    values = np.concatenate([finite(curve) for curve in curves]) if curves else np.array([])
    if not len(values):
        return []
    ends = [float(curve.x[-1]) for curve in curves if len(curve.x)]
    description = _described(curves, across)
    y = y_axis(values, zero)
    later = y_axis(_after_start(curves, max(ends)), zero) if steep_start else y
    if y.high - later.high > later.high - later.low:  # else more than half of the chart would show a few steps
        y = later
        curves = [replace(curve, y=entering(curve.y, y.high)) for curve in curves]
        unit += f"; the first steps, from {_value(float(values.max()))}, are above"
    return [
        Chart(
            identity=identity,
            title=title,
            unit=unit,
            x_label=across.label,
            x=x_axis(max(ends) / across.divide, across.divide),
            y=y,
            curves=curves,
            description=description,
            sessions=_resumptions(run, across),
            skipped=across.of_steps[skipped_steps(run)].tolist(),
            explains_events=explains,
        )
    ]


START = 0.04
"""Of a run: the share of its tokens in which the loss may fall from that of a guess."""


def _after_start(curves: Sequence[Curve], end: float) -> Floats:
    """Values behind the start of all curves; all values where nothing is behind."""
    later = [curve.y[np.isfinite(curve.y) & (curve.x > START * end)] for curve in curves]
    found = np.concatenate(later)
    return found if len(found) >= LATER_VALUES else np.concatenate([finite(curve) for curve in curves])


def _resumptions(run: RunRecord, across: Across) -> list[float]:
    sessions = run.facts.sessions if run.facts else ()
    at = np.searchsorted(run.steps.numbers, [session.resumed_step for session in sessions if session.resumed_step])
    return [float(across.of_steps[min(index, len(run.steps) - 1)]) for index in at.tolist()]


def _smoothed_name(name: str, window: int) -> str:
    return f"{name}, averaged over {window} steps" if window > 1 else name


def _described(curves: Sequence[Curve], across: Across) -> str:
    """The first, last and extreme value of every curve but the faint ones."""
    said = []
    for curve in curves:
        known = finite(curve)
        if len(known) and curve.look != "faint":
            said.append(
                f"{curve.name}: from {_value(known[0])} to {_value(known[-1])}, "
                f"lowest {_value(known.min())}, highest {_value(known.max())}"
            )
    return f"Against {across.label}. " + "; ".join(said) + "."


def _value(value: float) -> str:
    return short(value) if abs(value) >= 1e4 or abs(value) < 0.01 else fixed(value, 3)
