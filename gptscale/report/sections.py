"""The sections of the page, each from a run to HTML; an empty text where the run has nothing of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import numpy as np

from gptscale.report import run_charts
from gptscale.report.curves import smoothed, smoothing_window
from gptscale.report.facts import DataCard
from gptscale.report.record import RunRecord, Sample
from gptscale.report.svg import Chart, figure, shares_bar, square
from gptscale.report.tables import Cell, Markup, pairs, table, tiles
from gptscale.report.units import count, duration, fixed, flops, percent, short, size

MOST_SAMPLES = 5
"""Completions shown of a prompt: the first, the last and some between."""
MOST_PARTS = 40
PART_COLOURS = {"data": 4, "forward and backward": 0, "update": 1, "save": 2, "evaluate": 3, "other": 6}


def headline(run: RunRecord) -> str:
    """The figures that one looks at first."""
    shown: list[tuple[str, str, str]] = []
    if run.latest is not None and run.latest.scores:
        name, score = next(iter(run.latest.scores.items()))
        of = "" if len(run.set_names) == 1 else f" of {name}"
        shown.append((f"Held-out loss{of}", fixed(score.loss, 4), "nats a token"))
        shown.append((f"Bits a byte{of}", fixed(score.bits_per_byte, 4), "held-out"))
    if len(run.steps):
        loss = run.steps.column("train/loss")
        window = smoothing_window(len(run.steps))
        last = smoothed(loss, window)
        last = last[np.isfinite(last)]
        over = f"nats a token, last {window} steps" if window > 1 else "nats a token"
        shown.append(("Training loss", fixed(float(last[-1]) if len(last) else None, 4), over))
    a_parameter = f"{run.tokens / run.facts.parameters:.3g} a parameter" if run.facts else ""
    shown.append(("Tokens", short(run.tokens), a_parameter))
    if run.seconds is not None:
        shown.append(("Time of training", duration(run.seconds.total), _time_left(run)))
    if run.tokens_per_sec is not None:
        shown.append(("Throughput", short(run.tokens_per_sec), "tokens a second"))
    mfu = run.mfu
    shown.append(("MFU", "unknown" if mfu is None else f"{100 * mfu:.1f} %", _peak(run)))
    if run.peak_bytes is not None:
        shown.append(("Peak memory", size(run.peak_bytes), "of rank 0"))
    return tiles(shown)


def loss(run: RunRecord) -> str:
    charts = run_charts.loss_charts(run)
    if not charts:
        return "<p>No step has been taken yet.</p>"
    notes = []
    skipped = int(run_charts.skipped_steps(run).sum())
    if skipped:
        notes.append(f"{count(skipped)} updates were skipped because the gradient was not finite.")
    if run.facts and run.facts.bigram_loss is not None:
        bigram = fixed(run.facts.bigram_loss, 4)
        notes.append(f"A bigram model fitted to the same tokens has a held-out loss of {bigram} nats a token.")
    return _charts(charts) + "".join(f"<p>{escape(note)}</p>" for note in notes)


def heldout(run: RunRecord) -> str:
    if run.latest is None or not run.set_names:
        return ""
    rows = []
    for name in run.set_names:
        scored = [(line.step, line.scores[name]) for line in run.evaluations if name in line.scores]
        _, last = scored[-1]
        known = [(score.loss, step) for step, score in scored if math.isfinite(score.loss)]
        best_loss, best_step = min(known, default=(math.nan, 0))
        best = f"{fixed(best_loss, 4)} at step {count(best_step)}"
        rows.append([name, fixed(last.loss, 4), fixed(last.perplexity, 2), fixed(last.bits_per_byte, 4), best])
    caption = f"At step {count(run.latest.step)}; loss in nats a token"
    heads = ["set", "loss", "perplexity", "bits a byte", "lowest loss"]
    scores = f"<div>{table(caption, heads, rows, numbers=(1, 2, 3, 4))}</div>"
    return f'<div class="charts">{scores}{"".join(figure(chart) for chart in run_charts.heldout_chart(run))}</div>'


def optimisation(run: RunRecord) -> str:
    return _charts(run_charts.optimisation_charts(run))


def speed(run: RunRecord) -> str:
    return _charts(run_charts.speed_charts(run)) + _mfu(run) + _time(run)


def samples(run: RunRecord) -> str:
    prompts = list(dict.fromkeys(sample.prompt for sample in run.samples))
    parts = []
    for prompt in prompts:
        chosen = _spread([sample for sample in run.samples if sample.prompt == prompt], MOST_SAMPLES)
        shown = "".join(
            f'<p class="when">step {count(sample.step)}</p>'
            f'<blockquote class="sample"><b>{escape(prompt)}</b>{escape(sample.completion)}</blockquote>'
            for sample in reversed(chosen)
        )
        parts.append(f"<h3>After “{escape(_one_line(prompt))}”</h3>{shown}")
    return "".join(parts)


def data(run: RunRecord) -> str:
    if run.facts is None or not run.facts.data:
        return ""
    cards, tokens = run.facts.data, run.facts.tokens_before_stages(run.tokens)
    rows = []
    for card in cards:
        epochs = f"{tokens * card.share / card.tokens:.2f}" if card.tokens else "–"
        used = f"{short(tokens * card.share)} ({epochs} epochs)"
        heldout_part = f"{short(card.heldout_tokens)} in {count(card.heldout_documents)} documents"
        figures = (percent(card.share), short(card.tokens), count(card.documents), size(card.text_bytes))
        rows.append([card.path, *figures, used, heldout_part])
    heads = ["corpus", "share", "tokens", "documents", "text", "used so far", "held out, tokens"]
    vocabularies = sorted({card.vocab_size for card in cards})
    words = " and ".join(count(size_) for size_ in vocabularies)
    text = table("Prepared text, without what is held out", heads, rows, numbers=(1, 2, 3, 4))
    notes = [f"Vocabulary: {words} pieces.", *(f"Stage {one.name}: {one.described}." for one in run.facts.stages)]
    text += "".join(f"<p class='note'>{escape(note)}</p>" for note in notes)
    return text + "".join(_parts(card) for card in cards)


def environment(run: RunRecord) -> str:
    if run.facts is None:
        return ""
    facts, last = run.facts, run.facts.sessions[-1]
    versions = ", ".join(f"{name} {version}" for name, version in last.versions.items())
    rows = [
        ("Parameters", count(facts.parameters)),
        ("Devices", f"{last.ranks} × {last.device}"),
        ("Layout", f"{last.layout}, micro-batch {last.micro_batch}, {facts.precision}"),
        ("Host", f"{last.host}: {last.cpu}, {last.cores} usable cores, {size(last.memory_bytes)} of memory"),
        ("Versions", versions),
        ("Command", last.command),
    ]
    sessions = [
        [
            session.started_utc.replace("T", " ").removesuffix("+00:00"),
            count(session.resumed_step),
            count(session.ranks),
            session.layout,
            session.device,
            session.host,
        ]
        for session in facts.sessions
    ]
    heads = ["started (UTC)", "from step", "ranks", "layout", "device", "host"]
    left_out = f", and {facts.sessions_left_out} before them" if facts.sessions_left_out else ""
    named = "session" if len(sessions) == 1 else "sessions"
    return pairs(rows) + table(f"{len(sessions)} {named}{left_out}", heads, sessions, numbers=(1, 2))


def settings(run: RunRecord) -> str:
    if not run.settings_text:
        return ""
    text = escape(run.settings_text)
    return f"<details><summary>config.yaml</summary><pre tabindex='0' aria-label='settings'>{text}</pre></details>"


def _charts(charts: Sequence[Chart]) -> str:
    return f'<div class="charts">{"".join(figure(chart) for chart in charts)}</div>' if charts else ""


def _time_left(run: RunRecord) -> str:
    """Judged by the mean step so far."""
    if run.seconds is None or not run.total_steps or run.finished:
        return ""
    return f"about {duration(run.seconds.total / len(run.steps) * (run.total_steps - run.step))} left"


def _peak(run: RunRecord) -> str:
    if run.mfu is not None and run.facts and run.facts.peak_flops:
        return f"of {flops(run.facts.peak_flops)}FLOP/s"
    return "the device's peak is not known" if run.facts and run.facts.peak_flops is None else ""


def _mfu(run: RunRecord) -> str:
    """The formula with its numbers, or what is missing for it."""
    facts = run.facts
    if facts is None:
        return ""
    formula = "MFU = tokens a second × FLOPs a token ÷ peak FLOP/s of all devices."
    if facts.flops_per_token is None:
        return f"<p class='note'>{formula} {escape(facts.flops_formula)}, so it is unknown here.</p>"
    a_token = f"FLOPs a token: {count(facts.flops_per_token)}, {facts.flops_formula}."
    if facts.peak_flops is None:
        peak = "The peak of this device is not known, so neither is the MFU."
        if run.tokens_per_sec is not None:
            peak += f" The run does {flops(run.tokens_per_sec * facts.flops_per_token)}FLOP/s."
    else:
        peak = f"Peak: {flops(facts.peak_flops)}FLOP/s, dense, {facts.precision}, all devices together."
    return f"<p class='note'>{formula} {escape(a_token)} {escape(peak)}</p>"


def _time(run: RunRecord) -> str:
    seconds = run.seconds
    if seconds is None:
        return ""
    parts = seconds.parts()
    total = seconds.total or 1.0
    rows: list[list[Cell]] = [
        [Markup(square(PART_COLOURS[name]) + escape(name)), percent(value / total), duration(value)]
        for name, value in parts
    ]
    bar = shares_bar("time", "Where time goes", [(name, value / total, PART_COLOURS[name]) for name, value in parts])
    figures = table("Shares of the time of training", ["part", "share", "time"], rows, numbers=(1, 2))
    missing = [
        name
        for name, value in (
            ("forward and backward", seconds.forward_backward),
            ("update", seconds.update),
            ("save", seconds.save),
            ("evaluate", seconds.evaluate),
        )
        if value is None
    ]
    note = f"<p class='note'>Not recorded by itself: {', '.join(missing)}.</p>" if missing else ""
    return f"<h3>Where time goes</h3>{bar}{figures}{note}"


def _parts(card: DataCard) -> str:
    """Where a corpus comes from, and under which licences."""
    shown = card.parts[:MOST_PARTS]
    rows = [
        [
            part.name,
            part.source,
            part.licence,
            part.version,
            short(part.tokens),
            count(part.documents),
            size(part.text_bytes),
        ]
        for part in shown
    ]
    heads = ["part", "source", "licence", "version", "tokens", "documents", "text"]
    more = len(card.parts) - len(shown) + card.parts_left_out
    caption = f"Parts of {card.path}" + (f": the largest {len(shown)}, {count(more)} more are left out" if more else "")
    licences = ", ".join(dict.fromkeys(part.licence for part in card.parts))
    title = f"Sources and licences of {card.path}: {_one_line(licences)}"
    opened = " open" if len(shown) <= 6 else ""
    return f"<details{opened}><summary>{escape(title)}</summary>{table(caption, heads, rows, (4, 5, 6))}</details>"


def _spread(found: Sequence[Sample], most: int) -> list[Sample]:
    """At most so many, evenly, the first and the last among them."""
    if len(found) <= most:
        return list(found)
    return [found[round(index * (len(found) - 1) / (most - 1))] for index in range(most)]


def _one_line(text: str, most: int = 60) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1] + "…"
