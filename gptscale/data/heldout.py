"""Held-out text as evaluation batches: every sequence once, and as many batches on every rank.

Shape legend: B sequences of a micro-batch, T tokens of a sequence.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from gptscale.data.cache import ShardCache
from gptscale.data.order import Ints
from gptscale.data.remote import fetch_manifest, open_corpus
from gptscale.data.remote_rows import row_reader
from gptscale.data.rows import RowReader, document_starts
from gptscale.flow import Batch
from gptscale.runtime.errors import UserError
from gptscale.tokenizer import Tokenizer

_ROWS_AT_ONCE = 1024


class HeldoutBatches:
    """The evaluation batches of one data rank. Iterate over it as often as needed; it reads as it goes.

    `limit_sequences` rows (0: all), spread evenly over the held-out part, so that every source has its share; in order,
    each shard's shorter last row included with the missing targets ignored. Every rank gets the same number of batches
    of the same shape, because under ZeRO-3 and in a pipeline all ranks have to run forward together: where sequences
    run out, rows whose every target is ignored fill up. A mean loss must therefore be weighted by `Batch.loss_tokens`,
    over batches and over ranks.

    With `source`, of those rows the ones that begin in that source's text: the batches of all sources together hold
    each of them once.
    """

    def __init__(
        self,
        folder: str | Path,
        sequence_length: int,
        micro_batch: int,
        limit_sequences: int,
        data_rank: int,
        data_ranks: int,
        document_mask: bool = False,
        source: str | None = None,
        boundary_loss: bool = True,
        cache: ShardCache | None = None,
    ) -> None:
        """`folder` is a prepared folder, or the address of one, which is read through `cache`. Raises UserError where
        its held-out part is damaged or empty.

        With `document_mask` batches say where documents begin; without `boundary_loss` their first tokens are no
        targets.
        """
        self._reader = heldout_rows(folder, sequence_length, cache)
        self.tokenizer_sha256: str = self._reader.corpus.manifest.tokenizer_sha256
        self._micro_batch = micro_batch
        self._data_rank = data_rank
        self._data_ranks = data_ranks
        self._document_mask = document_mask
        self._boundary_loss = boundary_loss
        self._rows = heldout_selection(self._reader, limit_sequences)
        if source is not None:
            self._rows = self._rows[source_of_rows(self._reader, self._rows) == source]
        self.sequences = len(self._rows)
        """Sequences used, on all ranks together."""
        self.batches = math.ceil(self.sequences / (micro_batch * data_ranks))
        """Batches that each rank iterates over."""
        self.loss_tokens, self.text_bytes = self._totals()
        """Targets, and bytes of the text that they stand for, over all sequences and ranks."""

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Batch]:
        for number in range(self.batches):
            first = (number * self._data_ranks + self._data_rank) * self._micro_batch
            yield self._batch(self._rows[first : first + self._micro_batch])

    def bits_per_byte(self, mean_loss: float) -> float:
        """From the mean loss over all targets in nats per token; comparable between tokenizers. NaN for no text."""
        if not self.text_bytes:
            return math.nan
        return mean_loss * self.loss_tokens / (math.log(2) * self.text_bytes)

    def _batch(self, rows: Ints) -> Batch:
        rows_NT1, real_NT = self._read(rows)
        end_of_text = self._reader.corpus.manifest.end_of_text
        tokens_BT1 = np.full((self._micro_batch, rows_NT1.shape[1]), end_of_text, dtype=rows_NT1.dtype)
        silent_BT = np.ones((self._micro_batch, rows_NT1.shape[1] - 1), dtype=np.bool_)
        tokens_BT1[: len(rows_NT1)], silent_BT[: len(rows_NT1)] = rows_NT1, ~real_NT
        starts = torch.from_numpy(document_starts(tokens_BT1[:, :-1], end_of_text)) if self._document_mask else None
        loss_tokens = int(real_NT.sum())
        silent = torch.from_numpy(silent_BT) if loss_tokens < silent_BT.size else None
        return Batch(torch.from_numpy(tokens_BT1), loss_tokens, starts, silent)

    def _totals(self) -> tuple[int, int]:
        byte_lengths = Tokenizer.load(self._reader.corpus.tokenizer_path).byte_lengths()
        loss_tokens = text_bytes = 0
        for first in range(0, self.sequences, _ROWS_AT_ONCE):
            rows_NT, real_NT = self._read(self._rows[first : first + _ROWS_AT_ONCE])
            text_bytes += int(byte_lengths[rows_NT[:, 1:][real_NT]].sum())
            loss_tokens += int(real_NT.sum())
        return loss_tokens, text_bytes

    def _read(self, rows: Ints) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
        """Token ids [N, T+1], and which of their targets are to be predicted [N, T]."""
        rows_NT, targets = self._reader.read(rows)
        real_NT = np.arange(rows_NT.shape[1] - 1) < targets[:, None]
        if not self._boundary_loss:
            real_NT &= rows_NT[:, :-1] != self._reader.corpus.manifest.end_of_text
        return rows_NT, real_NT


def heldout_rows(folder: str | Path, sequence_length: int, cache: ShardCache | None = None) -> RowReader:
    """The rows of the held-out part, short ones included. Raises UserError where there is not one target."""
    reader = row_reader(open_corpus(folder, "heldout", cache=cache), sequence_length, keep_tails=True)
    if reader.count == 0:
        raise UserError(
            f"{folder}/heldout: too little text to evaluate on\nprepare with a larger data.heldout_fraction"
        )
    return reader


def heldout_selection(reader: RowReader, limit_sequences: int) -> Ints:
    """The rows of an evaluation, in order: `limit_sequences` at even steps over all that is held out; 0 is all."""
    sequences = min(reader.count, limit_sequences) if limit_sequences else reader.count
    return np.arange(sequences, dtype=np.int64) * reader.count // sequences


def heldout_sources(folder: str | Path, cache: ShardCache | None = None) -> tuple[str, ...]:
    """The names of the sources whose text is held out, in their order; () where a manifest does not tell them."""
    parts = fetch_manifest(folder, "heldout", cache).parts
    if not all(part.source_name for part in parts):
        return ()
    return tuple(dict.fromkeys(part.source_name for part in parts if part.tokens))


def source_of_rows(reader: RowReader, rows: Ints) -> npt.NDArray[np.str_]:
    """The name of the source in whose text each row begins. A row that goes on into the next one's is not cut."""
    parts = reader.corpus.manifest.parts
    ends = np.cumsum([part.tokens for part in parts])
    names = np.array([part.source_name for part in parts])
    return names[np.searchsorted(ends, reader.places(rows), side="right")]
