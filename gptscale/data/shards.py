"""The format of prepared text: a folder a split, holding shards and, written last, the manifest that makes them count.

    <prepared>/tokenizer.model              or tokenizer.json
    <prepared>/train/shard-00000.tok.npy    token ids, 1-D uint16 (uint32 where the vocabulary needs it)
    <prepared>/train/shard-00000.end.npy    document ends, 1-D uint64, exclusive; the last equals the number of tokens
    <prepared>/train/manifest.json
    <prepared>/heldout/…                    the same

A shard ends with a document; only a document longer than a whole shard is cut. Plain `numpy.load` reads both files.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt
import xxhash

from gptscale.flow import Shard
from gptscale.runtime.files import write_bytes_atomically

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
Split = Literal["train", "heldout"]
SPLITS: tuple[Split, Split] = ("train", "heldout")

_HEADER_BYTES = 128
_COPY_BYTES = 1 << 20
END_DTYPE = np.dtype("<u8")


@dataclass(frozen=True)
class Removed:
    """Documents that a filter left out, e.g. for being `too_short` or an `exact_duplicate`."""

    reason: str
    documents: int
    text_bytes: int


@dataclass(frozen=True)
class PartRecord:
    """What one part of the sources gave to a split, and where it came from."""

    name: str
    source: str
    licence: str
    version: str
    documents: int
    tokens: int
    text_bytes: int
    source_name: str = ""
    """Of the entry of `data.sources` that it is of. Parts of one source follow each other. Empty in older manifests."""
    removed: tuple[Removed, ...] = ()

    @classmethod
    def parse(cls, fields: dict[str, Any]) -> PartRecord:
        """From JSON. Raises KeyError or TypeError where it is none."""
        return cls(**fields | {"removed": tuple(Removed(**one) for one in fields.get("removed", ()))})


@dataclass(frozen=True)
class Manifest:
    """What a split holds. `text_bytes` counts UTF-8 bytes of text, without the tokens that end documents."""

    split: Split
    tokenizer_sha256: str
    vocab_size: int
    end_of_text: int
    dtype: str
    tokens: int
    documents: int
    text_bytes: int
    shards: tuple[Shard, ...]
    parts: tuple[PartRecord, ...]
    format_version: int = FORMAT_VERSION
    shuffled: bool = False
    """Documents are in random order, not one part's after the other's."""

    @property
    def identity(self) -> str:
        """sha256 of the canonical JSON of all that decides the samples. Not of whence the text came, so that the same
        text prepared from another folder is the same corpus."""
        content = {key: value for key, value in vars(self).items() if key not in ("parts", "shuffled")}
        content["shards"] = [vars(shard) for shard in self.shards]
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def write(self, folder: Path) -> None:
        text = json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"
        write_bytes_atomically(folder / MANIFEST, text.encode())

    @classmethod
    def parse(cls, fields: dict[str, Any]) -> Manifest:
        """From JSON. Raises KeyError or TypeError where it is none."""
        shards = tuple(Shard(**shard) for shard in fields["shards"])
        parts = tuple(PartRecord.parse(part) for part in fields["parts"])
        return cls(**fields | {"shards": shards, "parts": parts})


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest type that holds every id of the vocabulary."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def token_file(shard: Shard) -> str:
    return f"{shard.name}.tok.npy"


def end_file(shard: Shard) -> str:
    return f"{shard.name}.end.npy"


def file_xxh3_128(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        while block := file.read(_COPY_BYTES):
            digest.update(block)
    return digest.hexdigest()


@lru_cache(maxsize=1024)
def npy_header(dtype: np.dtype[Any], count: int) -> bytes:
    """What the .npy file of `count` numbers begins with."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": dtype.str, "fortran_order": False, "shape": (count,)})
    assert header.tell() == _HEADER_BYTES
    return header.getvalue()


class ShardWriter:
    """Writes documents one after the other into shards of at most `shard_tokens` tokens.

    A context: leaving it closes the files whatever happened, so that a full disk gets its space back at once.
    """

    def __init__(self, folder: Path, dtype: np.dtype[Any], shard_tokens: int) -> None:
        self.shards: list[Shard] = []
        self._folder = folder
        self._dtype = dtype
        self._shard_tokens = shard_tokens
        self._tokens: _NpyFile | None = None
        self._ends: _NpyFile | None = None

    def append(self, tokens: BinaryIO, ends: npt.NDArray[np.uint64]) -> None:
        """Read documents from the raw token file `tokens`, at its current place; `ends` are theirs, from that place."""
        document, done = 0, 0
        while document < len(ends):
            token_out, end_out = self._open()
            room = self._shard_tokens - token_out.count
            fitting = int(np.searchsorted(ends, done + room, side="right"))
            if fitting > document:
                stop = int(ends[fitting - 1])
                end_out.write(ends[document:fitting] - np.uint64(done) + np.uint64(token_out.count))
                token_out.copy(tokens, stop - done)
                document, done = fitting, stop
            elif token_out.count:
                self._close()
            else:  # longer than a whole shard
                end_out.write(np.array([room], dtype=END_DTYPE))
                token_out.copy(tokens, room)
                done += room
                self._close()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        for file in (self._tokens, self._ends):
            if file is not None:
                file.abandon()

    def finish(self) -> tuple[Shard, ...]:
        """Close the last shard and return the records of all; everything written has reached the disk."""
        self._close()
        return tuple(self.shards)

    def _open(self) -> tuple[_NpyFile, _NpyFile]:
        if self._tokens is None or self._ends is None:
            name = f"shard-{len(self.shards):05d}"
            self._tokens = _NpyFile(self._folder / f"{name}.tok.npy", self._dtype)
            self._ends = _NpyFile(self._folder / f"{name}.end.npy", END_DTYPE)
        return self._tokens, self._ends

    def _close(self) -> None:
        if self._tokens is None or self._ends is None:
            return
        tokens, ends = self._tokens, self._ends
        self._tokens = self._ends = None
        for file in (tokens, ends):
            file.close()
        self.shards.append(
            Shard(
                name=f"shard-{len(self.shards):05d}",
                tokens=tokens.count,
                documents=ends.count,
                token_bytes=tokens.path.stat().st_size,
                end_bytes=ends.path.stat().st_size,
                token_xxh3_128=file_xxh3_128(tokens.path),
                end_xxh3_128=file_xxh3_128(ends.path),
            )
        )


class _NpyFile:
    """A 1-D .npy file that grows: the header, of fixed size, is written when the length is known."""

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self.path = path
        self.count = 0
        self._dtype = dtype
        self._file = path.open("wb")
        self._file.write(b"\0" * _HEADER_BYTES)

    def write(self, values: npt.NDArray[Any]) -> None:
        self._file.write(np.ascontiguousarray(values, dtype=self._dtype).data)
        self.count += len(values)

    def copy(self, source: BinaryIO, count: int) -> None:
        """Append `count` raw values read from `source`."""
        left = count * self._dtype.itemsize
        while left:
            block = source.read(min(left, _COPY_BYTES))
            assert block, f"{source.name} is shorter than its document ends say"
            self._file.write(block)
            left -= len(block)
        self.count += count

    def abandon(self) -> None:
        """Close the file as it is: without a header nobody takes it for a shard."""
        with contextlib.suppress(OSError):  # what is still buffered need not fit the disk
            self._file.close()

    def close(self) -> None:
        with self._file:
            self._file.seek(0)
            self._file.write(npy_header(self._dtype, self.count))
            self._file.flush()
            os.fsync(self._file.fileno())
