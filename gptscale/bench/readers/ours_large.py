"""gptscale's own on a corpus of any size: the files have holes, so that they take no room, and read as zeros."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np

from gptscale.bench.readers.common import Work
from gptscale.bench.readers.ours import Reader as Reader
from gptscale.data.corpus import read_manifest
from gptscale.data.shards import END_DTYPE, end_file, npy_header, token_file
from gptscale.flow import Shard

SHARD_TOKENS = 1 << 30
"""2 GiB."""
_DOCUMENT_TOKENS = 1000
_PART_TOKENS = 250_000_000
"""Of a file of 1 GB of text: that is what the manifest has records of."""


def make(work: Work, small: str, tokens: int) -> int:
    """Such a corpus of `tokens` tokens in `work.folder`, with the tokenizer of the prepared folder `small`. Returns its
    shards."""
    folder, dtype = Path(work.folder), np.dtype("<u2")
    (folder / "train").mkdir(parents=True)
    shutil.copy(Path(small) / "tokenizer.model", folder)
    shards = []
    for number in range(-(-tokens // SHARD_TOKENS)):
        count = min(SHARD_TOKENS, tokens - number * SHARD_TOKENS)
        documents = count // _DOCUMENT_TOKENS
        token_header, end_header = npy_header(dtype, count), npy_header(END_DTYPE, documents)
        shard = Shard(
            name=f"shard-{number:05d}",
            tokens=count,
            documents=documents,
            token_bytes=len(token_header) + dtype.itemsize * count,
            end_bytes=len(end_header) + END_DTYPE.itemsize * documents,
            token_xxh3_128="0" * 32,
            end_xxh3_128="0" * 32,
        )
        for name, header, size in (
            (token_file(shard), token_header, shard.token_bytes),
            (end_file(shard), end_header, shard.end_bytes),
        ):
            with (folder / "train" / name).open("wb") as file:
                file.write(header)
                file.truncate(size)
        shards.append(shard)
    manifest = read_manifest(Path(small), "train")
    total = sum(shard.documents for shard in shards)
    parts = tuple(
        replace(
            manifest.parts[0],
            name=f"{number:05d}.jsonl",
            tokens=min(_PART_TOKENS, tokens - first),
            documents=min(_PART_TOKENS, tokens - first) // _DOCUMENT_TOKENS,
        )
        for number, first in enumerate(range(0, tokens, _PART_TOKENS))
    )
    replace(manifest, shards=tuple(shards), tokens=tokens, documents=total, parts=parts).write(folder / "train")
    return len(shards)
