"""Read sequences out of shards by position: nothing is mapped, so memory stays the same however much is read.

A row is `sequence_length + 1` tokens: row k of a shard is tokens[k·L : k·L+L+1], inputs all but its last token and
targets all but its first, so that neighbours share one token, and every token but a shard's first is a target once.

Shape legend: N rows, T = sequence_length inputs of a row.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from gptscale.data.order import Ints
from gptscale.data.reads import read_rows
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
        shards = corpus.manifest.shards
        self._shard_tokens = np.array([shard.tokens for shard in shards], dtype=np.int64)
        per_shard = (self._shard_tokens - 1 + (sequence_length - 1 if keep_tails else 0)) // sequence_length
        self._first_row = np.concatenate([[0], np.cumsum(np.maximum(per_shard, 0))])
        self._first_token = np.concatenate([[0], np.cumsum(self._shard_tokens)])
        self.count = int(self._first_row[-1])
        """Rows there are."""
        self._header_bytes = np.array(
            [shard.token_bytes - shard.tokens * self._dtype.itemsize for shard in shards], dtype=np.int64
        )
        self._files: dict[int, int] = {}
        """Descriptors of what is open, by number of the shard."""
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
        offsets, sizes = self._header_bytes[shard] + start * self._dtype.itemsize, tokens * self._dtype.itemsize
        out_NT = np.empty((len(rows), self._length + 1), dtype=self._dtype)
        out_bytes = out_NT.view(np.uint8)
        for some in self._at_once(shard):
            descriptors = self._descriptors(shard[some].tolist())
            read = read_rows(descriptors, offsets[some], sizes[some], out_bytes[some])
            for row in np.flatnonzero(read < sizes[some]).tolist():
                self._refuse(int(shard[some][row]), int((offsets + sizes)[some][row]))
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
            if os.preadv(self._descriptors([number])[0], [target.data], offset) != target.nbytes:
                self._refuse(number, offset + target.nbytes)

    def _refuse(self, number: int, end: int) -> NoReturn:
        raise UserError(
            f"{self.corpus.token_path(self.corpus.manifest.shards[number])}: ends before byte {end}\n"
            "it became shorter while in use: restore it and start the run again"
        )

    def _at_once(self, shard: Ints) -> Iterable[slice]:
        """Rows that are read together, of as many shards as may be open; `shard` [N] is each row's."""
        step = self._most_open
        return (slice(first, first + step) for first in range(0, len(shard), step))

    def _descriptors(self, numbers: list[int]) -> list[int]:
        """Of shards' files, opened if need be; of no more than may be open."""
        files = self._files
        try:
            return [files[number] for number in numbers]  # nearly always
        except KeyError:
            needed = set(numbers)
        surplus = len(files.keys() | needed) - self._most_open
        for number in [number for number in files if number not in needed][: max(0, surplus)]:
            os.close(files.pop(number))  # of a random order none is needed sooner
        for number in needed - files.keys():
            files[number] = self._open(number)
        return [files[number] for number in numbers]

    def _open(self, number: int) -> int:
        return os.open(self.corpus.token_path(self.corpus.manifest.shards[number]), os.O_RDONLY | os.O_CLOEXEC)


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
