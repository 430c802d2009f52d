"""The beginnings of a few documents of every source, always the same ones: what is in a corpus, at a glance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gptscale.data.document_index import DocumentIndex, SourceRange, source_ranges
from gptscale.data.remote import AnyCorpus
from gptscale.data.shards import token_file
from gptscale.runtime.errors import UserError
from gptscale.tokenizer import Tokenizer

MOST_SOURCES = 12
_TOKENS = 512


@dataclass(frozen=True)
class Excerpt:
    """How a document begins."""

    source: str
    """Empty where the manifest does not tell."""
    shard: str
    document: int
    """Of its split, from 0."""
    tokens: int
    """Of the whole document."""
    text: str
    whole: bool
    """Whether `text` is all of it."""


def excerpts(corpus: AnyCorpus) -> tuple[Excerpt, ...]:
    """A few documents of each of the largest sources, at even distances over the documents of that source."""
    index = DocumentIndex(corpus)
    tokenizer = Tokenizer.load(corpus.tokenizer_path)
    chosen = _by_source(corpus)[:MOST_SOURCES]
    each = 4 if len(chosen) == 1 else 2 if len(chosen) <= 4 else 1
    return tuple(
        _excerpt(index, tokenizer, ranges[0].name, number)
        for ranges in chosen
        for number in _spread(index, ranges, each)
    )


def _by_source(corpus: AnyCorpus) -> list[list[SourceRange]]:
    """The ranges of each source, the largest source first."""
    groups: dict[str, list[SourceRange]] = {}
    for one in source_ranges(corpus.manifest):
        groups.setdefault(one.name, []).append(one)
    return sorted(groups.values(), key=lambda ranges: -sum(one.stop - one.start for one in ranges))


def _spread(index: DocumentIndex, ranges: Sequence[SourceRange], wanted: int) -> list[int]:
    """Numbers of documents: the middle of each of `wanted` equal parts."""
    stretches = [(index.at(one.start), index.at(one.stop - 1) + 1) for one in ranges]
    total = sum(stop - start for start, stop in stretches)
    found = []
    for part in range(min(wanted, total)):
        number = (2 * part + 1) * total // (2 * min(wanted, total))
        for start, stop in stretches:
            if number < stop - start:
                found.append(start + number)
                break
            number -= stop - start
    return found


def _excerpt(index: DocumentIndex, tokenizer: Tokenizer, source: str, number: int) -> Excerpt:
    span = index.span(number)
    ids = index.first_tokens(span, _TOKENS)
    whole = len(ids) == span.stop - span.start
    try:
        text = tokenizer.decode(ids)
    except ValueError as error:
        named = f"{index.corpus.folder}/{index.corpus.split}/{token_file(index.corpus.manifest.shards[span.shard])}"
        raise UserError(f"{named}: damaged ({error})\nprepare the text again, or copy the file again") from error
    return Excerpt(
        source=source,
        shard=index.corpus.manifest.shards[span.shard].name,
        document=number,
        tokens=span.stop - span.start,
        text=text if whole else text.rstrip("\ufffd"),  # the last token may end inside a character
        whole=whole,
    )
