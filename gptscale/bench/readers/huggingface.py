"""Hugging Face datasets, by index: rows of equal length in an Arrow table, `shuffle()`, torch's loader."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset, load_dataset, load_from_disk

from gptscale.bench.readers.common import Batches, Work

_FILES = 16
_ROWS_AT_ONCE = 1024


def build(work: Work) -> None:
    """As an Arrow dataset for reading by index, and as Parquet files for reading as a stream."""
    folder = Path(work.folder)
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "parquet").mkdir(parents=True)
    ids, row = work.tokens(), work.row
    rows = (len(ids) - 1) // work.sequence_length
    schema = pa.schema([("tokens", pa.list_(pa.uint16(), row))])
    for number, part in enumerate(np.array_split(np.arange(rows), _FILES)):
        with pq.ParquetWriter(folder / "parquet" / f"{number:05d}.parquet", schema, compression="none") as writer:
            for first in range(0, len(part), _ROWS_AT_ONCE):
                starts = part[first : first + _ROWS_AT_ONCE, None] * work.sequence_length
                flat = pa.array(np.asarray(ids[starts + np.arange(row)]).reshape(-1))
                column = pa.FixedSizeListArray.from_arrays(flat, row)
                writer.write_table(pa.Table.from_arrays([column], schema=schema))
    table = load_dataset("parquet", data_dir=str(folder / "parquet"), split="train", cache_dir=str(folder / "cache"))
    table.save_to_disk(str(folder / "arrow"))
    shutil.rmtree(folder / "cache")


def collate(rows: list[dict[str, Any]]) -> torch.Tensor:
    return torch.from_numpy(np.stack([row["tokens"] for row in rows]).astype(np.int64))


class Reader:
    flags = "Dataset.with_format('numpy').shuffle(seed), DataLoader(num_workers=0); resumed by skipping indices"

    def __init__(self, work: Work, state: Any) -> None:
        table = load_from_disk(str(Path(work.folder) / "arrow")).with_format("numpy")
        self._table = table.shuffle(seed=work.seed, keep_in_memory=True)
        self._batch = work.batch
        self._taken = 0
        if state is not None:
            self._taken = state
            self._table = self._table.skip(state * work.batch)

    def __iter__(self) -> Iterator[Batches]:
        loader: Any = torch.utils.data.DataLoader(
            self._table, batch_size=self._batch, num_workers=0, collate_fn=collate, drop_last=True
        )
        for rows_BT in loader:
            self._taken += 1
            yield (rows_BT,)

    def state(self) -> Any:
        return self._taken


def order(samples: int) -> Any:
    """`Dataset.shuffle` keeps a permutation of all rows as a table of its own."""
    column = np.zeros(samples, np.uint8)
    return Dataset.from_dict({"row": column}).shuffle(seed=0, keep_in_memory=True)
