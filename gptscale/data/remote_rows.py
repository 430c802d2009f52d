"""Rows of a corpus, wherever it lies: local shards are read as they are, those in a store by way of the cache."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gptscale.data.cache import Wanted
from gptscale.data.corpus import check_file, check_ids
from gptscale.data.order import Ints
from gptscale.data.remote import AnyCorpus, RemoteCorpus
from gptscale.data.rows import RowReader
from gptscale.data.transfer import Check, go_on


def row_reader(corpus: AnyCorpus, sequence_length: int, keep_tails: bool = False) -> RowReader:
    if isinstance(corpus, RemoteCorpus):
        return RemoteRowReader(corpus, sequence_length, keep_tails)
    return RowReader(corpus, sequence_length, keep_tails)


class RangeRowReader(RowReader):
    """As `RowReader`, of text in a store: fetches the rows themselves and not their shards, and keeps nothing.

    For whoever looks at a few: a row costs a request, and nothing vouches for what comes.
    """

    corpus: RemoteCorpus

    def read(self, rows: Ints) -> tuple[npt.NDArray[Any], Ints]:
        wanted = []
        for row in rows.tolist():
            number, ((start, count),) = self.stretches(row)
            wanted.append((self.corpus.manifest.shards[number], start, start + count))
        found = self.corpus.stretches(wanted)
        return np.stack(found), np.full(len(rows), found[0].size - 1)

    def fill(self, wanted: Sequence[tuple[npt.NDArray[Any], int, int]]) -> None:
        shards = self.corpus.manifest.shards
        found = self.corpus.stretches(
            [(shards[number], first, first + target.size) for target, number, first in wanted]
        )
        for (target, _, _), tokens in zip(wanted, found, strict=True):
            target[:] = tokens


class RemoteRowReader(RowReader):
    """As `RowReader`, with one shard held in the cache at a time, and none between two reads."""

    corpus: RemoteCorpus

    def __init__(self, corpus: RemoteCorpus, sequence_length: int, keep_tails: bool = False) -> None:
        super().__init__(corpus, sequence_length, keep_tails)
        self.check: Check = go_on
        """Asked while a shard is waited for; raises to end that."""
        self._checked: set[int] = set()
        self.most_in_shard = int(np.diff(self._first_row).max())
        """Rows of the shard that has most."""

    def read(self, rows: Ints) -> tuple[npt.NDArray[Any], Ints]:
        """As `RowReader.read`, each shard's rows together. Raises UserError where a shard cannot be had."""
        order = np.argsort(rows, kind="stable")
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        try:
            rows_NT, targets = super().read(rows[order])
        finally:
            self.close()
        return rows_NT[back], targets[back]

    def fill(self, wanted: Sequence[tuple[npt.NDArray[Any], int, int]]) -> None:
        """As `RowReader.fill`, each shard's tokens together."""
        try:
            super().fill(sorted(wanted, key=lambda one: one[1]))
        finally:
            self.close()

    def wanted(self, rows: Ints) -> list[Wanted]:
        """The shards that hold these rows, each once."""
        numbers = np.unique(np.searchsorted(self._first_row, rows, side="right") - 1)
        return [self.corpus.wanted(self.corpus.manifest.shards[number]) for number in numbers.tolist()]

    def close(self) -> None:
        while self._files:
            self.corpus.cache.release(self._files.popitem()[1])

    def _at_once(self, shard: Ints) -> Iterable[slice]:
        """Each shard's rows together."""
        bounds = [0, *(np.flatnonzero(np.diff(shard)) + 1).tolist(), len(shard)]
        return (slice(first, stop) for first, stop in itertools.pairwise(bounds) if first < stop)

    def _descriptors(self, numbers: list[int]) -> list[int]:
        (number,) = set(numbers)
        if number not in self._files:
            self.close()
            self._files[number] = self._open(number)
        return [self._files[number]] * len(numbers)

    def _open(self, number: int) -> int:
        shard = self.corpus.manifest.shards[number]
        descriptor = self.corpus.cache.hold(self.corpus.wanted(shard), self.check)
        if number not in self._checked:  # the right content, but is it what the rest of the manifest says
            try:
                self._check(number)
            except BaseException:
                self.corpus.cache.release(descriptor)
                raise
            self._checked.add(number)
        return descriptor

    def _check(self, number: int) -> None:
        shard = self.corpus.manifest.shards[number]
        path = self.corpus.token_path(shard)
        check_file(path, shard.token_bytes, self._dtype, shard.tokens)
        if self.corpus.cache.verify:
            ids = np.load(path, mmap_mode="r", allow_pickle=False)
            check_ids(ids, self.corpus.manifest.vocab_size, self.corpus.wanted(shard).url)
