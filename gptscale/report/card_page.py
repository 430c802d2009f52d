"""A data card: prepared text in one self-contained HTML file that needs no script and no network.

It says what a reader of a model trained on it should know (Gebru et al., "Datasheets for datasets", arXiv 1803.09010):
where text comes from and under which licences, how much there is of it, and what it looks like.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path

import numpy as np

from gptscale.data.excerpts import Excerpt
from gptscale.data.lengths import LengthBin, Lengths
from gptscale.report.curves import Axis, log_ticks, y_axis
from gptscale.report.data_summary import DataSummary, Group, SplitSummary
from gptscale.report.data_text import sampled, type_name
from gptscale.report.page import page
from gptscale.report.svg import Bar, Chart, figure, shares_bar, square
from gptscale.report.tables import Cell, Markup, pairs, table, tiles
from gptscale.report.terminal import printable, visible
from gptscale.report.units import a_token, count, percent, short, size
from gptscale.runtime.errors import UserError
from gptscale.runtime.files import write_bytes_atomically

MOST_GROUPS = 40
MOST_PARTS = 200
MOST_COLOURS = 8
SAMPLE_LINES, SAMPLE_LETTERS = 12, 800


def write_card(path: Path, data: DataSummary) -> None:
    """Raises UserError where the file cannot be written."""
    try:
        write_bytes_atomically(path, render(data, datetime.now(UTC)).encode())
    except OSError as error:
        raise UserError(
            f"html={path}: cannot be written: {error.strerror}\nname a file in a folder that is there"
        ) from error


def render(data: DataSummary, now: datetime) -> str:
    """The page as text. `now` is what it says of itself; everything else comes from the folder."""
    name = printable(Path(data.folder).resolve().name, 80)
    parts = [
        ("sources", "Sources", _sources(data)),
        ("licences", "Licences", _licences(data.train)),
        *([("filters", "Filters", _filters(data))] if data.left_out else []),
        ("lengths", "Document lengths", _lengths(data)),
        ("samples", "Samples", _samples(data.excerpts)),
        ("files", "Files", _files(data)),
        ("parts", "Parts", _parts(data.train)),
    ]
    return page(name, _lead(data), _headline(data), parts, now)


def _lead(data: DataSummary) -> str:
    manifest = data.train.manifest
    words = [
        f"{short(manifest.tokens)} tokens of training text",
        f"{count(len(data.train.sources))} source{'' if len(data.train.sources) == 1 else 's'}",
        f"{short(data.heldout.manifest.tokens)} tokens held out",
    ]
    said = f'<p class="lead soft">{escape(" · ".join(words))}</p>'
    return said + (f"<p><b>{_words(data.condition)}</b></p>" if data.damage is not None else "")


def _headline(data: DataSummary) -> str:
    manifest, lengths = data.train.manifest, data.train.lengths
    shown = [
        ("Tokens", short(manifest.tokens), "for training"),
        ("Documents", short(manifest.documents), "for training"),
        ("Text", size(manifest.text_bytes), "of UTF-8"),
        ("Bytes a token", a_token(manifest.text_bytes, manifest.tokens), ""),
        ("Held out", percent(_held_out(data)), "of the tokens"),
        ("Vocabulary", count(manifest.vocab_size), "pieces"),
        ("On disk", size(sum(split.file_bytes for split in data.splits)), f"token ids as {type_name(manifest.dtype)}"),
    ]
    if lengths is not None:
        shown.insert(4, ("Median document", count(lengths.median), "tokens"))
    return tiles(shown)


def _held_out(data: DataSummary) -> float:
    held = data.heldout.manifest.tokens
    return held / max(1, held + data.train.manifest.tokens)


def _sources(data: DataSummary) -> str:
    bar = [
        (_plain(group.name), group.tokens / max(1, data.train.manifest.tokens), number)
        for number, group in enumerate(data.train.sources[: MOST_COLOURS - 1])
    ]
    rest = sum(group.tokens for group in data.train.sources[MOST_COLOURS - 1 :])
    if rest:
        bar.append(("other", rest / data.train.manifest.tokens, MOST_COLOURS - 1))
    return shares_bar("shares", "Tokens by source", bar) + "".join(_source_table(split) for split in data.splits)


def _source_table(split: SplitSummary) -> str:
    total = max(1, split.manifest.tokens)
    rows: list[list[Cell]] = []
    for number, group in enumerate(split.sources[:MOST_GROUPS]):
        name: Cell = _plain(group.name)
        if split.manifest.split == "train":
            name = Markup(square(min(number, MOST_COLOURS - 1)) + escape(printable(_plain(group.name), 40)))
        figures = [short(group.tokens), percent(group.tokens / total), count(group.documents), size(group.text_bytes)]
        about = [_several(words) for words in (group.licences, group.versions, group.formats)]
        figures.append(a_token(group.text_bytes, group.tokens))
        rows.append([name, about[0], *figures, *about[1:]])
    heads = ["source", "licence", "tokens", "share", "documents", "text", "bytes/token", "version", "format"]
    what = "Training text" if split.manifest.split == "train" else "Held-out text"
    caption = f"{what}: {count(split.manifest.tokens)} tokens{_left_out(split.sources, MOST_GROUPS)}"
    return table(caption, heads, rows, numbers=(2, 3, 4, 5, 6))


def _licences(split: SplitSummary) -> str:
    total = max(1, split.manifest.tokens)
    rows = [
        [_plain(group.name), short(group.tokens), percent(group.tokens / total), count(group.documents)]
        for group in split.licences[:MOST_GROUPS]
    ]
    caption = f"As the sources state them, training text{_left_out(split.licences, MOST_GROUPS)}"
    return table(caption, ["licence", "tokens", "share", "documents"], rows, numbers=(1, 2, 3))


def _filters(data: DataSummary) -> str:
    rows = [
        [_plain(one.source), _plain(one.reason.replace("_", " ")), count(one.documents), size(one.text_bytes)]
        for one in data.left_out[:MOST_GROUPS]
    ]
    caption = "What was left out when the text was prepared"
    return table(caption, ["source", "reason", "documents", "text"], rows, numbers=(2, 3))


def _several(words: Sequence[str], most: int = 4) -> str:
    more = [f"and {count(len(words) - most)} more"] if len(words) > most else []
    return ", ".join([*(_plain(word) for word in words[:most]), *more]) or "–"


def _left_out(groups: Sequence[Group], most: int) -> str:
    return f"; the largest {most}, {count(len(groups) - most)} more are left out" if len(groups) > most else ""


def _lengths(data: DataSummary) -> str:
    rows, notes = [], []
    for split in data.splits:
        found = split.lengths
        if found is not None:
            figures = [found.smallest, found.median, found.mean, found.p90, found.p99, found.largest]
            rows.append([{"train": "training", "heldout": "held out"}[split.manifest.split], *map(count, figures)])
            notes += [f"<p class='note'>{escape(note)}.</p>" for note in [sampled(split)] if note]
    if data.train.lengths is None:
        return ""
    heads = ["split", "shortest", "median", "mean", "90 % up to", "99 % up to", "longest"]
    charts = "".join(figure(chart) for chart in _histograms(data.train.lengths))
    quantiles = table("Tokens a document, its end included", heads, rows, numbers=range(1, 7))
    return f'{quantiles}{"".join(notes)}<div class="charts">{charts}</div>'


def _histograms(found: Lengths) -> list[Chart]:
    """How many documents are how long, and where the tokens are."""
    tokens = sum(one.tokens for one in found.bins)
    by_documents = [100 * one.documents / found.documents for one in found.bins]
    by_tokens = [100 * one.tokens / tokens for one in found.bins]
    return [
        _histogram(found.bins, "documents", "Documents by length", "share of documents, %", 0, by_documents),
        _histogram(found.bins, "tokens", "Tokens by length of their document", "share of tokens, %", 2, by_tokens),
    ]


def _histogram(
    bins: Sequence[LengthBin], name: str, title: str, unit: str, colour: int, shares: Sequence[float]
) -> Chart:
    low, high = float(bins[0].low), float(bins[-1].high + 1)
    most = bins[int(np.argmax(shares))]
    said = f"Most, {max(shares):.1f} %, at {count(most.low)} to {count(most.high)} tokens."
    return Chart(
        identity=name,
        title=title,
        unit=unit,
        x_label="tokens of the document",
        x=Axis(low, high, log_ticks(low, high), log=True),
        y=y_axis(np.array([0.0, *shares]), zero=True, log_allowed=False),
        curves=(),
        description=f"{title} of training text, in {len(bins)} bars. {said}",
        bars=[Bar(one.low, one.high + 1, share) for one, share in zip(bins, shares, strict=True)],
        colour=colour,
    )


def _samples(excerpts: Sequence[Excerpt]) -> str:
    parts = []
    source = None
    for excerpt in excerpts:
        if excerpt.source != source and excerpt.source:
            parts.append(f"<h3>{_words(excerpt.source)}</h3>")
        source = excerpt.source
        where = f"document {count(excerpt.document)} ({excerpt.shard}), {count(excerpt.tokens)} tokens"
        parts.append(f'<p class="when">{escape(where)}</p><blockquote class="sample">{_excerpt(excerpt)}</blockquote>')
    return "".join(parts)


def _excerpt(excerpt: Excerpt) -> str:
    """The first lines, as text and nothing else."""
    lines = excerpt.text.replace("\r\n", "\n").expandtabs(4).split("\n")
    shown = "\n".join(visible(line) for line in lines[:SAMPLE_LINES])
    cut = len(lines) > SAMPLE_LINES or len(shown) > SAMPLE_LETTERS or not excerpt.whole
    return escape(shown[:SAMPLE_LETTERS].rstrip()) + (" …" if cut else "")


def _files(data: DataSummary) -> str:
    manifest = data.train.manifest
    shards = ", ".join(
        f"{count(len(split.manifest.shards))} of {split.manifest.split} ({size(split.file_bytes)})"
        for split in data.splits
    )
    rows: list[tuple[str, Cell]] = [
        ("Condition", _plain(data.condition)),
        ("Shards", shards),
        ("Order", "documents at random" if manifest.shuffled else "documents as the sources have them"),
        ("Token ids", f"{type_name(manifest.dtype)}, below {count(manifest.vocab_size)}"),
        ("Identity", manifest.identity),
        ("Held-out identity", data.heldout.manifest.identity),
        ("Tokenizer", f"sha256 {manifest.tokenizer_sha256}"),
    ]
    return pairs(rows)


def _parts(split: SplitSummary) -> str:
    """What every stretch of the sources gave."""
    parts = sorted(split.manifest.parts, key=lambda part: -part.tokens)
    shown = parts[:MOST_PARTS]
    rows = [
        [
            *(_plain(word) for word in (part.name, part.source_name or part.source, part.licence, part.version)),
            short(part.tokens),
            count(part.documents),
            size(part.text_bytes),
        ]
        for part in shown
    ]
    heads = ["part", "source", "licence", "version", "tokens", "documents", "text"]
    more = (
        f": the largest {len(shown)}, {count(len(parts) - len(shown))} more are left out"
        if len(parts) > len(shown)
        else ""
    )
    body = table(f"Parts of the training text{more}", heads, rows, numbers=(4, 5, 6))
    return f"<details><summary>{count(len(parts))} part{'' if len(parts) == 1 else 's'}</summary>{body}</details>"


def _plain(text: str) -> str:
    """Nothing in it that a browser would not show as it is."""
    return visible(" ".join(text.split()))


def _words(text: str) -> str:
    return escape(_plain(text))
