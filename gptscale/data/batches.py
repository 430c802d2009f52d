"""Rows of token ids as training batches: inputs, targets, which targets carry loss, and where documents begin.

Shape legend: N rows, B sequences of a micro-batch, T tokens of a sequence; a row is T+1 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from gptscale.data.order import Ints
from gptscale.data.rows import Rows, document_starts
from gptscale.flow import IGNORED_TARGET, Batch


@dataclass(frozen=True)
class BatchMaker:
    """How rows become batches."""

    end_of_text: int
    document_mask: bool = False
    """Say where documents begin, so that tokens see their own document alone."""
    boundary_loss: bool = True
    """Whether a document's first token is a target of the end_of_text before it."""
    pin: bool = False

    def make(self, rows: Rows, length: int) -> Batch:
        """Rows as sequences of `length` tokens: each row as it is, or cut into several."""
        inputs_BT = rows.tokens[:, :-1].astype(np.int64)
        targets_BT = rows.tokens[:, 1:].astype(np.int64)
        silent_BT = self._silent(rows, inputs_BT)
        if silent_BT is not None:
            targets_BT[silent_BT] = IGNORED_TARGET
        inputs_BT, targets_BT = inputs_BT.reshape(-1, length), targets_BT.reshape(-1, length)
        loss_tokens = targets_BT.size if silent_BT is None else int((targets_BT != IGNORED_TARGET).sum())
        starts_BT = None
        if self.document_mask:
            if rows.starts is None:
                starts_BT = self._pinned(document_starts(inputs_BT, self.end_of_text))
            else:
                within = rows.starts[:, :-1].reshape(len(rows.tokens), -1, length)
                begins = np.arange(within.shape[1])[:, None] * length
                starts_BT = self._pinned(np.maximum(within - begins, 0).reshape(-1, length))
        return Batch(self._pinned(inputs_BT), self._pinned(targets_BT), loss_tokens, starts_BT)

    def _silent(self, rows: Rows, inputs_NT: Ints) -> npt.NDArray[np.bool_] | None:
        """Targets that carry no loss [N, T]; None where all do."""
        closing_NT = inputs_NT == self.end_of_text
        if rows.used is None or rows.starts is None:
            return None if self.boundary_loss else closing_NT
        position_T = np.arange(1, rows.tokens.shape[1])
        foreign_NT = rows.starts[:, 1:] == position_T  # the first token of another piece
        if self.boundary_loss:
            foreign_NT &= ~closing_NT  # of a document that goes on elsewhere nothing follows here
        silent_NT: npt.NDArray[np.bool_] = foreign_NT | (position_T >= rows.used[:, None])
        return silent_NT

    def _pinned(self, values: npt.NDArray[np.int64]) -> torch.Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(values))
        return tensor.pin_memory() if self.pin else tensor
