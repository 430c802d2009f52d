"""Rows of token ids as training batches: inputs, targets, which targets carry loss, and where documents begin.

Shape legend: N rows, B sequences of a micro-batch, T tokens of a sequence; a row is T+1 tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from gptscale.data.rows import Rows, document_starts
from gptscale.flow import Batch


@dataclass(frozen=True)
class BatchMaker:
    """How rows become batches."""

    end_of_text: int
    document_mask: bool = False
    """Say where documents begin, so that tokens see their own document alone."""
    boundary_loss: bool = True
    """Whether a document's first token is a target of the end_of_text before it."""
    pin: bool = False

    def make(self, rows: Rows, length: int, counts: Sequence[int]) -> list[Batch]:
        """Rows as sequences of `length` tokens: each row as it is, or cut into several. The first `counts[0]` rows make
        the first batch, and so on: what is done for all of them at once costs less."""
        assert sum(counts) == len(rows.tokens)
        pieces = (rows.tokens.shape[1] - 1) // length
        silent_NT = self._silent(rows)
        sequences = [count * pieces for count in counts]
        loss_tokens = [count * length for count in sequences]
        silent: Sequence[torch.Tensor | None] = [None] * len(counts)
        if silent_NT is not None:
            silent = self._parts(silent_NT.reshape(-1, length), sequences)
            loss_tokens = [of_all - int(np.count_nonzero(one)) for of_all, one in zip(loss_tokens, silent, strict=True)]
        starts: Sequence[torch.Tensor | None] = [None] * len(counts)
        if self.document_mask:
            starts = self._parts(self._starts(rows, length), sequences)
        tokens_BT1 = rows.tokens
        if pieces > 1:  # neighbours share a token
            places = np.arange(pieces)[:, None] * length + np.arange(length + 1)
            tokens_BT1 = rows.tokens[:, places].reshape(-1, length + 1)
        tokens = self._parts(tokens_BT1, sequences)
        return [Batch(*parts) for parts in zip(tokens, loss_tokens, starts, silent, strict=True)]

    def _starts(self, rows: Rows, length: int) -> npt.NDArray[np.int64]:
        if rows.starts is None:
            return document_starts(rows.tokens[:, :-1].reshape(-1, length), self.end_of_text)
        within = rows.starts[:, :-1].reshape(len(rows.tokens), -1, length)
        begins = np.arange(within.shape[1])[:, None] * length
        found: npt.NDArray[np.int64] = np.maximum(within - begins, 0).reshape(-1, length)
        return found

    def _silent(self, rows: Rows) -> npt.NDArray[np.bool_] | None:
        """Targets that carry no loss [N, T]; None where all do."""
        if rows.used is None and self.boundary_loss:
            return None
        closing_NT: npt.NDArray[np.bool_] = rows.tokens[:, :-1] == self.end_of_text
        if rows.used is None or rows.starts is None:
            return closing_NT
        position_T = np.arange(1, rows.tokens.shape[1])
        foreign_NT = rows.starts[:, 1:] == position_T  # the first token of another piece
        if self.boundary_loss:
            foreign_NT &= ~closing_NT  # of a document that goes on elsewhere nothing follows here
        silent_NT: npt.NDArray[np.bool_] = foreign_NT | (position_T >= rows.used[:, None])
        return silent_NT

    def _parts(self, values: npt.NDArray[Any], sizes: list[int]) -> Sequence[torch.Tensor]:
        # Of rows on the host views will do: they are widened, and so copied, next.
        whole = torch.from_numpy(np.ascontiguousarray(values)).pin_memory() if self.pin else torch.from_numpy(values)
        return torch.split(whole, sizes)
