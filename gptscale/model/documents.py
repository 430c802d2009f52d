"""Where the documents of a batch begin, in each form that an attention kernel takes. Nothing here grows with T².

Shape legend: B sequences of a micro-batch, T tokens of a sequence, N documents of a batch.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Documents:
    """The documents of one batch: tokens attend within their own alone, and learned positions restart with each.

    Every form but `starts_BT` is made when first asked for, once for all layers and for activation checkpointing's
    second forward. Modules are given the object and not its tensors, which the hooks of ZeRO-3 would take into the
    graph of gradients.
    """

    def __init__(self, starts_BT: Tensor, device: torch.device | str) -> None:
        """`starts_BT`: for each token the position in its row at which its document begins; int64, on the host."""
        self.starts_BT = starts_BT
        self.device = torch.device(device)
        self.block_masks: dict[int | None, Any] = {}
        """FlexAttention's masks of this batch, by window (`gptscale.model.flex_attention` makes them)."""

    @cached_property
    def starts_on_device(self) -> Tensor:
        """`starts_BT` on the device."""
        return self.starts_BT.to(self.device, non_blocking=True)

    @cached_property
    def positions(self) -> Tensor:
        """Of each token within its document, from 0: [B, T], int64 on the device. For learned positions.

        Rotary ones need no restart: a score depends on the distance of its two tokens alone, and both are of one
        document.
        """
        return torch.arange(self.starts_BT.shape[1], device=self.device) - self.starts_on_device

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """Where each document begins among all B·T tokens in a row, and their end: int32 on the device.

        Ends that follow, of empty documents, fill it up to 2ⁿ + 1 numbers: few lengths, so that compiled code is not
        compiled again for every batch, and few empty documents, each of which costs a kernel blocks to skip.
        """
        begins = self._begins
        room = 1 << (len(begins) - 1).bit_length()
        ends = np.full(room + 1, self.starts_BT.numel(), dtype=np.int32)
        ends[: len(begins)] = begins
        made = torch.from_numpy(ends)
        if self.device.type == "cuda":
            made = made.pin_memory()  # a copy from pageable memory would wait for the device
        return made.to(self.device, non_blocking=True)

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest document, rounded up to a power of two (for the reason above), at most T."""
        tokens = int(np.diff(self._begins, append=self.starts_BT.numel()).max())
        return min(1 << (tokens - 1).bit_length(), self.starts_BT.shape[1])

    @cached_property
    def _begins(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Index of each document's first token among all B·T tokens in a row: [N]."""
        starts_BT = self.starts_BT.numpy()
        return np.flatnonzero(starts_BT == np.arange(starts_BT.shape[1]))
