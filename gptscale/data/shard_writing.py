"""Write one shard as it was planned, and a record of it once it has reached the disk.

A shard whose record is there is not written again, whatever stopped the process that wrote it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np

from gptscale.data.duplicates import open_marks
from gptscale.data.shard_plan import ShardPlan, Tokenised, read_documents, runs
from gptscale.data.shards import END_DTYPE, NpyWriter, end_file, token_file
from gptscale.data.spill import check_intact
from gptscale.data.worker_process import check_stop
from gptscale.flow import Shard
from gptscale.runtime.files import write_bytes_atomically

_COPY_BYTES = 1 << 20


@dataclass(frozen=True)
class ShardJob:
    """A shard to be written."""

    name: str
    plan: ShardPlan
    sources: Mapping[int, Tokenised]
    """Those that the plan names."""
    marks: Path | None
    """Of documents that others repeat."""
    dtype: str
    """Of token ids."""
    folder: Path
    record: Path


def find_written(job: ShardJob) -> Shard | None:
    """The record of a shard that is written, with both files there and as long as they were."""
    try:
        shard = Shard(**json.loads(job.record.read_bytes()))
    except (FileNotFoundError, ValueError, TypeError):  # not there; or not written by us, or a damaged disk
        return None
    for name, size in ((token_file(shard), shard.token_bytes), (end_file(shard), shard.end_bytes)):
        path = job.folder / name
        if not path.is_file() or path.stat().st_size != size:
            return None
    return shard


def write_shard(job: ShardJob) -> Shard:
    """Write both files and the record. Raises UserError where what the shard is made of was damaged."""
    for source in job.sources.values():
        _check(source.tokens, source.token_xxh3_128)
        _check(source.ends, source.end_xxh3_128)
    token_path, end_path = job.folder / f"{job.name}.tok.npy", job.folder / f"{job.name}.end.npy"
    try:
        with ExitStack() as stack:
            tokens = stack.enter_context(NpyWriter(token_path, np.dtype(job.dtype), job.plan.tokens))
            ends = stack.enter_context(NpyWriter(end_path, END_DTYPE, job.plan.documents))
            _write(job, tokens, ends)
            token_xxh3_128, end_xxh3_128 = tokens.finish(), ends.finish()
    except BaseException:  # a full disk gets its space back at once
        token_path.unlink(missing_ok=True)
        end_path.unlink(missing_ok=True)
        raise
    shard = Shard(
        name=job.name,
        tokens=job.plan.tokens,
        documents=job.plan.documents,
        token_bytes=token_path.stat().st_size,
        end_bytes=end_path.stat().st_size,
        token_xxh3_128=token_xxh3_128,
        end_xxh3_128=end_xxh3_128,
    )
    write_bytes_atomically(job.record, json.dumps(asdict(shard)).encode())
    return shard


def _write(job: ShardJob, tokens: NpyWriter, ends: NpyWriter) -> None:
    marks = None if job.marks is None else open_marks(job.marks)
    written = 0
    for stretch in job.plan.stretches:
        source = job.sources[stretch.source]
        with source.tokens.open("rb") as file:
            for documents in read_documents(source, marks, stretch.first, stretch.stop):
                starts = np.maximum(documents.starts, stretch.begin)
                stops = np.minimum(documents.ends, stretch.end)
                ends.write(written + np.cumsum((stops - starts)[documents.stays]))
                for first, stop in runs(documents.stays):
                    count = int(stops[stop - 1] - starts[first])
                    _copy(file, int(starts[first]), count, tokens)
                    written += count


def _copy(source: BinaryIO, first: int, count: int, target: NpyWriter) -> None:
    """`count` raw numbers from number `first` of `source` on."""
    source.seek(first * target.dtype.itemsize)
    left = count * target.dtype.itemsize
    while left:
        check_stop()
        block = source.read(min(left, _COPY_BYTES))
        assert block, f"{source.name} is shorter than its document ends say"
        target.write_bytes(block)
        left -= len(block)


def _check(path: Path, digest: str) -> None:
    found = path.stat()
    _check_once(path, digest, found.st_ino, found.st_mtime_ns)


@lru_cache(maxsize=1 << 14)
def _check_once(path: Path, digest: str, inode: int, changed_ns: int) -> None:
    """A file may go into many shards."""
    check_intact(path, digest)
