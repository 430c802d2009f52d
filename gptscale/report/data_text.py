"""A prepared data folder in a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from gptscale.data.excerpts import Excerpt
from gptscale.data.lengths import Lengths
from gptscale.report.data_summary import DataSummary, Group, SplitSummary
from gptscale.report.terminal import bar, columns, printable, text_lines
from gptscale.report.units import a_token, count, percent, short, size

MOST_GROUPS = 20
LINES = 3
"""Of each sample."""
BAR = 24


def data_text(data: DataSummary, width: int) -> str:
    """Counts, sources, licences, lengths and samples, in lines of at most `width` letters where the words allow it."""
    blocks = [
        _head(data),
        _splits(data.splits),
        *(_sources(split) for split in data.splits),
        _licences(data.train),
        _left_out(data),
        _lengths(data.splits),
        _histogram(data.train.lengths),
        _samples(data.excerpts, width),
    ]
    return "\n\n".join("\n".join(block) for block in blocks if block)


def _head(data: DataSummary) -> list[str]:
    manifest = data.train.manifest
    held = sum(split.file_bytes for split in data.splits)
    rows = [
        ["vocabulary", f"{count(manifest.vocab_size)} pieces, token ids as {type_name(manifest.dtype)}"],
        ["tokenizer", f"sha256 {manifest.tokenizer_sha256[:16]}…"],
        ["identity", f"{manifest.identity[:16]}…"],
        ["on disk", f"{size(held)} of shards"],
        ["files", printable(data.condition, 400)],
        ["order", "documents at random" if manifest.shuffled else "documents as the sources have them"],
    ]
    return [f"{data.folder}: prepared text", "", *columns(rows)]


def _splits(splits: Sequence[SplitSummary]) -> list[str]:
    rows = [["split", "tokens", "documents", "text", "bytes/token", "shards", "on disk"]]
    for split in splits:
        manifest = split.manifest
        figures = [count(manifest.tokens), count(manifest.documents), size(manifest.text_bytes)]
        figures += [a_token(manifest.text_bytes, manifest.tokens), count(len(manifest.shards)), size(split.file_bytes)]
        rows.append([manifest.split, *figures])
    return columns(rows, right=(1, 2, 3, 4, 5, 6))


def _sources(split: SplitSummary) -> list[str]:
    manifest = split.manifest
    rows = [[f"{manifest.split}, by source", "format", "tokens", "share", "documents", "bytes/token"]]
    rows[0] += ["licence", "version"]
    for group in split.sources[:MOST_GROUPS]:
        figures = [short(group.tokens), percent(group.tokens / manifest.tokens), count(group.documents)]
        words = [printable(group.name, 32), one_of(group.formats, 16)]
        about = [one_of(group.licences, 28), one_of(group.versions, 28)]
        rows.append([*words, *figures, a_token(group.text_bytes, group.tokens), *about])
    return [*columns(rows, right=(2, 3, 4, 5)), *_more(split.sources)]


def _licences(split: SplitSummary) -> list[str]:
    """Only where there are several: one is in the table of sources."""
    if len(split.licences) < 2:
        return []
    rows = [[f"{split.manifest.split}, by licence", "tokens", "share", "documents"]]
    for group in split.licences[:MOST_GROUPS]:
        figures = [short(group.tokens), percent(group.tokens / split.manifest.tokens), count(group.documents)]
        rows.append([printable(group.name, 48), *figures])
    return [*columns(rows, right=(1, 2, 3)), *_more(split.licences)]


def _left_out(data: DataSummary) -> list[str]:
    rows = [["left out by filters", "reason", "documents", "text"]]
    for one in data.left_out[:MOST_GROUPS]:
        reason = printable(one.reason.replace("_", " "), 32)
        rows.append([printable(one.source, 32), reason, count(one.documents), size(one.text_bytes)])
    return columns(rows, right=(2, 3)) if len(rows) > 1 else []


def _lengths(splits: Sequence[SplitSummary]) -> list[str]:
    rows = [["tokens a document", "shortest", "median", "mean", "p90", "p99", "longest"]]
    notes = []
    for split in splits:
        found = split.lengths
        if found is not None:
            figures = [found.smallest, found.median, found.mean, found.p90, found.p99, found.largest]
            rows.append([split.manifest.split, *map(count, figures)])
            notes += [f"  {note}" for note in [sampled(split)] if note]
    return [*columns(rows, right=range(1, 7)), *notes] if len(rows) > 1 else []


def sampled(split: SplitSummary) -> str:
    """What stands for all, where that is so."""
    found = split.lengths
    if found is None or found.shards == found.of_shards:
        return ""
    shards = f"{count(found.shards)} of {count(found.of_shards)} shards"
    return f"{split.manifest.split}: lengths from {shards}, {count(found.documents)} documents"


def _histogram(found: Lengths | None) -> list[str]:
    if found is None:
        return []
    most = max(max(one.documents for one in found.bins) / found.documents, 1e-300)
    tokens = sum(one.tokens for one in found.bins)
    rows = [["train, length", "documents", "", "their tokens"]]
    for one in found.bins:
        share = one.documents / found.documents
        within = f"{count(one.low)}–{count(one.high)}" if one.high > one.low else count(one.low)
        rows.append([within, percent(share), bar(share / most, BAR), percent(one.tokens / tokens)])
    return columns(rows, right=(1, 3))


def _samples(excerpts: Sequence[Excerpt], width: int) -> list[str]:
    lines = []
    for excerpt in excerpts:
        source = f"{printable(excerpt.source, 40)}, " if excerpt.source else ""
        where = f"document {count(excerpt.document)} ({excerpt.shard}), {count(excerpt.tokens)} tokens"
        lines += [
            f"sample of {source}{where}:",
            *(f"  │ {line}" for line in text_lines(excerpt.text, width - 4, LINES)),
        ]
    return lines


def one_of(words: Sequence[str], most: int) -> str:
    """The first of a few words, and how many more there are."""
    if not words:
        return "–"
    more = f" and {count(len(words) - 1)} more" if len(words) > 1 else ""
    return printable(words[0], max(8, most - len(more))) + more


def type_name(dtype: str) -> str:
    """As people call it: uint16 for "<u2"."""
    return {"<u2": "uint16", "<u4": "uint32"}.get(dtype, dtype)


def _more(groups: Sequence[Group]) -> list[str]:
    left = groups[MOST_GROUPS:]
    return [f"  and {count(len(left))} more, {short(sum(group.tokens for group in left))} tokens"] if left else []
