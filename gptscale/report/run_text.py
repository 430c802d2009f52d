"""A run in a terminal."""

from __future__ import annotations

import math
import textwrap

import numpy as np

from gptscale.report.curves import smoothed, smoothing_window
from gptscale.report.record import RunRecord
from gptscale.report.terminal import columns, line_chart, printable, sparkline
from gptscale.report.units import count, duration, fixed, flops, percent, short, size

CHART_LINES = 12
SPARKS = (
    ("learning rate", "train/lr"),
    ("gradient norm", "train/grad_norm"),
    ("tokens a second", "throughput/tokens_per_sec"),
    ("MFU", "throughput/mfu"),
    ("noise scale", "train/noise_scale_tokens"),
    ("loss scale", "train/loss_scale"),
)


def run_text(run: RunRecord, width: int) -> str:
    """State, figures and curves, in lines of at most `width` letters where the words allow it."""
    blocks = [_head(run), _figures(run), _loss_chart(run, width), _sparks(run, width), _heldout(run), _time(run, width)]
    blocks += [_data(run), _sample(run, width)]
    return "\n\n".join("\n".join(block) for block in blocks if block)


def state(run: RunRecord) -> str:
    """In words: finished, running, stopped."""
    total = run.total_steps
    at = f"step {count(run.step)}" + (f" of {count(total)}" if total else "")
    owner = run.owner
    if run.finished:
        return f"finished: {at}"
    if owner is not None:
        return f"running ({owner}): {at}{_time_left(run)}"
    if not len(run.steps):
        return "no step taken yet"
    return f"stopped: {at}; start it again to go on"


def _head(run: RunRecord) -> list[str]:
    lines = [f"{run.path}: {state(run)}"]
    if run.facts:
        facts, session = run.facts, run.facts.sessions[-1]
        ranks = "1 rank" if session.ranks == 1 else f"{session.ranks} ranks"
        lines.append(
            f"{count(facts.parameters)} parameters, {ranks} on {session.device} ({session.layout}), {facts.precision}"
        )
    return lines


def _figures(run: RunRecord) -> list[str]:
    if not len(run.steps):
        return []
    loss = run.steps.column("train/loss")
    window = smoothing_window(len(run.steps))
    averaged = smoothed(loss, window)
    known = averaged[np.isfinite(averaged)]
    last = fixed(float(known[-1]), 4) if len(known) else "–"
    rows = [["training loss", f"{last} nats a token" + (f", averaged over {window} steps" if window > 1 else "")]]
    rows.append(["tokens", f"{count(run.tokens)}" + _a_parameter(run)])
    if run.seconds is not None:
        rows.append(["time of training", duration(run.seconds.total)])
    if run.tokens_per_sec is not None:
        rows.append(["throughput", f"{count(run.tokens_per_sec)} tokens/s"])
    rows.append(["MFU", _mfu(run)])
    if run.peak_bytes is not None:
        rows.append(["peak memory", f"{size(run.peak_bytes)} (rank 0)"])
    skipped = int(np.isnan(run.steps.column("train/grad_norm")).sum()) if run.steps.has("train/grad_norm") else 0
    if skipped:
        rows.append(["updates skipped", f"{count(skipped)} (gradient not finite)"])
    if run.checkpoint_steps:
        rows.append(["checkpoints", "steps " + ", ".join(count(step) for step in reversed(run.checkpoint_steps))])
    return columns(rows)


def _loss_chart(run: RunRecord, width: int) -> list[str]:
    window = smoothing_window(len(run.steps))
    curve = (run.steps.tokens, smoothed(run.steps.column("train/loss"), window))
    points = []
    for name in run.set_names[:1]:
        scored = [(line.tokens, line.scores[name].loss) for line in run.evaluations if name in line.scores]
        x, y = np.array(scored, dtype=np.float64).reshape(-1, 2).T
        points.append((x, y))
    drawn = line_chart([curve], points, width, CHART_LINES, "tokens")
    marks = f"; o {run.set_names[0]}" if points else ""
    return [f"loss, nats a token (line: training{marks})", *drawn] if drawn else []


def _sparks(run: RunRecord, width: int) -> list[str]:
    rows = []
    for name, key in SPARKS:
        values = run.steps.column(key)
        known = values[np.isfinite(values)]
        if len(known):
            bars = sparkline(values, max(8, width - 50))
            rows.append([name, bars, short(float(known[-1])), f"({short(known.min())} … {short(known.max())})"])
    return columns([["", "over the run", "last", "(range)"], *rows], right=(2,)) if rows else []


def _heldout(run: RunRecord) -> list[str]:
    if run.latest is None or not run.set_names:
        return []
    rows = [["held-out set", "loss", "perplexity", "bits/byte", "lowest", "at step"]]
    for name in run.set_names:
        scored = [(line.step, line.scores[name]) for line in run.evaluations if name in line.scores]
        last = scored[-1][1]
        known = [(score.loss, step) for step, score in scored if math.isfinite(score.loss)]
        best, step = min(known, default=(math.nan, 0))
        figures = [fixed(last.loss, 4), fixed(last.perplexity, 2), fixed(last.bits_per_byte, 4)]
        rows.append([printable(name, 30), *figures, fixed(best, 4), count(step)])
    found = columns(rows, right=(1, 2, 3, 4, 5))
    if run.facts and run.facts.bigram_loss is not None:
        found.append(f"  a bigram model fitted to the same tokens: {fixed(run.facts.bigram_loss, 4)}")
    return found


def _time(run: RunRecord, width: int) -> list[str]:
    if run.seconds is None:
        return []
    total = run.seconds.total or 1.0
    shares = ", ".join(f"{name} {percent(value / total)}" for name, value in run.seconds.parts())
    return textwrap.wrap(f"time: {shares}", width, initial_indent="  ", subsequent_indent="        ")


def _data(run: RunRecord) -> list[str]:
    if run.facts is None:
        return []
    tokens = run.facts.tokens_before_stages(run.tokens)
    cards = [
        f"  data: {percent(card.share)} {card.path}, {short(card.tokens)} tokens, "
        f"{tokens * card.share / max(1, card.tokens):.2f} epochs used"
        for card in run.facts.data
    ]
    return cards + [f"  stage {stage.name}: {stage.described}" for stage in run.facts.stages]


def _sample(run: RunRecord, width: int) -> list[str]:
    if not run.samples:
        return []
    last = run.samples[-1]
    text = printable(last.prompt + last.completion, max(20, 3 * (width - 2)))
    lines = [text[start : start + width - 2] for start in range(0, len(text), width - 2)]
    return [f"  sample at step {count(last.step)}:", *(f"  {line}" for line in lines)]


def _a_parameter(run: RunRecord) -> str:
    return f" ({run.tokens / run.facts.parameters:.3g} a parameter)" if run.facts else ""


def _mfu(run: RunRecord) -> str:
    if run.mfu is not None:
        of = f" of {flops(run.facts.peak_flops)}FLOP/s" if run.facts and run.facts.peak_flops else ""
        return f"{100 * run.mfu:.1f} %{of}"
    if run.facts and run.facts.flops_per_token and run.tokens_per_sec is not None:
        return f"unknown, as the device's peak is; {flops(run.tokens_per_sec * run.facts.flops_per_token)}FLOP/s"
    return "unknown"


def _time_left(run: RunRecord) -> str:
    if run.seconds is None or not run.total_steps:
        return ""
    return f", about {duration(run.seconds.total / len(run.steps) * (run.total_steps - run.step))} left"
