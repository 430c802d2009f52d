"""As nanoGPT's training script reads: a memory map opened for each batch, rows from places drawn at random."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from gptscale.bench.readers.common import Batches, Work


def build(work: Work) -> None:
    """The file of ids is what it reads."""


class Reader:
    flags = "np.memmap per batch, torch.randint; rows with replacement"

    def __init__(self, work: Work, state: Any) -> None:
        self._work = work
        self._generator = torch.Generator().manual_seed(work.seed)
        if state is not None:
            self._generator.set_state(state)

    def __iter__(self) -> Iterator[Batches]:
        length = self._work.sequence_length
        while True:
            ids = np.memmap(self._work.ids, dtype=np.uint16, mode="r")
            places = torch.randint(len(ids) - length, (self._work.batch,), generator=self._generator)
            inputs_BT = torch.stack([torch.from_numpy(ids[i : i + length].astype(np.int64)) for i in places])
            targets_BT = torch.stack([torch.from_numpy(ids[i + 1 : i + 1 + length].astype(np.int64)) for i in places])
            yield inputs_BT, targets_BT

    def state(self) -> Any:
        return self._generator.get_state()


def order(samples: int) -> None:
    """Draws with replacement: no order to build, and no epoch that sees every token."""
