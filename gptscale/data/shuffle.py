"""Documents in a random order, however many there are: they are dealt out to buckets on disk that fit into memory.

The order is the permutation of `gptscale.data.order` over all documents: document i becomes number permute(i). A bucket
is a range of those numbers, so that buckets one after the other, each sorted, are the whole in its new order.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from gptscale.data.order import permute, round_keys
from gptscale.data.shard_plan import Tokenised
from gptscale.data.shards import END_DTYPE
from gptscale.data.worker_process import check_stop
from gptscale.data.workers import WorkerPool
from gptscale.runtime.files import write_bytes_atomically

_BUCKET_BYTES = 1 << 26
_SEED, _DOCUMENTS = 0, 1 << 31
"""Of the permutation, which has nothing to do with a run's: its key is no corpus's."""
_TOKENS, _PLACES, _SORTED, _ENDS = ".dealt", ".place", ".tok", ".end"
"""Of a bucket's files: its documents as they were dealt, and these in order."""
_RECORD = "shuffled.json"
_PLACE = np.dtype([("number", "<u8"), ("tokens", "<u8")])

Block = tuple[npt.NDArray[Any], npt.NDArray[np.int64]]
"""Tokens of whole documents, one after the other, and where each ends in them."""


def find_shuffled(folder: Path) -> list[Tokenised] | None:
    """What an earlier process left there; None where it did not come to its end, or somebody removed some of it."""
    try:
        records = json.loads((folder / _RECORD).read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    found = [_tokenised(folder / name, *digests) for name, *digests in records]
    return found if all(one.tokens.exists() and one.ends.exists() for one in found) else None


def shuffle_documents(
    blocks: Iterable[Block], documents: int, tokens: int, dtype: np.dtype[Any], folder: Path, pool: WorkerPool
) -> list[Tokenised]:
    """All documents of `blocks`, `documents` of them with `tokens` tokens, in random order in files below `folder`."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    count = max(1, -(-tokens * dtype.itemsize // _BUCKET_BYTES))
    each = -(-documents // count)
    keys = round_keys(_SEED, _DOCUMENTS, 0)[:, None]
    first = 0
    for values, ends in blocks:
        numbers = permute(np.arange(first, first + len(ends)), documents, keys)
        first += len(ends)
        _deal(values, ends, numbers, each, folder)
    assert first == documents
    dealt = {number: folder / str(number) for number in range(count)}
    jobs = {number: _Bucket(path, dtype.str) for number, path in dealt.items() if path.with_suffix(_PLACES).exists()}
    digests = dict(pool.run(_sort, jobs, lambda job: job.path.with_suffix(_TOKENS).stat().st_size))
    records = [(str(number), *digests[number]) for number in jobs]
    write_bytes_atomically(folder / _RECORD, json.dumps(records).encode())
    return [_tokenised(folder / name, *of_files) for name, *of_files in records]


def _tokenised(path: Path, token_xxh3_128: str, end_xxh3_128: str) -> Tokenised:
    return Tokenised(path.with_suffix(_SORTED), path.with_suffix(_ENDS), token_xxh3_128, end_xxh3_128)


def _deal(
    values: npt.NDArray[Any], ends: npt.NDArray[np.int64], numbers: npt.NDArray[np.int64], each: int, buckets: Path
) -> None:
    starts = np.concatenate([[0], ends[:-1]])
    sizes = ends - starts
    bucket = numbers // each
    for one in np.unique(bucket).tolist():
        chosen = np.flatnonzero(bucket == one)
        places = np.empty(len(chosen), dtype=_PLACE)
        places["number"] = numbers[chosen]
        places["tokens"] = sizes[chosen]
        path = buckets / str(one)
        with path.with_suffix(_TOKENS).open("ab") as tokens, path.with_suffix(_PLACES).open("ab") as file:
            for start, size in zip(starts[chosen].tolist(), sizes[chosen].tolist(), strict=True):
                tokens.write(values[start : start + size].data)
            file.write(places.tobytes())


@dataclass(frozen=True)
class _Bucket:
    path: Path
    """Of its files, but for what their names end in."""
    dtype: str


def _sort(bucket: _Bucket) -> tuple[str, str]:
    """Bring a bucket's documents into their order; the xxh3-128 of their tokens and of their ends."""
    check_stop()
    item = np.dtype(bucket.dtype).itemsize
    token_path, place_path = bucket.path.with_suffix(_TOKENS), bucket.path.with_suffix(_PLACES)
    places = np.fromfile(place_path, dtype=_PLACE)
    data = memoryview(token_path.read_bytes())
    stops = np.cumsum(places["tokens"].astype(np.int64)) * item
    starts = stops - places["tokens"].astype(np.int64) * item
    order = np.argsort(places["number"])
    joined = b"".join(
        data[start:stop] for start, stop in zip(starts[order].tolist(), stops[order].tolist(), strict=True)
    )
    ends = np.cumsum(places["tokens"][order]).astype(END_DTYPE).tobytes()
    token_path.unlink()  # before the other takes its room
    place_path.unlink()
    for suffix, content in ((_SORTED, joined), (_ENDS, ends)):
        with bucket.path.with_suffix(suffix).open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    return xxhash.xxh3_128_hexdigest(joined), xxhash.xxh3_128_hexdigest(ends)
