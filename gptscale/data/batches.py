"""Rows of token ids as training batches: inputs, targets, which targets carry loss, and where documents begin.

Shape legend: N rows, B sequences of a micro-batch, T tokens of a sequence; a row is T+1 tokens.
"""

from __future__ import annotations

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

    def make(self, rows: Rows, length: int) -> Batch:
        """Rows as sequences of `length` tokens: each row as it is, or cut into several."""
        inputs_NT, targets_NT = rows.tokens[:, :-1], rows.tokens[:, 1:]
        silent_NT = self._silent(rows, inputs_NT)
        silent_BT = None if silent_NT is None else silent_NT.reshape(-1, length)
        inputs_BT = inputs_NT.reshape(-1, length)
        return Batch(
            self._pinned(inputs_BT),
            self._pinned(targets_NT.reshape(-1, length)),
            inputs_BT.size if silent_BT is None else inputs_BT.size - int(np.count_nonzero(silent_BT)),
            self._starts(rows, inputs_BT) if self.document_mask else None,
            None if silent_BT is None else self._pinned(silent_BT),
        )

    def _starts(self, rows: Rows, inputs_BT: npt.NDArray[Any]) -> torch.Tensor:
        if rows.starts is None:
            return self._pinned(document_starts(inputs_BT, self.end_of_text))
        length = inputs_BT.shape[1]
        within = rows.starts[:, :-1].reshape(len(rows.tokens), -1, length)
        begins = np.arange(within.shape[1])[:, None] * length
        return self._pinned(np.maximum(within - begins, 0).reshape(-1, length))

    def _silent(self, rows: Rows, inputs_NT: npt.NDArray[Any]) -> npt.NDArray[np.bool_] | None:
        """Targets that carry no loss [N, T]; None where all do."""
        if rows.used is None and self.boundary_loss:
            return None
        closing_NT: npt.NDArray[np.bool_] = inputs_NT == self.end_of_text
        if rows.used is None or rows.starts is None:
            return closing_NT
        position_T = np.arange(1, rows.tokens.shape[1])
        foreign_NT = rows.starts[:, 1:] == position_T  # the first token of another piece
        if self.boundary_loss:
            foreign_NT &= ~closing_NT  # of a document that goes on elsewhere nothing follows here
        silent_NT: npt.NDArray[np.bool_] = foreign_NT | (position_T >= rows.used[:, None])
        return silent_NT

    def _pinned(self, values: npt.NDArray[Any]) -> torch.Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(values))
        return tensor.pin_memory() if self.pin else tensor
