"""litdata: chunks of tokens by its `optimize`, read by its `TokensLoader` and its loader."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from litdata import StreamingDataLoader, StreamingDataset, TokensLoader, optimize

from gptscale.bench.readers.common import Batches, Work

_DOCUMENTS_AT_ONCE = 1 << 10


def build(work: Work) -> None:
    shutil.rmtree(work.folder, ignore_errors=True)
    ends = np.concatenate([[0], work.document_ends()])
    groups = [
        (work, ends[first : first + _DOCUMENTS_AT_ONCE + 1]) for first in range(0, len(ends) - 1, _DOCUMENTS_AT_ONCE)
    ]
    optimize(
        fn=_documents,
        inputs=groups,
        output_dir=work.folder,
        chunk_size=work.row * (1 << 13),
        item_loader=TokensLoader(block_size=work.row),
        num_workers=1,
        start_method="fork",
    )


def _documents(group: tuple[Work, Any]) -> Iterator[torch.Tensor]:
    work, bounds = group
    ids = work.tokens()
    for start, end in pairwise(bounds.tolist()):
        yield torch.from_numpy(np.array(ids[start:end]))


class Reader:
    flags = "StreamingDataset(TokensLoader, shuffle=True, drop_last=True), StreamingDataLoader(num_workers=0)"

    def __init__(self, work: Work, state: Any) -> None:
        dataset = StreamingDataset(
            work.folder, item_loader=TokensLoader(block_size=work.row), shuffle=True, drop_last=True, seed=work.seed
        )
        self._loader = StreamingDataLoader(dataset, batch_size=work.batch, num_workers=0)
        if state is not None:
            self._loader.load_state_dict(state)

    def __iter__(self) -> Iterator[Batches]:
        for rows_BT in self._loader:
            yield (rows_BT.long(),)

    def state(self) -> Any:
        return self._loader.state_dict()
