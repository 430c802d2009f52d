"""Which documents go into which shard: worked out from their lengths alone, so that shards can be written in any order.

Documents follow one another, and a shard is full when the next does not fit; only one that is longer than a whole shard
is cut. A plan names stretches of documents, not each of them, and so stays small however many there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from gptscale.data.duplicates import KEPT, Marks
from gptscale.data.shards import END_DTYPE

_DOCUMENTS_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class Tokenised:
    """Documents in two files: raw token ids, one document after the other, and where each ends (uint64, exclusive)."""

    tokens: Path
    ends: Path
    token_xxh3_128: str
    end_xxh3_128: str
    place: int = 0
    """Of its first document's mark among all marks."""


class Documents(NamedTuple):
    """Some of the documents of one `Tokenised`, one after the other."""

    first: int
    """Number of the first of them there, from 0."""
    starts: npt.NDArray[np.int64]
    """The token at which each begins [N]."""
    ends: npt.NDArray[np.int64]
    stays: npt.NDArray[np.bool_]
    """False for those that others repeat."""


@dataclass(frozen=True)
class Stretch:
    """What a shard takes of one `Tokenised`: the documents `first` to `stop` (exclusive) that stay, and of these the
    tokens `begin` to `end` (exclusive)."""

    source: int
    first: int
    stop: int
    begin: int
    end: int


@dataclass(frozen=True)
class ShardPlan:
    tokens: int
    documents: int
    stretches: tuple[Stretch, ...]


def read_documents(
    source: Tokenised, marks: Marks | None, first: int = 0, stop: int | None = None
) -> Iterator[Documents]:
    """The documents `first` to `stop` (exclusive; None: to the last), a bounded number at a time."""
    with source.ends.open("rb") as file:
        before = 0
        if first:
            file.seek((first - 1) * END_DTYPE.itemsize)
            before = int(np.frombuffer(file.read(END_DTYPE.itemsize), END_DTYPE)[0])
        while stop is None or first < stop:
            wanted = _DOCUMENTS_AT_ONCE if stop is None else min(_DOCUMENTS_AT_ONCE, stop - first)
            ends = np.frombuffer(file.read(wanted * END_DTYPE.itemsize), END_DTYPE).astype(np.int64)
            if not len(ends):
                return
            place = source.place + first
            stays = np.ones(len(ends), bool) if marks is None else np.asarray(marks[place : place + len(ends)]) == KEPT
            yield Documents(first, np.concatenate([[before], ends[:-1]]), ends, stays)
            first, before = first + len(ends), int(ends[-1])


def runs(stays: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Where documents that stay follow one another: first and stop (exclusive) of each run."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], stays, [False]])))
    return [(first, stop) for first, stop in edges.reshape(-1, 2).tolist()]


def plan_shards(sources: Sequence[Tokenised], marks: Marks | None, shard_tokens: int) -> tuple[ShardPlan, ...]:
    """All documents of `sources`, but for those that are marked, as shards of at most `shard_tokens` tokens."""
    planner = _Planner(shard_tokens)
    for number, source in enumerate(sources):
        for documents in read_documents(source, marks):
            planner.add(number, documents)
    return planner.finish()


class _Planner:
    def __init__(self, shard_tokens: int) -> None:
        self._shard_tokens = shard_tokens
        self._plans: list[ShardPlan] = []
        self._tokens = self._documents = 0
        self._stretches: list[Stretch] = []

    def add(self, source: int, documents: Documents) -> None:
        kept = np.flatnonzero(documents.stays)
        starts, ends = documents.starts[kept], documents.ends[kept]
        total = np.cumsum(ends - starts)
        number, done = 0, 0  # documents, and tokens of them
        while number < len(kept):
            room = self._shard_tokens - self._tokens
            fitting = int(np.searchsorted(total, done + room, side="right"))
            begin = int(ends[number]) - (int(total[number]) - done)
            first = documents.first + int(kept[number])
            if fitting > number:
                last = fitting - 1
                stop = documents.first + int(kept[last]) + 1
                self._take(
                    Stretch(source, first, stop, begin, int(ends[last])), int(total[last]) - done, last + 1 - number
                )
                number, done = fitting, int(total[last])
            elif self._tokens:
                self._close()
            else:  # longer than a whole shard
                self._take(Stretch(source, first, first + 1, begin, begin + room), room, 1)
                self._close()
                done += room

    def finish(self) -> tuple[ShardPlan, ...]:
        if self._tokens:
            self._close()
        return tuple(self._plans)

    def _take(self, stretch: Stretch, tokens: int, documents: int) -> None:
        self._tokens += tokens
        self._documents += documents
        last = self._stretches[-1] if self._stretches else None
        if last is not None and last.source == stretch.source and last.stop <= stretch.first:
            stretch = Stretch(last.source, last.first, stretch.stop, last.begin, stretch.end)
            self._stretches.pop()
        self._stretches.append(stretch)

    def _close(self) -> None:
        self._plans.append(ShardPlan(self._tokens, self._documents, tuple(self._stretches)))
        self._tokens = self._documents = 0
        self._stretches = []
