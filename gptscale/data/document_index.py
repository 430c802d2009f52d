"""Which document a token belongs to, and the documents of a split by number: a few reads, whatever its size.

Numbers and places run through all shards: place 0 is the first token of the first shard, document 0 ends with it or
after it. A document longer than a shard is several, as in the files of document ends.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gptscale.data.remote import AnyCorpus
from gptscale.data.shards import Manifest, PartRecord


class DocumentSpan(NamedTuple):
    """Tokens [start, stop) of a shard, which has this number in the manifest."""

    shard: int
    start: int
    stop: int


class SourceRange(NamedTuple):
    """Where the text of a source lies in a split: places [start, stop)."""

    name: str
    start: int
    stop: int


class DocumentIndex:
    """The documents of one split. Files are looked into, never read whole, but for document ends in a store."""

    def __init__(self, corpus: AnyCorpus) -> None:
        self.corpus = corpus
        shards = corpus.manifest.shards
        self._first_token = np.concatenate([[0], np.cumsum([shard.tokens for shard in shards])])
        self._first_document = np.concatenate([[0], np.cumsum([shard.documents for shard in shards])])
        self.count = int(self._first_document[-1])
        """Documents there are."""
        self._ends = lru_cache(maxsize=2)(self._open_ends)

    def at(self, place: int) -> int:
        """The number of the document that holds the token at `place`."""
        shard = int(np.searchsorted(self._first_token, place, side="right")) - 1
        # A key of another type would have numpy convert the whole file.
        key = np.uint64(place - int(self._first_token[shard]))
        return int(self._first_document[shard]) + int(np.searchsorted(self._ends(shard), key, side="right"))

    def span(self, number: int) -> DocumentSpan:
        shard = int(np.searchsorted(self._first_document, number, side="right")) - 1
        ends, within = self._ends(shard), number - int(self._first_document[shard])
        return DocumentSpan(shard, int(ends[within - 1]) if within else 0, int(ends[within]))

    def place(self, shard: int, token: int) -> int:
        """Of a token of a shard."""
        return int(self._first_token[shard]) + token

    def first_tokens(self, span: DocumentSpan, most: int) -> npt.NDArray[Any]:
        """At most so many token ids from a document's beginning."""
        shard = self.corpus.manifest.shards[span.shard]
        return self.corpus.some_tokens(shard, span.start, min(span.stop, span.start + most))

    def _open_ends(self, shard: int) -> npt.NDArray[np.uint64]:
        return self.corpus.ends(self.corpus.manifest.shards[shard])


def source_of(part: PartRecord) -> str:
    """What groups parts: the source's name, or in older manifests, which have none, its format."""
    return part.source_name or part.source


def source_ranges(manifest: Manifest) -> tuple[SourceRange, ...]:
    """Where each source's text lies, in order; those of parts that follow each other are one. Of documents in random
    order nobody knows: they are one source without a name."""
    if manifest.shuffled:
        return (SourceRange("", 0, manifest.tokens),)
    found: list[SourceRange] = []
    place = 0
    for part in manifest.parts:
        name, stop = source_of(part), place + part.tokens
        if found and found[-1].name == name:
            found[-1] = SourceRange(name, found[-1].start, stop)
        elif part.tokens:
            found.append(SourceRange(name, place, stop))
        place = stop
    return tuple(found)


def source_at(ranges: tuple[SourceRange, ...], place: int) -> str:
    """The source whose text is at a place; empty where the manifest does not tell."""
    return next((one.name for one in ranges if one.start <= place < one.stop), "")
