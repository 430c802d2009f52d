"""Read sequences out of shards by position: nothing is mapped, so memory stays the same however much is read.

A row is `sequence_length + 1` tokens: row k of a shard is tokens[k·L : k·L+L+1], inputs all but its last token and
targets all but its first, so that neighbours share one token, and every token but a shard's first is a target once.

Shape legend: N rows, T = sequence_length inputs of a row.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from gptscale.data.order import Ints
from gptscale.data.remote import AnyCorpus
from gptscale.runtime.errors import UserError

_MOST_OPEN_FILES = 4096
"""By readers that share what may be open, and at most a quarter of what their process may open."""


@dataclass(frozen=True)
class Rows:
    """Samples as they are read."""

    tokens: npt.NDArray[Any]
    """[N, T+1], of the type that is stored."""
    used: Ints | None = None
    """How many tokens of each row are text, from its first on [N]; the others fill it up. None: all."""
    starts: Ints | None = None
    """For each token the position in its row at which its piece of a document begins [N, T+1]. None: at a row's
    beginning, and after each end_of_text."""


class RowReader:
    """The rows of one split. `keep_tails` adds each shard's last, shorter row, filled up with end_of_text."""

    def __init__(self, corpus: AnyCorpus, sequence_length: int, keep_tails: bool = False) -> None:
        self.corpus = corpus
        self._length = sequence_length
        self._dtype: np.dtype[Any] = np.dtype(corpus.manifest.dtype)
        self._shard_tokens = np.array([shard.tokens for shard in corpus.manifest.shards], dtype=np.int64)
        per_shard = (self._shard_tokens - 1 + (sequence_length - 1 if keep_tails else 0)) // sequence_length
        self._first_row = np.concatenate([[0], np.cumsum(np.maximum(per_shard, 0))])
        self._first_token = np.concatenate([[0], np.cumsum(self._shard_tokens)])
        self.count = int(self._first_row[-1])
        """Rows there are."""
        self._header_bytes = np.array(
            [shard.token_bytes - shard.tokens * self._dtype.itemsize for shard in corpus.manifest.shards],
            dtype=np.int64,
        )
        self._files: dict[int, int] = {}
        self.share_files(1)

    def share_files(self, readers: int) -> None:
        """Keep few enough files open that so many readers can together."""
        may_open = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        limit = _MOST_OPEN_FILES if may_open == resource.RLIM_INFINITY else min(_MOST_OPEN_FILES, may_open // 4)
        self._most_open = max(1, limit // readers)

    def rows(self, numbers: Ints) -> Rows:
        """The rows of these numbers [N], all of them whole ones."""
        return Rows(self.read(numbers)[0])

    def read(self, rows: Ints) -> tuple[npt.NDArray[Any], Ints]:
        """Token ids [N, T+1] in the corpus's own type, and how many targets of each row are real [N].

        Raises UserError where a file has become shorter since it was opened.
        """
        shard = np.searchsorted(self._first_row, rows, side="right") - 1
        start = (rows - self._first_row[shard]) * self._length
        tokens = np.minimum(self._length + 1, self._shard_tokens[shard] - start)
        item = self._dtype.itemsize
        out_NT = np.empty((len(rows), self._length + 1), dtype=self._dtype)
        out_bytes, row_bytes = out_NT.reshape(-1).view(np.uint8).data, out_NT.shape[1] * item
        offsets, sizes = self._header_bytes[shard] + start * item, tokens * item
        # For every row of every step: no more than has to be.
        files, read, place = self._files, os.preadv, 0
        for number, offset, size in zip(shard.tolist(), offsets.tolist(), sizes.tolist(), strict=True):
            descriptor = files[number] if number in files else self._file(number)
            if read(descriptor, (out_bytes[place : place + size],), offset) != size:
                self._refuse(number, offset + size)
            place += row_bytes
        for row in np.flatnonzero(tokens <= self._length).tolist():
            out_NT[row, tokens[row] :] = self.corpus.manifest.end_of_text
        return out_NT, tokens - 1

    def stretches(self, number: int) -> tuple[int, tuple[tuple[int, int], ...]]:
        """Where a whole row lies: its shard's number in the manifest, and of each stretch of tokens in it the first
        token and how many there are."""
        shard = int(np.searchsorted(self._first_row, number, side="right")) - 1
        return shard, (((number - int(self._first_row[shard])) * self._length, self._length + 1),)

    def places(self, rows: Ints) -> Ints:
        """Where in the split's tokens, all shards together, each row begins [N]."""
        shard = np.searchsorted(self._first_row, rows, side="right") - 1
        begins: Ints = self._first_token[shard] + (rows - self._first_row[shard]) * self._length
        return begins

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])

    def fill(self, wanted: Sequence[tuple[npt.NDArray[Any], int, int]]) -> None:
        """Fill arrays with tokens: of each the shard's number, and the first token there."""
        for target, number, first in wanted:
            offset = int(self._header_bytes[number]) + first * self._dtype.itemsize
            if os.preadv(self._file(number), [target.data], offset) != target.nbytes:
                self._refuse(number, offset + target.nbytes)

    def _refuse(self, number: int, end: int) -> NoReturn:
        raise UserError(
            f"{self.corpus.token_path(self.corpus.manifest.shards[number])}: ends before byte {end}\n"
            "it became shorter while in use: restore it and start the run again"
        )

    def _file(self, number: int) -> int:
        if number in self._files:
            return self._files[number]
        if len(self._files) >= self._most_open:
            os.close(self._files.pop(next(iter(self._files))))  # of a random order none is needed sooner
        path = self.corpus.token_path(self.corpus.manifest.shards[number])
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._files[number] = descriptor
        return descriptor


def document_starts(inputs_NT: npt.NDArray[Any], end_of_text: int) -> npt.NDArray[np.int64]:
    """For each token the position in its row at which its document begins: [N, T].

    A document begins after an end_of_text, which is the last token of the one before, and with the row: what of it lies
    in another row is out of sight anyway.
    """
    rows, length = inputs_NT.shape
    after = np.flatnonzero(inputs_NT == end_of_text) + 1
    begins = np.sort(np.concatenate([np.arange(rows) * length, after[after % length != 0]]))
    found: npt.NDArray[np.int64] = np.repeat(begins % length, np.diff(begins, append=rows * length))
    return found.reshape(rows, length)
