"""mosaicml-streaming: MDS shards, its own shuffle, its own loader."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from gptscale.bench.readers.common import Batches, Work


def _import(name: str) -> Any:
    """streaming imports torchvision, and reads text without. Beside a CPU build of torch the operators of torchvision's
    wheel, which is built for CUDA, do not load, and its import fails unless they are declared."""
    if not torch.cuda.is_available() and not hasattr(torch.ops.torchvision, "nms"):
        declared: Any = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
        for operator in ("nms", "qnms"):
            declared.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _DECLARED.append(declared)
    return importlib.import_module(name)


_DECLARED: list[Any] = []
"""Declarations last as long as they are referred to."""
streaming = _import("streaming")


def build(work: Work) -> None:
    shutil.rmtree(work.folder, ignore_errors=True)
    ids, row = work.tokens(), work.row
    columns = {"tokens": f"ndarray:uint16:{row}"}
    with streaming.MDSWriter(out=work.folder, columns=columns, size_limit="256mb") as writer:
        for start in range(0, len(ids) - row + 1, work.sequence_length):
            writer.write({"tokens": np.asarray(ids[start : start + row])})


def _collate(samples: list[dict[str, Any]]) -> torch.Tensor:
    return torch.from_numpy(np.stack([sample["tokens"] for sample in samples]).astype(np.int64))


class Reader:
    flags = "StreamingDataset(shuffle=True, shuffle_algo='py1e'), StreamingDataLoader(num_workers=0)"

    def __init__(self, work: Work, state: Any) -> None:
        streaming.base.util.clean_stale_shared_memory()
        dataset = streaming.StreamingDataset(
            local=work.folder, shuffle=True, shuffle_algo="py1e", shuffle_seed=work.seed, batch_size=work.batch
        )
        self._loader = streaming.StreamingDataLoader(dataset, batch_size=work.batch, num_workers=0, collate_fn=_collate)
        if state is not None:
            self._loader.load_state_dict(state)

    def __iter__(self) -> Iterator[Batches]:
        for rows_BT in self._loader:
            yield (rows_BT,)

    def state(self) -> Any:
        return self._loader.state_dict()


def order(samples: int) -> Any:
    """The ids of an epoch, as `StreamingDataset` works them out at its start and at every resume."""
    partition = _import("streaming.base.partition").get_partitions("relaxed", samples, 64, 1, 1, 1, 8)
    shard_samples = 1 << 15
    sizes = np.full(-(-samples // shard_samples), shard_samples, np.int64)
    sizes[-1] = samples - shard_samples * (len(sizes) - 1)
    shuffled = _import("streaming.base.shuffle").get_shuffle("py1e", sizes, 64, 0, 0, 1 << 18)
    return np.where(partition != -1, shuffled[partition], -1)
