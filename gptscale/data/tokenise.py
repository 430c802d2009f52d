"""What a worker process does: read one part, tokenise it, leave raw ids and document ends in a spill folder.

Imported in spawned processes: no torch here, nor in anything this imports.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import parent_process
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import BinaryIO

import numpy as np
import xxhash

from gptscale.data.shards import END_DTYPE, Split, token_dtype
from gptscale.data.sources import Document, Part, read_part
from gptscale.runtime.registry import load_plugins
from gptscale.tokenizer import Tokenizer

_BATCH_CHARACTERS = 1 << 20
HASH_RANGE = 1 << 64


class StopAskedError(Exception):
    """The process that started this worker is giving up."""


@dataclass(frozen=True)
class Counts:
    """What a part gave to a split."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0


@dataclass(frozen=True)
class Tokenised:
    """A part in the spill folder, and the range of its documents' hashes (0 and HASH_RANGE-1 turned round if none)."""

    train: Counts
    heldout: Counts
    smallest_hash: int
    largest_hash: int


def identity_hash(identity: str) -> int:
    """What decides whether a document is held out: it depends on nothing but the document's identity."""
    return xxhash.xxh3_64_intdigest(identity.encode("utf-8", "surrogateescape"))


def is_heldout(digest: int, heldout_fraction: float) -> bool:
    return digest < heldout_fraction * HASH_RANGE


def spill_paths(spill: Path, number: int, split: Split) -> tuple[Path, Path]:
    """Raw token ids and raw document ends of part `number`."""
    return spill / f"part-{number:06d}.{split}.tok", spill / f"part-{number:06d}.{split}.end"


@dataclass(frozen=True)
class Recipe:
    """What every part is tokenised with."""

    tokenizer_path: Path
    tokenizer_sha256: str
    heldout_fraction: float
    spill: Path


def tokenise_part(part: Part, number: int, recipe: Recipe) -> Tokenised:
    """Tokenise part `number` into the spill folder. Each document ends with end_of_text; empty ones are left out."""
    spill, heldout_fraction = recipe.spill, recipe.heldout_fraction
    tokenizer = _tokenizer(recipe.tokenizer_path, recipe.tokenizer_sha256)
    smallest, largest = HASH_RANGE - 1, 0
    with _Spill(spill, number, "train", tokenizer) as train, _Spill(spill, number, "heldout", tokenizer) as heldout:
        for batch in _batches(read_part(part)):
            if _stop is not None and _stop.is_set():
                raise StopAskedError
            hashes = [identity_hash(document.identity) for document in batch]
            smallest, largest = min(smallest, *hashes), max(largest, *hashes)
            for target, side in ((heldout, True), (train, False)):
                target.write(
                    [
                        document.text
                        for document, digest in zip(batch, hashes, strict=True)
                        if is_heldout(digest, heldout_fraction) is side
                    ]
                )
    return Tokenised(train.counts, heldout.counts, smallest, largest)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Enough documents at a time for the tokenizer's fast path, few enough to bound the memory."""
    batch: list[Document] = []
    characters = 0
    for document in documents:
        if not document.text:
            continue
        batch.append(document)
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class _Spill:
    """The raw files of one part and split."""

    def __init__(self, spill: Path, number: int, split: Split, tokenizer: Tokenizer) -> None:
        self.counts = Counts()
        self._tokenizer = tokenizer
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._paths = spill_paths(spill, number, split)
        self._files: list[BinaryIO] = []

    def __enter__(self) -> _Spill:
        self._files = [path.open("wb") for path in self._paths]
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            file.close()

    def write(self, texts: list[str]) -> None:
        if not texts:
            return
        encoded = self._tokenizer.encode_batch(texts)
        ends = self.counts.tokens + np.cumsum([len(ids) + 1 for ids in encoded])
        tokens = np.full(int(ends[-1]) - self.counts.tokens, self._tokenizer.end_of_text, dtype=self._dtype)
        start = 0
        for ids in encoded:
            tokens[start : start + len(ids)] = ids
            start += len(ids) + 1
        token_file, end_file = self._files
        token_file.write(tokens.data)
        end_file.write(ends.astype(END_DTYPE).data)
        self.counts = Counts(
            documents=self.counts.documents + len(texts),
            tokens=int(ends[-1]),
            text_bytes=self.counts.text_bytes + sum(len(text.encode()) for text in texts),
        )


@lru_cache(maxsize=1)
def _tokenizer(path: Path, sha256: str) -> Tokenizer:
    tokenizer = Tokenizer.load(path)
    assert tokenizer.sha256 == sha256, f"{path} changed while in use"
    return tokenizer


_stop: Event | None = None


def start_worker(stop: Event, plugins: tuple[str, ...]) -> None:
    """Initialise a worker process: it obeys `stop` between batches, and ends with its parent, however that died.

    `plugins` register the sources that this process may be asked to read.
    """
    global _stop
    _stop = stop
    os.environ["USE_TORCH"] = "0"  # or `datasets` imports torch, for tensors that nobody here wants
    parent = parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True, name="end with parent").start()
    load_plugins(plugins)
