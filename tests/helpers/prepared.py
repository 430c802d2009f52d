"""Prepared folders of any size without text: the ends of documents are real, token ids are zeros that take no disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gptscale.data.corpus import Corpus
from gptscale.data.shards import END_DTYPE, SPLITS, Manifest, PartRecord, file_xxh3_128
from gptscale.flow import Shard
from gptscale.tokenizer import Tokenizer


def of_lengths(folder: Path, shards: Sequence[npt.NDArray[np.int64]], tokenizer: Path | None = None) -> Corpus:
    """A split of documents with these lengths, by shard. With a tokenizer's file, a whole folder: both splits alike.

    Checksums of large shards are left out, so `verify` is for small ones.
    """
    folder.mkdir(parents=True, exist_ok=True)
    loaded = None if tokenizer is None else Tokenizer.load(tokenizer)
    if tokenizer is not None:
        (folder / tokenizer.name).write_bytes(tokenizer.read_bytes())
    manifests = []
    for split in SPLITS:
        (folder / split).mkdir()
        records = tuple(_shard(folder / split, number, lengths) for number, lengths in enumerate(shards))
        tokens, documents = sum(int(lengths.sum()) for lengths in shards), sum(len(lengths) for lengths in shards)
        manifest = Manifest(
            split=split,
            tokenizer_sha256="" if loaded is None else loaded.sha256,
            vocab_size=384 if loaded is None else loaded.vocab_size,
            end_of_text=0 if loaded is None else loaded.end_of_text,
            dtype="<u2",
            tokens=tokens,
            documents=documents,
            text_bytes=4 * tokens,
            shards=records,
            parts=(PartRecord("zeros", "made up", "none", "", documents, tokens, 4 * tokens, "zeros"),),
        )
        manifest.write(folder / split)
        manifests.append(manifest)
    return Corpus(folder, "train", manifests[0])


def _shard(folder: Path, number: int, lengths: npt.NDArray[np.int64]) -> Shard:
    name, tokens = f"shard-{number:05d}", int(lengths.sum())
    np.save(folder / f"{name}.end.npy", np.cumsum(lengths).astype(END_DTYPE))
    token_path = folder / f"{name}.tok.npy"
    empty: npt.NDArray[Any] = np.lib.format.open_memmap(token_path, mode="w+", dtype="<u2", shape=(tokens,))  # sparse
    del empty
    small = tokens < 1_000_000
    return Shard(
        name=name,
        tokens=tokens,
        documents=len(lengths),
        token_bytes=token_path.stat().st_size,
        end_bytes=(folder / f"{name}.end.npy").stat().st_size,
        token_xxh3_128=file_xxh3_128(token_path) if small else "",
        end_xxh3_128=file_xxh3_128(folder / f"{name}.end.npy") if small else "",
    )
