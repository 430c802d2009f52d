"""A process that reads rows of a corpus in a store through a shared cache, and compares them with the local copy.

python -m tests.helpers.cache_worker ADDRESS LOCAL CACHE LIMIT SEED READS. Prints the most bytes seen in the cache.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np

from gptscale.data.cache import ShardCache
from gptscale.data.remote import open_corpus
from gptscale.data.remote_rows import row_reader
from gptscale.data.transfer import Patience

LENGTH = 32
QUICK = Patience(timeout_s=1, first_wait_s=0.02, longest_wait_s=0.2)
"""Enough for a server on the same host, so that a stall costs a test a second."""


def main(address: str, local: str, folder: str, limit: str, seed: str, reads: str) -> None:
    cache = ShardCache(Path(folder), int(limit) or None, patience=QUICK)
    remote = row_reader(open_corpus(address, "train", cache=cache), LENGTH)
    here = row_reader(open_corpus(local, "train"), LENGTH)
    draw = np.random.default_rng(int(seed))
    most = 0
    for _ in range(int(reads)):
        rows = draw.integers(0, here.count, size=draw.integers(1, 9))
        for found, expected in zip(remote.read(rows), here.read(rows), strict=True):
            assert np.array_equal(found, expected), f"rows {rows.tolist()} differ"
        most = max(most, bytes_in(Path(folder)))
    print(most)


def bytes_in(folder: Path) -> int:
    """Of shards, and of what is on its way."""
    total = 0
    for entry in os.scandir(folder):
        if entry.name.endswith((".npy", ".part")):
            try:
                total += entry.stat().st_size
            except FileNotFoundError:
                continue
    return total


if __name__ == "__main__":
    main(*sys.argv[1:])
