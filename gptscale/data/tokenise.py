"""What a worker process does: read one part, leave out what the filters say, tokenise the rest, and spill it.

Imported in spawned processes: no torch here, nor in anything this imports.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from gptscale.config.schema import FilterConfig
from gptscale.data.filters import refused
from gptscale.data.fim import FillInMiddle, fill_in_middle
from gptscale.data.near import band_keys, banding
from gptscale.data.shards import END_DTYPE, Removed, Split, token_dtype
from gptscale.data.sources import Document, Part, read_part
from gptscale.data.spill import DOCUMENT_DTYPE, Counts, Recipe, SpilledPart, SpillWriter
from gptscale.data.worker_process import check_stop
from gptscale.runtime.errors import UserError
from gptscale.tokenizer import Tokenizer
from gptscale.tokenizer.tokenizer import Ids

_BATCH_CHARACTERS = 1 << 20
HASH_RANGE = 1 << 64


def identity_hash(identity: str) -> int:
    """What decides whether a document is held out: it depends on nothing but the document's identity."""
    return xxhash.xxh3_64_intdigest(identity.encode("utf-8", "surrogateescape"))


def is_heldout(digest: int, heldout_fraction: float) -> bool:
    return digest < heldout_fraction * HASH_RANGE


class TokeniseJob(NamedTuple):
    """A part, and what its files are called."""

    part: Part
    key: str
    recipe: Recipe


def tokenise_part(job: TokeniseJob) -> SpilledPart:
    """Tokenise a part into the spill folder. Each document ends with end_of_text; empty ones are left out."""
    part, key, recipe = job
    tokenizer = _tokenizer(recipe.tokenizer_path, recipe.tokenizer_sha256)
    smallest, largest = HASH_RANGE - 1, 0
    with SpillWriter(recipe, key) as writer:
        train = _SplitSpill(writer, "train", tokenizer, recipe)
        train.fim = fill_in_middle(part.source.fim_rate, part.source.fim_spm_rate, tokenizer)
        heldout = _SplitSpill(writer, "heldout", tokenizer, recipe)
        for batch in _batches(_vetted(read_part(part), part, tokenizer, recipe.filters != FilterConfig())):
            check_stop()
            hashes = [identity_hash(document.identity) for document in batch]
            smallest, largest = min(smallest, *hashes), max(largest, *hashes)
            for target, side in ((heldout, True), (train, False)):
                target.add(
                    [
                        (document, digest)
                        for document, digest in zip(batch, hashes, strict=True)
                        if is_heldout(digest, recipe.heldout_fraction) is side
                    ]
                )
        return writer.finish({"train": train.counts, "heldout": heldout.counts}, smallest, largest)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Enough documents at a time for the tokenizer's fast path, few enough to bound the memory. No empty ones."""
    batch: list[Document] = []
    characters = 0
    for document in documents:
        size = len(document.text) if document.tokens is None else len(document.tokens)
        if not size:
            continue
        batch.append(document)
        characters += size
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _vetted(documents: Iterable[Document], part: Part, tokenizer: Tokenizer, read: bool) -> Iterator[Document]:
    """Documents of token ids without the ids that close them, and with their text where somebody is to read it.

    Raises UserError for ids that are not the tokenizer's.
    """
    closing = {tokenizer.end_of_text, part.source.end_of_text}
    for document in documents:
        ids = document.tokens
        if ids is None:
            yield document
            continue
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < tokenizer.vocab_size:
            raise UserError(
                f"{part.name}: {document.identity} holds ids {ids.min()}…{ids.max()}, and the vocabulary "
                f"{tokenizer.vocab_size} tokens\nset tokenizer.path to the tokenizer that made them"
            )
        end = len(ids)
        while end and int(ids[end - 1]) in closing:
            end -= 1
        ids = ids[:end].astype(np.uint32)
        yield document._replace(text=tokenizer.decode(ids) if read else "", tokens=ids)


class _SplitSpill:
    """One split of one part on its way to the disk."""

    def __init__(self, writer: SpillWriter, split: Split, tokenizer: Tokenizer, recipe: Recipe) -> None:
        self._writer = writer
        self._split: Split = split
        self._tokenizer = tokenizer
        self._filters = recipe.filters
        self.fim: FillInMiddle | None = None
        self._kinds = recipe.kinds
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._byte_lengths = tokenizer.byte_lengths()
        self._documents = self._tokens = self._text_bytes = 0
        self._removed: dict[str, Removed] = {}

    @property
    def counts(self) -> Counts:
        removed = tuple(self._removed[reason] for reason in sorted(self._removed))
        return Counts(self._documents, self._tokens, self._text_bytes, removed)

    def add(self, documents: list[tuple[Document, int]]) -> None:
        """Write the documents that the filters leave, and count the others. Each comes with its identity's hash."""
        kept = []
        for document, digest in documents:
            reason = refused(document.text, self._filters)
            if reason is None:
                kept.append((document, digest))
            else:
                before = self._removed.get(reason, Removed(reason, 0, 0))
                self._removed[reason] = Removed(
                    reason, before.documents + 1, before.text_bytes + self._text_size(document)
                )
        if kept:
            self._write([document for document, _ in kept], [digest for _, digest in kept])

    def _text_size(self, document: Document) -> int:
        """Bytes of UTF-8."""
        if document.tokens is None:
            return len(document.text.encode())
        return int(self._byte_lengths[document.tokens].sum())

    def _encode(self, kept: list[Document], digests: list[int]) -> list[Ids]:
        given = [document.tokens for document in kept if document.tokens is not None]
        if given:
            assert len(given) == len(kept), "a part is of one kind"
            return given
        texts = [document.text for document in kept]
        if self.fim is None:
            return self._tokenizer.encode_batch(texts)
        return self.fim.encode(self._tokenizer, texts, digests)

    def _write(self, kept: list[Document], digests: list[int]) -> None:
        encoded = self._encode(kept, digests)
        texts = [document.text for document in kept]
        ends = self._tokens + np.cumsum([len(ids) + 1 for ids in encoded])
        tokens = np.full(int(ends[-1]) - self._tokens, self._tokenizer.end_of_text, dtype=self._dtype)
        start = 0
        for ids in encoded:
            tokens[start : start + len(ids)] = ids
            start += len(ids) + 1
        self._writer.write(self._split, "tok", tokens)
        self._writer.write(self._split, "end", ends.astype(END_DTYPE))
        sizes = [self._text_size(document) for document in kept]
        if "doc" in self._kinds:
            documents = np.empty(len(texts), dtype=DOCUMENT_DTYPE)
            hashes = b"".join(xxhash.xxh3_128_digest(text.encode()) for text in texts)
            documents["hash"] = np.frombuffer(hashes, dtype="<u8").reshape(-1, 2)
            documents["text_bytes"] = sizes
            self._writer.write(self._split, "doc", documents)
        if self._filters.near_duplicates is not None:
            keys = band_keys(texts, banding(self._filters.near_duplicates))
            self._writer.write(self._split, "near", keys.astype("<u8"))
        self._documents += len(texts)
        self._tokens = int(ends[-1])
        self._text_bytes += sum(sizes)


@lru_cache(maxsize=1)
def _tokenizer(path: Path, sha256: str) -> Tokenizer:
    tokenizer = Tokenizer.load(path)
    assert tokenizer.sha256 == sha256, f"{path} changed while in use"
    return tokenizer
