"""How long the documents of a split are, from its files of document ends alone, in memory that does not grow with it.

Lengths below `_COUNTED` tokens are counted one by one, so that quantiles are exact; the few documents longer than that
are kept as they are, at most one for every 262,144 tokens that are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gptscale.data.remote import AnyCorpus
from gptscale.data.shards import END_DTYPE, end_file
from gptscale.flow import Shard
from gptscale.runtime.errors import UserError

Ints = npt.NDArray[np.int64]

MOST_DOCUMENTS = 50_000_000
"""From this many documents on, some shards stand for all: 400 MB of document ends are read within seconds."""
_PERCENTILES = (50, 90, 99)
_COUNTED = 1 << 18
_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class LengthBin:
    """Documents of `low` to `high` tokens, both included, and how many tokens they have together."""

    low: int
    high: int
    documents: int
    tokens: int


@dataclass(frozen=True)
class Lengths:
    """In tokens, the one that ends a document included. A document longer than a shard counts as its pieces."""

    documents: int
    """Those whose lengths these are."""
    shards: int
    of_shards: int
    """More than `shards` where some stand for all."""
    smallest: int
    median: int
    mean: float
    p90: int
    p99: int
    largest: int
    bins: tuple[LengthBin, ...]
    """From the shortest document to the longest; edges at 1, 2 and 5 times powers of ten."""


def document_lengths(corpus: AnyCorpus, most_documents: int = MOST_DOCUMENTS) -> Lengths:
    """Of all shards, or of evenly spread ones with about `most_documents` documents.

    A quantile is the smallest length that so many documents do not exceed. Raises UserError where the ends of
    documents are not in order.
    """
    shards = corpus.manifest.shards
    chosen = _chosen(shards, most_documents)
    counter = _Counter()
    for shard in chosen:
        for lengths in _shard_lengths(corpus, shard):
            counter.add(lengths)
    return counter.result(len(chosen), len(shards))


def bin_edges(largest: int) -> list[int]:
    """1, 2, 5, 10, … up to the first above `largest`."""
    edges = [1]
    while edges[-1] <= largest:
        number = len(edges)
        edges.append((1, 2, 5)[number % 3] * 10 ** (number // 3))
    return edges


def _chosen(shards: Sequence[Shard], most_documents: int) -> list[Shard]:
    documents = sum(shard.documents for shard in shards)
    if documents <= most_documents:
        return list(shards)
    wanted = max(1, len(shards) * most_documents // documents)
    return [shards[(2 * number + 1) * len(shards) // (2 * wanted)] for number in range(wanted)]


def _shard_lengths(corpus: AnyCorpus, shard: Shard) -> Iterator[Ints]:
    """Some at a time: nothing is mapped, and the buffer is used again."""
    ends = np.empty(_AT_ONCE, dtype=END_DTYPE)
    before = np.zeros(1, dtype=END_DTYPE)
    with corpus.open_ends(shard) as file:
        while got := file.readinto(ends.data):
            part = ends[: got // END_DTYPE.itemsize]
            lengths = np.diff(part, prepend=before).astype(np.int64)  # what is not in order wraps to below 0
            if lengths.min() < 1:
                raise UserError(
                    f"{corpus.split}/{end_file(shard)} of {corpus.folder}: document ends are not in order\n"
                    "prepare the text again (`gptscale prepare`) into a new folder, or copy the file again"
                )
            before[0] = part[-1]
            yield lengths


class _Counter:
    """Adds lengths up."""

    def __init__(self) -> None:
        self._counts: Ints = np.zeros(1, dtype=np.int64)
        """Documents of each length below `_COUNTED`, as far as there are any."""
        self._long: list[Ints] = []

    def add(self, lengths: Ints) -> None:
        long = lengths >= _COUNTED
        if long.any():
            self._long.append(lengths[long])
            lengths = lengths[~long]
        counts = np.bincount(lengths, minlength=len(self._counts))
        counts[: len(self._counts)] += self._counts
        self._counts = counts

    def result(self, shards: int, of_shards: int) -> Lengths:
        values, documents = self._by_length()
        upto = np.cumsum(documents)
        total, tokens = int(upto[-1]), values * documents
        median, p90, p99 = (int(values[np.searchsorted(upto, -(-percent * total // 100))]) for percent in _PERCENTILES)
        largest = int(values[-1])
        edges = bin_edges(largest)
        first = np.searchsorted(values, edges)
        found = [
            LengthBin(low, high - 1, int(documents[start:stop].sum()), int(tokens[start:stop].sum()))
            for low, high, start, stop in zip(edges, edges[1:], first.tolist(), first[1:].tolist(), strict=False)
        ]
        begun = next(number for number, one in enumerate(found) if one.documents)
        return Lengths(
            documents=total,
            shards=shards,
            of_shards=of_shards,
            smallest=int(values[0]),
            median=median,
            mean=float(tokens.sum()) / total,
            p90=p90,
            p99=p99,
            largest=largest,
            bins=tuple(found[begun:]),
        )

    def _by_length(self) -> tuple[Ints, Ints]:
        """Lengths that there are, in order, and the documents of each."""
        short = np.flatnonzero(self._counts)
        long, times = np.unique(np.concatenate([*self._long, np.empty(0, dtype=np.int64)]), return_counts=True)
        return np.concatenate([short, long]), np.concatenate([self._counts[short], times])
