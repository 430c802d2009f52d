"""Prepared text in a store: manifest and tokenizer are fetched and checked first, shards when they are needed."""

from __future__ import annotations

import hashlib
import io
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gptscale.config.schema import DataConfig
from gptscale.data.cache import ShardCache, Wanted
from gptscale.data.corpus import (
    AGAIN,
    Corpus,
    check_ends,
    check_file,
    check_ids,
    open_split,
    parse_manifest,
    read_manifest,
)
from gptscale.data.shards import END_DTYPE, MANIFEST, Manifest, Split, end_file, token_file
from gptscale.data.store import is_remote
from gptscale.data.transfer import Check, Range, RemoteStore, go_on
from gptscale.flow import Shard
from gptscale.runtime.errors import UserError
from gptscale.runtime.files import write_bytes_atomically
from gptscale.tokenizer import Tokenizer
from gptscale.tokenizer.tokenizer import FILES


@dataclass(frozen=True)
class RemoteCorpus:
    """One split of a prepared folder in a store, checked but for the content of its shards. See `open_corpus`."""

    folder: str
    """The address of the prepared folder."""
    split: Split
    manifest: Manifest
    tokenizer_path: Path
    """On this host."""
    store: RemoteStore
    cache: ShardCache

    def wanted(self, shard: Shard) -> Wanted:
        """The shard's tokens."""
        return Wanted(self.store, f"{self.split}/{token_file(shard)}", shard.token_bytes, shard.token_xxh3_128)

    def token_path(self, shard: Shard) -> Path:
        """Where the tokens are on this host while they are held."""
        return self.cache.path(shard.token_xxh3_128)

    @contextmanager
    def tokens(self, shard: Shard) -> Iterator[npt.NDArray[Any]]:
        """All token ids of a shard, for as long as the block lasts."""
        descriptor = self.cache.hold(self.wanted(shard))
        try:
            dtype = np.dtype(self.manifest.dtype)
            header_bytes = shard.token_bytes - shard.tokens * dtype.itemsize
            with open(descriptor, "rb", closefd=False) as file:
                yield np.memmap(file, dtype, mode="r", offset=header_bytes, shape=(shard.tokens,))
        finally:
            self.cache.release(descriptor)

    def open_ends(self, shard: Shard) -> io.BytesIO:
        """The file of a shard's document ends, at the first of them. Fetched whole, and checked."""
        file = io.BytesIO(self._end_file(shard))
        file.seek(shard.end_bytes - shard.documents * END_DTYPE.itemsize)
        return file

    def ends(self, shard: Shard) -> npt.NDArray[np.uint64]:
        """The document ends of a shard. Fetched whole, and checked."""
        ends: npt.NDArray[np.uint64] = np.load(io.BytesIO(self._end_file(shard)), allow_pickle=False)
        return ends

    def some_tokens(self, shard: Shard, start: int, stop: int) -> npt.NDArray[Any]:
        """Token ids `start` to `stop` (exclusive) of a shard. Nothing but these is fetched, so nothing is checked."""
        return self.stretches([(shard, start, stop)])[0]

    def stretches(self, wanted: Sequence[tuple[Shard, int, int]]) -> list[npt.NDArray[Any]]:
        """`some_tokens` of several stretches at once."""
        dtype = np.dtype(self.manifest.dtype)
        ranges = []
        for shard, start, stop in wanted:
            begins = shard.token_bytes - shard.tokens * dtype.itemsize
            places = begins + start * dtype.itemsize, begins + stop * dtype.itemsize
            ranges.append(Range(f"{self.split}/{token_file(shard)}", *places, shard.token_bytes))
        return [np.frombuffer(data, dtype) for data in self.store.read_ranges(ranges, self.cache.check)]

    def verify(self) -> None:
        """Fetch every file and check it as `open_split` would, leaving nothing behind. Raises UserError."""
        for shard in self.manifest.shards:
            name = f"{self.split}/{token_file(shard)}"
            with self._fetched(name, shard.token_bytes, shard.token_xxh3_128) as path:
                check_file(path, shard.token_bytes, np.dtype(self.manifest.dtype), shard.tokens)
                ids = np.load(path, mmap_mode="r", allow_pickle=False)
                check_ids(ids, self.manifest.vocab_size, self.store.url(name))
            check_ends(self.ends(shard), shard, self.store.url(f"{self.split}/{end_file(shard)}"))

    def _end_file(self, shard: Shard) -> bytes:
        with self._fetched(f"{self.split}/{end_file(shard)}", shard.end_bytes, shard.end_xxh3_128) as path:
            return path.read_bytes()

    @contextmanager
    def _fetched(self, name: str, size: int, digest: str) -> Iterator[Path]:
        """An object as a file, for as long as the block lasts."""
        with tempfile.NamedTemporaryFile(dir=self.cache.folder) as file:
            self.store.fetch(name, size, digest, Path(file.name), self.cache.check)
            yield Path(file.name)


AnyCorpus = Corpus | RemoteCorpus


def cache_for(data: DataConfig, paths: Iterable[str], check: Check = go_on) -> ShardCache | None:
    """The cache of the settings; None where all `paths` are folders here. Raises UserError."""
    if not any(map(is_remote, paths)):
        return None
    folder = Path(data.corpora_dir) / "cache" if data.cache_dir is None else Path(data.cache_dir)
    return ShardCache(folder, data.cache_bytes, data.verify, check=check)


def open_corpus(path: str | Path, split: Split, verify: bool = False, cache: ShardCache | None = None) -> AnyCorpus:
    """Open `train` or `heldout` of a prepared folder, here as `open_split` does, or at an address, through `cache`.

    At an address the tokenizer and the size of every file are checked now, and the content of each shard when it is
    fetched. Raises UserError naming what is wrong.
    """
    if not is_remote(str(path)):
        return open_split(Path(path), split, verify)
    store, cache = _opened(path, cache)
    manifest = fetch_manifest(path, split, cache)
    largest = max(shard.token_bytes for shard in manifest.shards)
    if cache.limit_bytes is not None and cache.limit_bytes < largest:
        raise UserError(
            f"data.cache_bytes={cache.limit_bytes} does not hold one shard of {path}, which has {largest:,} bytes\n"
            "set data.cache_bytes to several shards, or prepare the text with a smaller data.shard_tokens"
        )
    tokenizer_path = _tokenizer(store, manifest, cache)
    _check_sizes(store, manifest, split, cache.check)
    return RemoteCorpus(str(path), split, manifest, tokenizer_path, store, cache)


def fetch_manifest(path: str | Path, split: Split, cache: ShardCache | None = None) -> Manifest:
    """The manifest of a split, here or at an address. Raises UserError."""
    if not is_remote(str(path)):
        return read_manifest(Path(path), split)
    store, cache = _opened(path, cache)
    name = f"{split}/{MANIFEST}"
    try:
        data = agreed(store, name, cache.check)
    except FileNotFoundError as error:
        raise UserError(
            f"{path}: {store.url(name)} is missing: not prepared text, or not copied to its end\n"
            "copy a whole prepared folder there, its manifests last, or correct data.path"
        ) from error
    manifest = parse_manifest(data, store.url(name), split)
    # They become names of files here.
    hashes = [f"{shard.token_xxh3_128}{shard.end_xxh3_128}" for shard in manifest.shards] + [manifest.tokenizer_sha256]
    if not all(re.fullmatch("[0-9a-f]{64}", one) for one in hashes):
        raise UserError(f"{store.url(name)}: damaged (a hash in it is none)\n{AGAIN}")
    return manifest


def agreed(store: RemoteStore, name: str, check: Check) -> bytes:
    """An object that nothing vouches for: what it says twice in a row."""
    data = store.read(name, check)
    for _ in range(store.patience.refetches + 1):
        again, data = data, store.read(name, check)
        if again == data:
            return data
    raise UserError(
        f"{store.url(name)}: comes with other bytes each time\nmake sure that nobody writes it, and start again"
    )


def _opened(path: str | Path, cache: ShardCache | None) -> tuple[RemoteStore, ShardCache]:
    assert cache is not None, f"{path} needs a cache to be read through"
    return RemoteStore(str(path), cache.patience), cache


def _tokenizer(store: RemoteStore, manifest: Manifest, cache: ShardCache) -> Path:
    """The tokenizer, on this host. Fetched again where it is not the manifest's, as a shard would be."""
    for name in FILES:
        path = cache.folder / f"{manifest.tokenizer_sha256}-{name}"
        if path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == manifest.tokenizer_sha256:
            return path
    for _ in range(store.patience.refetches + 1):
        name, data = _first_there(store, cache.check)
        if hashlib.sha256(data).hexdigest() == manifest.tokenizer_sha256:
            path = cache.folder / f"{manifest.tokenizer_sha256}-{name}"
            write_bytes_atomically(path, data)
            Tokenizer.load(path)
            return path
    raise UserError(
        f"{store.url(name)}: not the tokenizer that {store.url(manifest.split)} was made with (sha256 differs)\n{AGAIN}"
    )


def _first_there(store: RemoteStore, check: Check) -> tuple[str, bytes]:
    """The tokenizer's file, by whichever of its names."""
    for name in FILES:
        try:
            return name, store.read(name, check)
        except FileNotFoundError:
            continue
    raise UserError(f"{store.url(FILES[0])}: missing in the store\n{AGAIN}")


def _check_sizes(store: RemoteStore, manifest: Manifest, split: Split, check: Check) -> None:
    files: list[tuple[Callable[[Shard], str], Callable[[Shard], int]]] = [
        (token_file, lambda shard: shard.token_bytes),
        (end_file, lambda shard: shard.end_bytes),
    ]
    wanted = {name(shard): size(shard) for shard in manifest.shards for name, size in files}
    found = store.sizes(split, wanted, check)
    for name, size in wanted.items():
        url = store.url(f"{split}/{name}")
        if name not in found:
            raise UserError(f"{url}: missing\n{AGAIN}")
        if found[name] not in (None, size):
            raise UserError(f"{url}: {found[name]} bytes where the manifest says {size}\n{AGAIN}")
    for name in sorted(found):
        if name.endswith(".npy") and name not in wanted:
            raise UserError(
                f"{store.url(f'{split}/{name}')}: a shard that the manifest does not list\nremove it; {AGAIN}"
            )
