"""Find documents that others repeat, however many there are: on disk, with a bounded part of them in memory.

Each document has a number, and of those that share a key all but the smallest number are repetitions. Keys are dealt
out to buckets by their remainder, so that equal ones meet in the same bucket, and a bucket is small enough to be sorted
in memory.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

KEPT, EXACT, NEAR = 0, 1, 2
"""What `Marks` says of a document."""
_ENTRY = np.dtype([("key", "<u8"), ("more", "<u8"), ("document", "<u8")])
_BUCKET_ENTRIES = 2_000_000
"""48 MB of entries, about three times that while they are sorted."""

Keys = npt.NDArray[np.uint64]
Marks = npt.NDArray[np.uint8]


def new_marks(documents: int, path: Path) -> np.memmap[Any, np.dtype[np.uint8]]:
    """A mark for each document, all KEPT: in a file, as there may be more than memory holds."""
    return np.memmap(path, np.uint8, "w+", shape=(max(documents, 1),))


def open_marks(path: Path) -> Marks:
    """Those that are there, for reading."""
    marks: Marks = np.memmap(path, np.uint8, "r")
    return marks


def mark_repetitions(blocks: Iterable[Keys], marks: Marks, mark: int, folder: Path) -> None:
    """Mark every document whose key an earlier one has; those that are marked already stay as they are.

    `blocks` are the keys of all documents in the order of their numbers, each [documents, words] of one or two words,
    which are taken for random bits.
    """
    buckets = folder / "buckets"
    shutil.rmtree(buckets, ignore_errors=True)
    buckets.mkdir()
    count = -(-len(marks) // _BUCKET_ENTRIES)
    number = 0
    for block in blocks:
        entries = np.zeros(len(block), dtype=_ENTRY)
        entries["key"] = block[:, 0]
        entries["more"] = block[:, -1]
        entries["document"] = np.arange(number, number + len(block))
        number += len(block)
        _distribute(entries, buckets, count)
    assert number <= len(marks)
    for bucket in range(count):
        path = buckets / str(bucket)
        if path.exists():
            repeated = _repetitions(np.fromfile(path, dtype=_ENTRY))
            marks[repeated[marks[repeated] == KEPT]] = mark
            path.unlink()
    buckets.rmdir()


def _distribute(entries: npt.NDArray[np.void], buckets: Path, count: int) -> None:
    bucket = entries["key"] % np.uint64(count)
    order = np.argsort(bucket, kind="stable")
    starts = np.searchsorted(bucket[order], np.arange(count + 1))
    for number in np.flatnonzero(np.diff(starts)).tolist():
        with (buckets / str(number)).open("ab") as file:
            file.write(entries[order[starts[number] : starts[number + 1]]].tobytes())


def _repetitions(entries: npt.NDArray[np.void]) -> npt.NDArray[np.int64]:
    """Numbers of the documents whose key a smaller number has."""
    order = np.lexsort((entries["document"], entries["more"], entries["key"]))
    ordered = entries[order]
    same = (ordered["key"][1:] == ordered["key"][:-1]) & (ordered["more"][1:] == ordered["more"][:-1])
    repeated: npt.NDArray[np.int64] = ordered["document"][1:][same].astype(np.int64)
    return repeated
