"""Megatron's indexed datasets, `NAME.bin` and `NAME.idx`: read by ranges of documents, and written from shards.

The .idx file, little-endian: the magic "MMIDIDX\\0\\0", version 1 as uint64, a code for the type of ids, the number of
sequences and that of document indices as uint64; then for each sequence its tokens (int32) and where in the .bin file
it begins (int64, bytes); then for each document, and their end, its first sequence (int64).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from gptscale.data.corpus import Corpus
from gptscale.data.store import input_bytes, open_input
from gptscale.runtime.errors import UserError
from gptscale.runtime.files import fsync_folder

_MAGIC = b"MMIDIDX\0\0"
_HEADER = np.dtype([("magic", "S9"), ("version", "<u8"), ("dtype", "u1"), ("sequences", "<u8"), ("documents", "<u8")])
_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
"""Codes of integer types; 6 and 7 are floating-point ones, which no tokens are."""
_AT_ONCE = 1 << 16
"""Documents whose places are read together."""
_COPY_BYTES = 1 << 22


@dataclass(frozen=True)
class MegatronIndex:
    """What the head of an .idx file says, and where the other file is. Build it with `open_index`."""

    idx: str
    bin: str
    dtype: np.dtype[Any]
    sequences: int
    documents: int

    def read(self, start: int, stop: int) -> Iterator[npt.NDArray[Any]]:
        """Token ids of the documents `start`…`stop`, one after the other, as they are stored. Raises UserError."""
        with open_input(self.idx) as idx, open_input(self.bin) as tokens:
            for first in range(start, stop, _AT_ONCE):
                yield from self._read(idx, tokens, first, min(first + _AT_ONCE, stop))

    def _read(self, idx: BinaryIO, tokens: BinaryIO, start: int, stop: int) -> Iterator[npt.NDArray[Any]]:
        sizes_at = _HEADER.itemsize
        places_at = sizes_at + 4 * self.sequences
        documents_at = places_at + 8 * self.sequences
        first = _section(idx, documents_at + 8 * start, stop - start + 1, "<i8")
        begin, end = int(first[0]), int(first[-1])
        if not (0 <= begin <= end <= self.sequences and (np.diff(first) >= 0).all()):
            raise _damaged(self.idx, f"documents {start}…{stop} are no ranges of its {self.sequences} sequences")
        sizes = _section(idx, sizes_at + 4 * begin, end - begin, "<i4").astype(np.int64)
        places = _section(idx, places_at + 8 * begin, end - begin, "<i8")
        for number, (a, b) in enumerate(zip(first[:-1] - begin, first[1:] - begin, strict=True)):
            parts = []
            for place, size in zip(places[a:b].tolist(), sizes[a:b].tolist(), strict=True):
                tokens.seek(place)
                data = tokens.read(size * self.dtype.itemsize) if size >= 0 and place >= 0 else b"?"
                if len(data) != size * self.dtype.itemsize:
                    raise _damaged(self.bin, f"document {start + number} is not where {self.idx} says")
                parts.append(np.frombuffer(data, self.dtype))
            yield np.concatenate(parts) if parts else np.empty(0, self.dtype)


def open_index(path: str) -> MegatronIndex:
    """Open a dataset by its .idx file. Raises UserError for what is none, is damaged, or holds no tokens."""
    with open_input(path) as file:
        data = file.read(_HEADER.itemsize)
    if data[: len(_MAGIC)] != _MAGIC or len(data) < _HEADER.itemsize:
        raise UserError(f"{path}: not an index of Megatron's (no MMIDIDX)\nname the .idx file of an indexed dataset")
    head = np.frombuffer(data, _HEADER)[0]
    if head["version"] != 1:
        raise UserError(f"{path}: version {head['version']} of Megatron's index\nwrite it as version 1")
    if int(head["dtype"]) not in _DTYPES:
        raise UserError(f"{path}: its entries are no integers (type code {head['dtype']})\nname one of token ids")
    sequences, documents = int(head["sequences"]), int(head["documents"])
    expected = _HEADER.itemsize + 12 * sequences + 8 * documents
    found = input_bytes(path)
    if found == expected + sequences:
        raise UserError(f"{path}: a multimodal dataset (sequences have modes)\nname one of text alone")
    if found != expected or documents == 0:
        raise _damaged(path, f"{found} bytes, and {sequences} sequences and {documents} documents take {expected}")
    dtype = np.dtype(_DTYPES[int(head["dtype"])])
    return MegatronIndex(path, path.removesuffix(".idx") + ".bin", dtype, sequences, documents - 1)


def write_megatron(corpus: Corpus, prefix: Path) -> None:
    """Write a split as `prefix`.bin and `prefix`.idx, each document with the end_of_text that closes it.

    A document that is longer than a shard becomes one document of several sequences. The .bin is complete before the
    .idx appears. Memory does not grow with the corpus. Raises UserError where one of the files is there already.
    """
    dtype = np.dtype(corpus.manifest.dtype)
    code = 8 if dtype.itemsize == 2 else 4
    bin_path, idx_path = prefix.with_name(f"{prefix.name}.bin"), prefix.with_name(f"{prefix.name}.idx")
    for path in (bin_path, idx_path):
        if path.exists():
            raise UserError(f"{path}: exists already\nchoose another target, or remove it first")
    unfinished = [path.with_name(f".{path.name}.partial") for path in (bin_path, idx_path)]
    try:
        with unfinished[0].open("wb") as file:
            for shard in corpus.manifest.shards:
                with corpus.token_path(shard).open("rb") as tokens:
                    tokens.seek(shard.token_bytes - shard.tokens * dtype.itemsize)
                    shutil.copyfileobj(tokens, file, _COPY_BYTES)
            _to_disk(file)
        with unfinished[1].open("wb") as file:
            _write_index(corpus, dtype, code, file)
            _to_disk(file)
        for path, name in zip(unfinished, (bin_path, idx_path), strict=True):
            path.rename(name)
        fsync_folder(prefix.parent)
    finally:
        for path in unfinished:
            path.unlink(missing_ok=True)


def _write_index(corpus: Corpus, dtype: np.dtype[Any], code: int, file: BinaryIO) -> None:
    shards = corpus.manifest.shards
    sequences = sum(shard.documents for shard in shards)
    begins = [_begins(corpus, number) for number in range(len(shards))]
    documents = sequences - begins.count(False)
    head = np.array([(_MAGIC, 1, code, sequences, documents + 1)], dtype=_HEADER)
    file.write(head.tobytes())
    for sizes in _sizes(corpus):
        file.write(sizes.astype("<i4").tobytes())
    place = 0
    for sizes in _sizes(corpus):
        ends = np.cumsum(sizes)
        file.write(((place + ends - sizes) * dtype.itemsize).astype("<i8").tobytes())
        place += int(ends[-1])
    sequence = 0
    for shard, new in zip(shards, begins, strict=True):
        for first in range(0, shard.documents, _AT_ONCE):
            stop = min(first + _AT_ONCE, shard.documents)
            skipped = 1 if first == 0 and not new else 0
            file.write(np.arange(sequence + first + skipped, sequence + stop, dtype="<i8").tobytes())
        sequence += shard.documents
    file.write(np.array([sequences], dtype="<i8").tobytes())


def _begins(corpus: Corpus, number: int) -> bool:
    """Whether a shard begins with a document, and not in one: the last token before it tells."""
    if number == 0:
        return True
    before = corpus.manifest.shards[number - 1]
    dtype = np.dtype(corpus.manifest.dtype)
    last = np.fromfile(corpus.token_path(before), dtype, 1, offset=before.token_bytes - dtype.itemsize)
    return int(last[0]) == corpus.manifest.end_of_text


def _sizes(corpus: Corpus) -> Iterator[npt.NDArray[np.int64]]:
    """Tokens of each document, or part of one, in order, so many at a time."""
    for shard in corpus.manifest.shards:
        with corpus.end_path(shard).open("rb") as file:
            file.seek(shard.end_bytes - 8 * shard.documents)
            before = 0
            while data := file.read(8 * _AT_ONCE):
                ends = np.frombuffer(data, "<u8").astype(np.int64)
                yield np.diff(ends, prepend=before)
                before = int(ends[-1])


def _section(file: BinaryIO, offset: int, count: int, dtype: str) -> npt.NDArray[Any]:
    file.seek(offset)
    return np.frombuffer(file.read(count * np.dtype(dtype).itemsize), dtype)


def _to_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _damaged(path: str, what: str) -> UserError:
    return UserError(f"{path}: damaged: {what}\ncopy the .bin and .idx files again")
