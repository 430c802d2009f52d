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
from sys import intern
from typing import Any, Literal

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
_SHARED = ("source", "licence", "version", "source_name")
"""Of a part's record: what many have in common."""


@dataclass(frozen=True)
class Removed:
    """Documents that a filter left out, e.g. for being `too_short` or an `exact_duplicate`."""

    reason: str
    documents: int
    text_bytes: int


@dataclass(frozen=True, slots=True)
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
        # There may be thousands, which say the same of their source: it is kept once.
        values: dict[str, Any] = fields | {key: intern(fields[key]) for key in _SHARED if key in fields}
        values["removed"] = tuple(Removed(**one) for one in fields["removed"]) if fields.get("removed") else ()
        return cls(**values)


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


class NpyWriter:
    """Writes a 1-D .npy file of a known length, and hashes it on the way.

    A context: leaving it closes the file whatever happened.
    """

    def __init__(self, path: Path, dtype: np.dtype[Any], count: int) -> None:
        self.dtype = dtype
        self._left = count * dtype.itemsize
        self._digest = xxhash.xxh3_128()
        self._file = path.open("wb", buffering=_COPY_BYTES)
        self._put(npy_header(dtype, count))

    def write(self, values: npt.NDArray[Any]) -> None:
        if values.size:
            self.write_bytes(np.ascontiguousarray(values, dtype=self.dtype).data.cast("B"))

    def write_bytes(self, data: bytes | memoryview) -> None:
        """Raw numbers."""
        self._left -= len(data)
        self._put(data)

    def finish(self) -> str:
        """Its xxh3-128; everything has reached the disk."""
        assert not self._left, f"{self._file.name}: {self._left} bytes are missing"
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._digest.hexdigest()

    def __enter__(self) -> NpyWriter:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # what is still buffered need not fit the disk
            self._file.close()

    def _put(self, data: bytes | memoryview) -> None:
        self._digest.update(data)
        # Up to a whole block first: written so, the page cache holds the file in larger pieces, and rows come faster.
        room, view = _COPY_BYTES - self._file.tell() % _COPY_BYTES, memoryview(data)
        self._file.write(view[:room])
        self._file.write(view[room:])
