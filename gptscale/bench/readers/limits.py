"""What this machine does at best with the bytes of tokens: no reader can be faster than the slowest of these."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import numpy as np

from gptscale.bench.readers.common import Work

_SECONDS = 0.5
READS, WIDENS, COPIES = "page-cache reads", "widening ids", "memcpy"


def measure(work: Work) -> dict[str, float]:
    """Tokens a second of each."""
    descriptor = os.open(work.ids, os.O_RDONLY)
    size = os.fstat(descriptor).st_size
    row = np.empty(work.row, np.uint16)
    buffer = row.data
    # All rows of the file, in a new order: a few of them would stay in the processor's own cache.
    places = (np.random.default_rng(0).permutation(size // row.nbytes) * row.nbytes).tolist()
    narrow = np.zeros((work.batch, work.row), np.uint16)
    wide = np.empty((work.batch, work.row), np.int64)
    copied = np.empty_like(narrow)

    def reads() -> int:
        for place in places:
            os.preadv(descriptor, [buffer], place)
        return len(places) * work.sequence_length

    def widens() -> int:
        for _ in range(256):
            np.copyto(wide, narrow)
        return 256 * work.batch * work.sequence_length

    def copies() -> int:
        for _ in range(256):
            np.copyto(copied, narrow)
        return 256 * work.batch * work.sequence_length

    try:
        return {name: _rate(step) for name, step in ((READS, reads), (WIDENS, widens), (COPIES, copies))}
    finally:
        os.close(descriptor)


def _rate(step: Callable[[], int]) -> float:
    step()
    tokens, began_s = 0, time.perf_counter()
    while (took_s := time.perf_counter() - began_s) < _SECONDS:
        tokens += step()
    return tokens / took_s
