"""Hugging Face datasets as a stream: Parquet files, a buffer of 1000 rows that is drawn from, torch's loader."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset

from gptscale.bench.readers.common import Batches, Work
from gptscale.bench.readers.huggingface import build as build
from gptscale.bench.readers.huggingface import collate


class Reader:
    flags = "load_dataset(streaming=True).shuffle(seed, buffer_size=1000), state_dict(), DataLoader(num_workers=0)"

    def __init__(self, work: Work, state: Any) -> None:
        folder = str(Path(work.folder) / "parquet")
        stream = load_dataset("parquet", data_dir=folder, split="train", streaming=True).with_format("numpy")
        self._stream = stream.shuffle(seed=work.seed, buffer_size=1000)
        self._batch = work.batch
        if state is not None:
            self._stream.load_state_dict(state)

    def __iter__(self) -> Iterator[Batches]:
        loader: Any = torch.utils.data.DataLoader(
            self._stream, batch_size=self._batch, num_workers=0, collate_fn=collate, drop_last=True
        )
        for rows_BT in loader:
            yield (rows_BT,)

    def state(self) -> Any:
        return self._stream.state_dict()


def order(samples: int) -> None:
    """Only the order of files is drawn: nothing grows with the corpus."""
