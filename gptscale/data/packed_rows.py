"""Read rows that are packed from pieces of documents, as `gptscale.data.packing` planned them.

Shape legend: N rows, T = sequence_length inputs of a row.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gptscale.data.corpus import Corpus
from gptscale.data.order import Ints
from gptscale.data.packing import ensure_packed, packing_folder, piece_file, row_file
from gptscale.data.rows import RowReader, Rows

_MOST_OPEN_PLANS = 64


class PackedRowReader:
    """The packed rows of one split."""

    def __init__(self, corpus: Corpus, sequence_length: int) -> None:
        """Plans the packing if that was not done before. Raises UserError."""
        self.corpus = corpus
        self._length = sequence_length
        self._tokens = RowReader(corpus, sequence_length)
        plan = ensure_packed(corpus, sequence_length)
        self._folder = packing_folder(corpus, sequence_length)
        self._first_row = np.concatenate([[0], np.cumsum([shard.rows for shard in plan.shards])]).astype(np.int64)
        self.count = plan.rows
        """Rows there are."""
        self._plans: OrderedDict[int, tuple[_Integers, _Integers]] = OrderedDict()

    def share_files(self, readers: int) -> None:
        """As `RowReader.share_files`, of the shards."""
        self._tokens.share_files(readers)

    def rows(self, numbers: Ints) -> Rows:
        """The rows of these numbers [N]. Raises UserError where a file has become shorter since it was opened."""
        manifest = self.corpus.manifest
        tokens_NT1 = np.full((len(numbers), self._length + 1), manifest.end_of_text, dtype=manifest.dtype)
        starts_NT1 = np.empty(tokens_NT1.shape, dtype=np.int64)
        used = np.empty(len(numbers), dtype=np.int64)
        shards = np.searchsorted(self._first_row, numbers, side="right") - 1
        for row, (shard, number) in enumerate(zip(shards.tolist(), numbers.tolist(), strict=True)):
            place = 0
            for start, size in self._pieces(shard, number - int(self._first_row[shard])):
                self._tokens.read_into(tokens_NT1[row, place : place + size], shard, start)
                starts_NT1[row, place : place + size] = place
                place += size
            starts_NT1[row, place:] = place  # what fills the row up sees itself alone
            used[row] = place
        return Rows(tokens_NT1, used, starts_NT1)

    def stretches(self, number: int) -> tuple[int, tuple[tuple[int, int], ...]]:
        """Where a row lies: its shard's number in the manifest, and the first token and length of each piece."""
        shard = int(np.searchsorted(self._first_row, number, side="right")) - 1
        pieces = self._pieces(shard, number - int(self._first_row[shard]))
        return shard, tuple((start, size) for start, size in pieces)

    def close(self) -> None:
        self._tokens.close()
        while self._plans:
            for file in self._plans.popitem()[1]:
                file.close()

    def _pieces(self, shard: int, row: int) -> list[list[int]]:
        """First token in the shard, and tokens, of each piece of a row."""
        if shard not in self._plans:
            if len(self._plans) >= _MOST_OPEN_PLANS:
                for file in self._plans.popitem(last=False)[1]:
                    file.close()
            named = self.corpus.manifest.shards[shard]
            self._plans[shard] = (
                _Integers(self._folder / row_file(named)),
                _Integers(self._folder / piece_file(named)),
            )
        self._plans.move_to_end(shard)
        rows, pieces = self._plans[shard]
        first, stop = rows.read(row, 2).tolist()
        found: list[list[int]] = pieces.read(2 * first, 2 * (stop - first)).reshape(-1, 2).tolist()
        return found


class _Integers:
    """The uint64 numbers of a .npy file, read by position."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        with path.open("rb") as head:
            np.lib.format.read_magic(head)
            np.lib.format.read_array_header_1_0(head)
            self._header_bytes = head.tell()

    def read(self, first: int, count: int) -> npt.NDArray[np.uint64]:
        data = os.pread(self._file, 8 * count, self._header_bytes + 8 * first)
        assert len(data) == 8 * count, "the plan was checked when it was opened"
        return np.frombuffer(data, "<u8")

    def close(self) -> None:
        os.close(self._file)
