"""megatron-core: `.bin/.idx` files, GPTDataset with its indices, no attention masks, a loader that skips."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets import helpers
from megatron.core.datasets.gpt_dataset import (
    GPTDataset,
    GPTDatasetConfig,
    _build_document_index,
    _build_shuffle_index,
)
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from megatron.core.datasets.utils import Split

from gptscale.bench.readers.common import Batches, Work


def build(work: Work) -> None:
    folder = Path(work.folder)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    builder = IndexedDatasetBuilder(str(folder / "text.bin"), dtype=np.uint16)
    ids = work.tokens()
    for start, end in pairwise([0, *work.document_ends().tolist()]):
        builder.add_document(torch.from_numpy(np.array(ids[start:end])), [end - start])
    builder.finalize(str(folder / "text.idx"))


class _Tokenizer:
    """What GPTDataset asks of a tokenizer."""

    def __init__(self, end_of_text: int) -> None:
        self.eod = self.pad = end_of_text
        self.vocab_size = 1 << 16
        self.unique_identifiers = {"end_of_text": end_of_text}


class Reader:
    flags = "GPTDataset(create_attention_mask=False, reset flags off, path_to_cache), DataLoader(num_workers=0)"

    def __init__(self, work: Work, state: Any) -> None:
        dataset = _dataset(Path(work.folder), work)
        taken = state or 0
        self._taken = taken
        # As Megatron's pretraining sampler: rows in the index's order, from those on that were consumed.
        order = range(taken * work.batch, len(dataset))
        self._loader: Any = torch.utils.data.DataLoader(
            dataset, batch_size=work.batch, sampler=order, num_workers=0, drop_last=True
        )

    def __iter__(self) -> Iterator[Batches]:
        for batch in self._loader:
            self._taken += 1
            yield batch["tokens"], batch["labels"], batch["loss_mask"], batch["position_ids"]

    def state(self) -> Any:
        return self._taken


def _dataset(folder: Path, work: Work) -> Any:
    config = GPTDatasetConfig(
        random_seed=work.seed,
        sequence_length=work.sequence_length,
        blend=([str(folder / "text")], None),
        split="1",
        path_to_cache=str(folder / "cache"),
        tokenizer=_Tokenizer(work.end_of_text),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    indexed = IndexedDataset(str(folder / "text"))
    documents = np.arange(len(indexed.document_indices) - 1, dtype=np.int32)
    return GPTDataset(indexed, str(folder / "text"), documents, None, Split.train, config)


def order(samples: int) -> Any:
    """Its three indices of one epoch: of documents, of samples, and a shuffled one, of 4096 ids and two documents each.

    They are written to files once, and mapped by later starts.
    """
    length, generator = 4096, np.random.RandomState(0)
    sizes = np.full(2 * samples, length // 2, np.int32)
    documents = _build_document_index(np.arange(len(sizes), dtype=np.int32), 1, generator, False)
    rows = helpers.build_sample_idx(sizes, documents, length, 1, samples * length, True, True)
    shuffled = _build_shuffle_index(len(rows) - 1, len(rows) - 1, generator)
    return documents, rows, shuffled
