"""Read rows that are packed from pieces of documents, as `gptscale.data.packing` planned them.

Shape legend: N rows, T = sequence_length inputs of a row.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Literal

import numpy as np
import numpy.typing as npt

from gptscale.data.cache import Wanted
from gptscale.data.corpus import AGAIN, Corpus
from gptscale.data.order import Ints
from gptscale.data.packing import (
    HEADER_BYTES,
    PLAN,
    PackingPlan,
    ensure_packed,
    packing_folder,
    packing_name,
    parse_plan,
    plan_files,
)
from gptscale.data.remote import AnyCorpus, RemoteCorpus, agreed
from gptscale.data.remote_rows import RangeRowReader, RemoteRowReader
from gptscale.data.rows import RowReader, Rows
from gptscale.data.transfer import Check, Range
from gptscale.runtime.errors import UserError

_MOST_OPEN_PLANS = 64
Read = Callable[[Sequence[tuple[int, int]]], list[bytes]]
"""Stretches of a file: of each the first byte, and how many."""


def packed_row_reader(
    corpus: AnyCorpus, sequence_length: int, verify: bool = False, few: bool = False
) -> PackedRowReader:
    """The packed rows of one split, wherever it lies; `few` as `TrainingStream` has it. Raises UserError.

    Here the packing is planned now if that was not done before. In a store it has to be there.
    """
    if isinstance(corpus, Corpus):
        return _LocalPackedRows(corpus, sequence_length, ensure_packed(corpus, sequence_length, verify=verify))
    plan = _fetched_plan(corpus, sequence_length)
    return (_FewPackedRows if few else RemotePackedRowReader)(corpus, sequence_length, plan)


class PackedRowReader(ABC):
    """The packed rows of one split."""

    def __init__(self, corpus: AnyCorpus, sequence_length: int, plan: PackingPlan, tokens: RowReader) -> None:
        self.corpus = corpus
        self._length = sequence_length
        self._plan = plan
        self._tokens = tokens
        self._first_row = np.concatenate([[0], np.cumsum([shard.rows for shard in plan.shards])]).astype(np.int64)
        self.count = plan.rows
        """Rows there are."""
        self.most_in_shard = max(shard.rows for shard in plan.shards)
        """Rows of the shard that has most."""

    @abstractmethod
    def _file(self, shard: int, which: Literal[0, 1]) -> AbstractContextManager[Read]:
        """A file of a shard's plan, its rows or its pieces."""

    def share_files(self, readers: int) -> None:
        """As `RowReader.share_files`, of the shards."""
        self._tokens.share_files(readers)

    def rows(self, numbers: Ints) -> Rows:
        """The rows of these numbers [N]. Raises UserError where a file has become shorter since it was opened."""
        manifest = self.corpus.manifest
        tokens_NT1 = np.full((len(numbers), self._length + 1), manifest.end_of_text, dtype=manifest.dtype)
        starts_NT1 = np.empty(tokens_NT1.shape, dtype=np.int64)
        used = np.empty(len(numbers), dtype=np.int64)
        stretches = []
        for row, (shard, pieces) in enumerate(self._pieces(numbers)):
            place = 0
            for start, size in pieces:
                stretches.append((tokens_NT1[row, place : place + size], shard, start))
                starts_NT1[row, place : place + size] = place
                place += size
            starts_NT1[row, place:] = place  # what fills the row up sees itself alone
            used[row] = place
        self._tokens.fill(stretches)
        return Rows(tokens_NT1, used, starts_NT1)

    def stretches(self, number: int) -> tuple[int, tuple[tuple[int, int], ...]]:
        """Where a row lies: its shard's number in the manifest, and the first token and length of each piece."""
        ((shard, pieces),) = self._pieces(np.array([number]))
        return shard, tuple((start, size) for start, size in pieces)

    def close(self) -> None:
        self._tokens.close()

    def _pieces(self, numbers: Ints) -> list[tuple[int, list[list[int]]]]:
        """Of each row its shard, and the first token there, and tokens, of each of its pieces."""
        shards = (np.searchsorted(self._first_row, numbers, side="right") - 1).tolist()
        of_shard: dict[int, list[int]] = defaultdict(list)
        for row, shard in enumerate(shards):
            of_shard[shard].append(row)
        found: list[list[list[int]]] = [[] for _ in shards]
        for shard, rows in of_shard.items():
            within = [int(numbers[row]) - int(self._first_row[shard]) for row in rows]
            with self._file(shard, 0) as read:
                bounds = [pair.tolist() for pair in _integers(read, [(place, 2) for place in within])]
            with self._file(shard, 1) as read:
                pieces = _integers(read, [(2 * first, 2 * (stop - first)) for first, stop in bounds])
            for row, of_row in zip(rows, pieces, strict=True):
                found[row] = of_row.reshape(-1, 2).tolist()
        return list(zip(shards, found, strict=True))


class _LocalPackedRows(PackedRowReader):
    """Of text on this host. Plans of a few shards stay open."""

    corpus: Corpus

    def __init__(self, corpus: Corpus, sequence_length: int, plan: PackingPlan) -> None:
        super().__init__(corpus, sequence_length, plan, RowReader(corpus, sequence_length))
        self._open: OrderedDict[tuple[int, int], int] = OrderedDict()

    @contextmanager
    def _file(self, shard: int, which: Literal[0, 1]) -> Iterator[Read]:
        if (shard, which) not in self._open:
            if len(self._open) >= 2 * _MOST_OPEN_PLANS:
                os.close(self._open.popitem(last=False)[1])
            name = plan_files(self.corpus.manifest.shards[shard], self._plan.shards[shard])[which].name
            path = packing_folder(self.corpus, self._length) / name
            self._open[shard, which] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._open.move_to_end((shard, which))
        yield _positional(self._open[shard, which])

    def close(self) -> None:
        super().close()
        while self._open:
            os.close(self._open.popitem()[1])


class RemotePackedRowReader(PackedRowReader):
    """Of text in a store: plan and shards come by way of the cache, one file held at a time."""

    corpus: RemoteCorpus

    def __init__(self, corpus: RemoteCorpus, sequence_length: int, plan: PackingPlan) -> None:
        self._shards = RemoteRowReader(corpus, sequence_length)
        super().__init__(corpus, sequence_length, plan, self._shards)

    @property
    def check(self) -> Check:
        """As `RemoteRowReader.check`."""
        return self._shards.check

    @check.setter
    def check(self, check: Check) -> None:
        self._shards.check = check

    def wanted(self, rows: Ints) -> list[Wanted]:
        """The files that these rows are read from, each once."""
        shards = np.unique(np.searchsorted(self._first_row, rows, side="right") - 1).tolist()
        return [
            wanted
            for shard in shards
            for wanted in (
                self._wanted(shard, 0),
                self._wanted(shard, 1),
                self.corpus.wanted(self.corpus.manifest.shards[shard]),
            )
        ]

    @contextmanager
    def _file(self, shard: int, which: Literal[0, 1]) -> Iterator[Read]:
        descriptor = self.corpus.cache.hold(self._wanted(shard, which), self.check)
        try:
            yield _positional(descriptor)
        finally:
            self.corpus.cache.release(descriptor)

    def _wanted(self, shard: int, which: Literal[0, 1]) -> Wanted:
        file = plan_files(self.corpus.manifest.shards[shard], self._plan.shards[shard])[which]
        name = f"{packing_name(self.corpus.split, self._length)}/{file.name}"
        return Wanted(self.corpus.store, name, file.size, file.digest)


class _FewPackedRows(PackedRowReader):
    """Of text in a store, for whoever looks at a few rows: what they are made of is fetched, and nothing kept."""

    corpus: RemoteCorpus

    def __init__(self, corpus: RemoteCorpus, sequence_length: int, plan: PackingPlan) -> None:
        super().__init__(corpus, sequence_length, plan, RangeRowReader(corpus, sequence_length))

    @contextmanager
    def _file(self, shard: int, which: Literal[0, 1]) -> Iterator[Read]:
        file = plan_files(self.corpus.manifest.shards[shard], self._plan.shards[shard])[which]
        name = f"{packing_name(self.corpus.split, self._length)}/{file.name}"

        yield lambda stretches: self.corpus.store.read_ranges(
            [Range(name, first, first + count, file.size) for first, count in stretches], self.corpus.cache.check
        )


def _fetched_plan(corpus: RemoteCorpus, length: int) -> PackingPlan:
    """The plan that lies beside the shards in a store, all its files there. Raises UserError."""
    folder = packing_name(corpus.split, length)
    url = corpus.store.url(f"{folder}/{PLAN}")
    again = (
        "plan it before the folder is copied there: gptscale prepare … data.packing=best_fit "
        f"data.sequence_length={length}; or set data.packing=cut"
    )
    try:
        data = agreed(corpus.store, f"{folder}/{PLAN}", corpus.cache.check)
    except FileNotFoundError as error:
        raise UserError(f"{url}: missing: rows of {length} tokens are not packed there\n{again}") from error
    plan = parse_plan(data, url, corpus.manifest, length, again)
    wanted = {
        file.name: file.size
        for shard, packed in zip(corpus.manifest.shards, plan.shards, strict=True)
        for file in plan_files(shard, packed)
    }
    found = corpus.store.sizes(folder, wanted, corpus.cache.check)
    for name, size in wanted.items():
        if name not in found or found[name] not in (None, size):
            raise UserError(f"{corpus.store.url(f'{folder}/{name}')}: missing, or not of {size} bytes\n{AGAIN}")
    return plan


def _positional(descriptor: int) -> Read:
    return lambda stretches: [os.pread(descriptor, count, first) for first, count in stretches]


def _integers(read: Read, stretches: Sequence[tuple[int, int]]) -> list[npt.NDArray[np.uint64]]:
    """Of a .npy file of uint64 several stretches: of each its first number, and how many there are."""
    found = read([(HEADER_BYTES + 8 * first, 8 * count) for first, count in stretches])
    for data, (_, count) in zip(found, stretches, strict=True):
        assert len(data) == 8 * count, "the plan's files had the right sizes as it was opened"
    return [np.frombuffer(data, "<u8") for data in found]
