"""Tokenised parts between tokenising and merging: what is finished is kept, so that a rerun does only what is missing.

A part's files are named by a key, a hash of all that decides their content: its input (for files their size and time of
change), the tokenizer, the filters. Its record, which holds their sizes and checksums, is written last; without one a
part does not count, whatever killed its writer, and with another input or setting it is another part.

    <key>.json          the record
    <key>.train.tok     raw token ids, of the type that shards have
    <key>.train.end     document ends, uint64, exclusive
    <key>.train.doc     with filters for duplicates: what identifies each document (DOCUMENT_DTYPE)
    <key>.train.near    with a filter for near-duplicates: each document's band keys, uint64 [documents, bands]
    <key>.heldout.…     the same of what is held out
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal

import numpy as np
import xxhash

from gptscale.config.schema import FilterConfig
from gptscale.data.shards import SPLITS, Removed, Split, file_xxh3_128
from gptscale.data.sources import Part
from gptscale.data.store import address, fingerprint, is_remote
from gptscale.runtime.errors import UserError
from gptscale.runtime.files import write_bytes_atomically

SPILL_VERSION = 1
"""Of these files and of what is done to text on its way to them."""
DOCUMENT_DTYPE = np.dtype([("hash", "<u8", (2,)), ("text_bytes", "<u8")])
"""A document's text: its xxh3-128, and how long it is in UTF-8."""
Kind = Literal["tok", "end", "doc", "near"]


@dataclass(frozen=True)
class Counts:
    """What a part gave to a split."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    removed: tuple[Removed, ...] = ()


@dataclass(frozen=True)
class SpilledPart:
    """A part's record, and the range of its documents' hashes (HASH_RANGE-1 and 0 if it has none)."""

    counts: Mapping[Split, Counts]
    smallest_hash: int
    largest_hash: int
    files: Mapping[str, tuple[int, str]]
    """Name → bytes and xxh3-128."""

    @property
    def tokens(self) -> int:
        return sum(counts.tokens for counts in self.counts.values())


@dataclass(frozen=True)
class Recipe:
    """What every part is tokenised with, and the folder where it goes."""

    tokenizer_path: Path
    tokenizer_sha256: str
    heldout_fraction: float
    filters: FilterConfig
    folder: Path

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The files that a split of a part has."""
        if self.filters.near_duplicates is not None:
            return ("tok", "end", "doc", "near")
        return ("tok", "end", "doc") if self.filters.exact_duplicates else ("tok", "end")


def input_key(part: Part) -> dict[str, Any]:
    """All that decides what text a part holds, as far as it can be told without reading it. JSON."""
    source = {key: value for key, value in asdict(part.source).items() if key not in ("name", "weight", "licence")}
    return {
        "source": source,
        "format": part.format,
        "root": str(Path(part.root).absolute()) if part.files and not is_remote(part.root) else part.root,
        "files": [[file, *fingerprint(address(part.root, file))] for file in part.files],
        "range": [part.start, part.stop],
        "version": part.version,
        **({"state": part.state} if part.state else {}),
    }


def part_key(part: Part, recipe: Recipe) -> str:
    """What a part's files are called."""
    return digest_of(
        {
            "spill": SPILL_VERSION,
            "input": input_key(part),
            "tokenizer": recipe.tokenizer_sha256,
            "heldout_fraction": recipe.heldout_fraction,
            "filters": asdict(recipe.filters),
        }
    )


def digest_of(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode("utf-8", "surrogateescape")).hexdigest()[:32]


def spill_path(folder: Path, key: str, split: Split, kind: Kind) -> Path:
    return folder / f"{key}.{split}.{kind}"


def find_spilled(folder: Path, key: str) -> SpilledPart | None:
    """The record of a part that is finished, with all its files there and as long as they were."""
    try:
        fields = json.loads((folder / f"{key}.json").read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        return None  # not written by us, or a damaged disk: to be made again
    counts = {
        split: Counts(**of | {"removed": tuple(Removed(**one) for one in of["removed"])})
        for split, of in fields["counts"].items()
    }
    files = {name: (size, digest) for name, (size, digest) in fields["files"].items()}
    for name, (size, _) in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            return None
    return SpilledPart(counts, fields["smallest_hash"], fields["largest_hash"], files)


def check_intact(path: Path, digest: str) -> None:
    """Raises UserError where a disk damaged the file since it was written."""
    if file_xxh3_128(path) != digest:
        raise UserError(
            f"{path}: damaged since it was written (xxh3-128)\nremove it and start again: the other parts are kept"
        )


class SpillWriter:
    """Writes the files of one part, and its record when all is said. Left by an error, it removes them."""

    def __init__(self, recipe: Recipe, key: str) -> None:
        self._folder = recipe.folder
        self._key = key
        self._paths = {
            (split, kind): spill_path(recipe.folder, key, split, kind) for split in SPLITS for kind in recipe.kinds
        }
        self._files: dict[tuple[Split, Kind], BinaryIO] = {}
        self._open = ExitStack()
        self._digests: dict[tuple[Split, Kind], Any] = {}

    def __enter__(self) -> SpillWriter:
        (self._folder / f"{self._key}.json").unlink(missing_ok=True)
        for which, path in self._paths.items():
            self._files[which] = self._open.enter_context(path.open("wb"))
            self._digests[which] = xxhash.xxh3_128()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._open.close()  # what is still buffered need not fit the disk
        except OSError:
            self._remove()
            raise
        if error is not None:
            self._remove()

    def write(self, split: Split, kind: Kind, values: np.ndarray[Any, Any]) -> None:
        data = np.ascontiguousarray(values).data.cast("B") if values.size else b""
        self._files[split, kind].write(data)
        self._digests[split, kind].update(data)

    def finish(self, counts: Mapping[Split, Counts], smallest_hash: int, largest_hash: int) -> SpilledPart:
        self._open.close()
        files = {
            path.name: (path.stat().st_size, self._digests[which].hexdigest()) for which, path in self._paths.items()
        }
        part = SpilledPart(counts, smallest_hash, largest_hash, files)
        write_bytes_atomically(self._folder / f"{self._key}.json", json.dumps(asdict(part)).encode())
        return part

    def _remove(self) -> None:
        for path in self._paths.values():
            path.unlink(missing_ok=True)
