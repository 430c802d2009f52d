"""Documents in a random order, however many there are: they are dealt out to buckets on disk that fit into memory.

The order is the permutation of `gptscale.data.order` over all documents: document i becomes number permute(i). A bucket
is a range of those numbers, so that buckets one after the other, each sorted, are the whole in its new order.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from gptscale.data.order import permute, round_keys
from gptscale.data.shards import END_DTYPE

_BUCKET_BYTES = 1 << 26
_SEED, _DOCUMENTS = 0, 1 << 31
"""Of the permutation, which has nothing to do with a run's: its key is no corpus's."""
_PLACE = np.dtype([("number", "<u8"), ("tokens", "<u8")])

Block = tuple[npt.NDArray[Any], npt.NDArray[np.uint64]]
"""Tokens of whole documents, one after the other, and where each ends in them."""


def shuffled(
    blocks: Iterable[Block], documents: int, tokens: int, dtype: np.dtype[Any], folder: Path
) -> Iterator[tuple[BinaryIO, npt.NDArray[np.uint64]]]:
    """All documents of `blocks`, `documents` of them with `tokens` tokens, in random order, some at a time.

    Yields raw tokens and the documents' ends in them. `folder` is for what does not fit into memory.
    """
    buckets = folder / "shuffle"
    shutil.rmtree(buckets, ignore_errors=True)
    buckets.mkdir()
    count = max(1, -(-tokens * dtype.itemsize // _BUCKET_BYTES))
    each = -(-documents // count)
    keys = round_keys(_SEED, _DOCUMENTS, 0)[:, None]
    first = 0
    for values, ends in blocks:
        numbers = permute(np.arange(first, first + len(ends)), documents, keys)
        first += len(ends)
        _deal(values, ends, numbers, each, buckets)
    assert first == documents
    for bucket in range(count):
        if (buckets / f"{bucket}.place").exists():
            yield _sorted(buckets, bucket, dtype)
    buckets.rmdir()


def _deal(
    values: npt.NDArray[Any], ends: npt.NDArray[np.uint64], numbers: npt.NDArray[np.int64], each: int, buckets: Path
) -> None:
    starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
    sizes = ends.astype(np.int64) - starts
    bucket = numbers // each
    for one in np.unique(bucket).tolist():
        chosen = np.flatnonzero(bucket == one)
        places = np.empty(len(chosen), dtype=_PLACE)
        places["number"] = numbers[chosen]
        places["tokens"] = sizes[chosen]
        with (buckets / f"{one}.tok").open("ab") as tokens, (buckets / f"{one}.place").open("ab") as file:
            for start, size in zip(starts[chosen].tolist(), sizes[chosen].tolist(), strict=True):
                tokens.write(values[start : start + size].data)
            file.write(places.tobytes())


def _sorted(buckets: Path, bucket: int, dtype: np.dtype[Any]) -> tuple[BinaryIO, npt.NDArray[np.uint64]]:
    token_path, place_path = buckets / f"{bucket}.tok", buckets / f"{bucket}.place"
    places = np.fromfile(place_path, dtype=_PLACE)
    data = memoryview(token_path.read_bytes())
    stops = np.cumsum(places["tokens"].astype(np.int64)) * dtype.itemsize
    starts = stops - places["tokens"].astype(np.int64) * dtype.itemsize
    order = np.argsort(places["number"])
    joined = b"".join(
        data[start:stop] for start, stop in zip(starts[order].tolist(), stops[order].tolist(), strict=True)
    )
    token_path.unlink()
    place_path.unlink()
    return io.BytesIO(joined), np.cumsum(places["tokens"][order]).astype(END_DTYPE)
