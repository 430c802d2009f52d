"""What a prepared folder holds, read once for whoever shows it: the terminal or a page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gptscale.data.cache import ShardCache
from gptscale.data.document_index import source_of
from gptscale.data.excerpts import Excerpt, excerpts
from gptscale.data.lengths import Lengths, document_lengths
from gptscale.data.remote import RemoteCorpus, fetch_manifest, open_corpus
from gptscale.data.shards import MANIFEST, SPLITS, Manifest, PartRecord
from gptscale.runtime.errors import UserError


@dataclass(frozen=True)
class Group:
    """Parts of a split that have something in common."""

    name: str
    parts: int
    documents: int
    tokens: int
    text_bytes: int
    formats: tuple[str, ...]
    licences: tuple[str, ...]
    versions: tuple[str, ...]
    """Each once, that of most tokens first; without empty ones."""


@dataclass(frozen=True)
class LeftOut:
    """What a filter left out of a source when it was prepared, of both splits together."""

    source: str
    reason: str
    documents: int
    text_bytes: int


@dataclass(frozen=True)
class SplitSummary:
    manifest: Manifest
    sources: tuple[Group, ...]
    """The largest first, as are `licences`."""
    licences: tuple[Group, ...]
    lengths: Lengths | None
    """None where files are damaged."""

    @property
    def file_bytes(self) -> int:
        return sum(shard.token_bytes + shard.end_bytes for shard in self.manifest.shards)


@dataclass(frozen=True)
class DataSummary:
    folder: str
    """Or its address."""
    train: SplitSummary
    heldout: SplitSummary
    excerpts: tuple[Excerpt, ...]
    """Of training text; none where files are damaged."""
    verified: bool
    """Whether every file was read and compared with its checksum."""
    damage: UserError | None
    """The first file that is not what the manifests say."""

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """By source and reason, as the manifests name them."""
        found: dict[tuple[str, str], LeftOut] = {}
        for part in (part for split in self.splits for part in split.manifest.parts):
            for one in part.removed:
                key = source_of(part), one.reason
                before = found.get(key, LeftOut(*key, 0, 0))
                documents, text_bytes = before.documents + one.documents, before.text_bytes + one.text_bytes
                found[key] = LeftOut(*key, documents, text_bytes)
        return tuple(found.values())

    @property
    def splits(self) -> tuple[SplitSummary, SplitSummary]:
        return self.train, self.heldout

    @property
    def condition(self) -> str:
        """Of the files, in words."""
        if self.damage is not None:
            return f"DAMAGED: {str(self.damage).splitlines()[0]}"
        if self.verified:
            return "all there; every checksum right, every id within the vocabulary, document ends in order"
        return "all there, with the right sizes; verify=true reads them"


def is_prepared(folder: Path) -> bool:
    return any((folder / split / MANIFEST).is_file() for split in SPLITS)


def read_summary(folder: str | Path, verify: bool = False, cache: ShardCache | None = None) -> DataSummary:
    """Of a folder here, or of one at an address, by way of `cache`.

    Raises UserError where a manifest is missing or damaged; damage of other files is in the summary. Takes the time and
    memory of reading the manifests and the document ends; `verify` reads every file.
    """
    train, heldout = (fetch_manifest(folder, split, cache) for split in SPLITS)
    try:
        opened = [open_corpus(folder, split, verify, cache) for split in SPLITS]
        for corpus in opened:
            if verify and isinstance(corpus, RemoteCorpus):
                corpus.verify()
        lengths = [document_lengths(corpus) for corpus in opened]
        samples = excerpts(opened[0])
    except UserError as error:
        damaged = summarised(train, None), summarised(heldout, None)
        return DataSummary(str(folder), *damaged, excerpts=(), verified=False, damage=error)
    sound = summarised(train, lengths[0]), summarised(heldout, lengths[1])
    return DataSummary(str(folder), *sound, excerpts=samples, verified=verify, damage=None)


def summarised(manifest: Manifest, lengths: Lengths | None) -> SplitSummary:
    by_source: dict[str, list[PartRecord]] = {}
    by_licence: dict[str, list[PartRecord]] = {}
    for part in manifest.parts:
        by_source.setdefault(source_of(part), []).append(part)
        by_licence.setdefault(part.licence, []).append(part)
    return SplitSummary(manifest, _groups(by_source), _groups(by_licence), lengths)


def _groups(parts: dict[str, list[PartRecord]]) -> tuple[Group, ...]:
    found = [_group(name, of_it) for name, of_it in parts.items()]
    return tuple(sorted(found, key=lambda group: -group.tokens))


def _group(name: str, parts: Sequence[PartRecord]) -> Group:
    return Group(
        name=name,
        parts=len(parts),
        documents=sum(part.documents for part in parts),
        tokens=sum(part.tokens for part in parts),
        text_bytes=sum(part.text_bytes for part in parts),
        formats=_most_used((part.source, part.tokens) for part in parts),
        licences=_most_used((part.licence, part.tokens) for part in parts),
        versions=_most_used((part.version, part.tokens) for part in parts),
    )


def _most_used(words: Iterable[tuple[str, int]]) -> tuple[str, ...]:
    tokens: dict[str, int] = {}
    for word, weight in words:
        if word:
            tokens[word] = tokens.get(word, 0) + weight
    return tuple(sorted(tokens, key=lambda word: -tokens[word]))
