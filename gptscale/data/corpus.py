"""Open prepared text, and refuse what is unfinished, damaged or somebody else's before a single step is taken."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gptscale.data.shards import (
    END_DTYPE,
    FORMAT_VERSION,
    MANIFEST,
    Manifest,
    Split,
    end_file,
    file_xxh3_128,
    npy_header,
    token_dtype,
    token_file,
)
from gptscale.flow import Shard
from gptscale.runtime.errors import UserError
from gptscale.tokenizer import Tokenizer, find_tokenizer
from gptscale.tokenizer.tokenizer import FILES

AGAIN = "prepare the text again (`gptscale prepare`) into a new folder, or copy the file again"
_CHECK_TOKENS = 1 << 22


@dataclass(frozen=True)
class Corpus:
    """One split of a prepared folder, checked. Build one with `open_split`."""

    folder: Path
    """The prepared folder; shards lie in `folder / split`."""
    split: Split
    manifest: Manifest

    @property
    def tokenizer_path(self) -> Path:
        return find_tokenizer(self.folder) or self.folder / FILES[0]

    def token_path(self, shard: Shard) -> Path:
        return self.folder / self.split / token_file(shard)

    def end_path(self, shard: Shard) -> Path:
        return self.folder / self.split / end_file(shard)

    @contextmanager
    def tokens(self, shard: Shard) -> Iterator[npt.NDArray[Any]]:
        """All token ids of a shard, for as long as the block lasts; they are mapped, not read."""
        yield np.load(self.token_path(shard), mmap_mode="r", allow_pickle=False)

    def open_ends(self, shard: Shard) -> io.RawIOBase:
        """The file of a shard's document ends, at the first of them."""
        file = self.end_path(shard).open("rb", buffering=0)
        file.seek(shard.end_bytes - shard.documents * END_DTYPE.itemsize)
        return file

    def ends(self, shard: Shard) -> npt.NDArray[np.uint64]:
        """The document ends of a shard; they are mapped, not read."""
        ends: npt.NDArray[np.uint64] = np.load(self.end_path(shard), mmap_mode="r", allow_pickle=False)
        return ends

    def some_tokens(self, shard: Shard, start: int, stop: int) -> npt.NDArray[Any]:
        """Token ids `start` to `stop` (exclusive) of a shard."""
        return np.array(np.load(self.token_path(shard), mmap_mode="r", allow_pickle=False)[start:stop])


def open_split(folder: Path, split: Split, verify: bool = False) -> Corpus:
    """Open `train` or `heldout` of a prepared folder.

    Always checks that each file is there with the size, type and length that the manifest records, and that the
    tokenizer is the one that made the ids. With `verify` reads every file: hashes, ids within the vocabulary, document
    ends in order. Raises UserError naming the first file that is wrong.
    """
    corpus = Corpus(folder, split, read_manifest(folder, split))
    if Tokenizer.sha256_of(corpus.tokenizer_path) != corpus.manifest.tokenizer_sha256:
        raise UserError(
            f"{corpus.tokenizer_path}: not the tokenizer that {folder / split} was made with (sha256 differs)\n{AGAIN}"
        )
    _check_listed(corpus)
    # There may be thousands: their names are put together as text, which is quicker than paths.
    within, dtype = f"{folder / split}{os.sep}", np.dtype(corpus.manifest.dtype)
    for shard in corpus.manifest.shards:
        check_file(within + token_file(shard), shard.token_bytes, dtype, shard.tokens)
        check_file(within + end_file(shard), shard.end_bytes, END_DTYPE, shard.documents)
    if verify:
        for shard in corpus.manifest.shards:
            _verify(corpus, shard)
    return corpus


def read_manifest(folder: Path, split: Split) -> Manifest:
    """The manifest of a split, checked for its version and sense. Raises UserError."""
    path = folder / split / MANIFEST
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        what = "no such folder" if not folder.exists() else f"{path} is missing: not prepared text, or not finished"
        raise UserError(f"{folder}: {what}\nprepare the text with `gptscale prepare`, or correct data.path") from error
    return parse_manifest(data, str(path), split)


def parse_manifest(data: bytes, named: str, split: Split) -> Manifest:
    """What a manifest's file holds, checked for its version and sense. Raises UserError calling it `named`."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{named}: damaged (no UTF-8)\n{AGAIN}") from error
    try:
        fields = json.loads(text)
        version = fields["format_version"]
        if version != FORMAT_VERSION:
            raise UserError(
                f"{named}: format version {version}, and this gptscale reads version {FORMAT_VERSION}\n"
                "prepare the text again, or use the version of gptscale that wrote it"
            )
        manifest = Manifest.parse(fields)
    except UserError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{named}: damaged ({type(error).__name__}: {error})\n{AGAIN}") from error
    shards = manifest.shards
    if (
        manifest.split != split
        or manifest.dtype != token_dtype(manifest.vocab_size).str
        or manifest.tokens != sum(shard.tokens for shard in shards)
        or not shards
    ):
        raise UserError(f"{named}: contradicts itself or lies in the wrong folder\n{AGAIN}")
    return manifest


def _check_listed(corpus: Corpus) -> None:
    """A shard that the manifest does not list came from elsewhere; somebody believes that it counts."""
    listed = {name for shard in corpus.manifest.shards for name in (token_file(shard), end_file(shard))}
    folder = corpus.folder / corpus.split
    for name in sorted(set(os.listdir(folder)) - listed):
        if name.endswith(".npy"):
            raise UserError(f"{folder / name}: a shard that {folder / MANIFEST} does not list\nremove it; {AGAIN}")


def check_file(path: str | Path, size: int, dtype: np.dtype[np.generic], count: int) -> None:
    """That a shard's file has the size, type and length that the manifest records. Raises UserError."""
    expected = npy_header(dtype, count)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise UserError(f"{path}: missing\n{AGAIN}") from error
    try:
        found, begins = os.fstat(descriptor).st_size, os.pread(descriptor, len(expected), 0)
    finally:
        os.close(descriptor)
    if found != size:
        raise UserError(f"{path}: {found} bytes where the manifest says {size}\n{AGAIN}")
    if begins == expected:  # as we write it; a corpus may have thousands of shards
        return
    try:
        header = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise UserError(f"{path}: not a .npy file ({error})\n{AGAIN}") from error
    if header.dtype != dtype or header.shape != (count,):
        raise UserError(f"{path}: {header.dtype} {header.shape} where the manifest says {dtype} ({count},)\n{AGAIN}")


def _verify(corpus: Corpus, shard: Shard) -> None:
    token_path, end_path = corpus.token_path(shard), corpus.end_path(shard)
    for path, digest in ((token_path, shard.token_xxh3_128), (end_path, shard.end_xxh3_128)):
        if file_xxh3_128(path) != digest:
            raise UserError(f"{path}: damaged: its content is not what the manifest recorded (xxh3-128)\n{AGAIN}")
    check_ids(np.load(token_path, mmap_mode="r", allow_pickle=False), corpus.manifest.vocab_size, token_path)
    check_ends(corpus.ends(shard), shard, end_path)


def check_ids(ids: npt.NDArray[Any], vocab_size: int, named: str | Path) -> None:
    """Raises UserError for ids that are outside the vocabulary."""
    for start in range(0, len(ids), _CHECK_TOKENS):
        largest = int(ids[start : start + _CHECK_TOKENS].max())
        if largest >= vocab_size:
            raise UserError(f"{named}: token id {largest} outside the vocabulary of {vocab_size}\n{AGAIN}")


def check_ends(ends: npt.NDArray[np.uint64], shard: Shard, named: str | Path) -> None:
    """Raises UserError where they are not in order up to the shard's last token."""
    if int(ends[-1]) != shard.tokens or int(ends[0]) == 0 or bool((ends[1:] <= ends[:-1]).any()):
        raise UserError(f"{named}: document ends are not in order up to {shard.tokens}\n{AGAIN}")
