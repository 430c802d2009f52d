"""Tokenised parts to shards: in the order of the parts, without documents that others repeat, shuffled if asked for.

The same parts give the same shards. Memory is bounded, whatever there is to merge; the disk holds the tokens twice
meanwhile, and three times while they are shuffled.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gptscale.data.duplicates import EXACT, KEPT, NEAR, Keys, Marks, mark_repetitions, new_marks
from gptscale.data.near import banding
from gptscale.data.shards import END_DTYPE, SPLITS, Removed, ShardWriter, Split
from gptscale.data.shuffle import Block, shuffled
from gptscale.data.spill import DOCUMENT_DTYPE, Counts, Kind, Recipe, SpilledPart, checked, spill_path
from gptscale.flow import Shard

_DOCUMENTS_AT_ONCE = 1 << 16
_TOKENS_AT_ONCE = 1 << 24
_REASONS = {EXACT: "exact_duplicate", NEAR: "near_duplicate"}
_PRIORITY: tuple[Split, Split] = ("heldout", "train")
"""Whose documents stay where others repeat them: training must not see what evaluation asks for."""


@dataclass(frozen=True)
class Merged:
    """A split's shards, and what each part gave to it in the end."""

    shards: tuple[Shard, ...]
    counts: tuple[Counts, ...]


class Merge:
    """Parts to be merged into the shards of both splits."""

    def __init__(
        self, keys: Sequence[str], parts: Sequence[SpilledPart], recipe: Recipe, dtype: np.dtype[Any], scratch: Path
    ) -> None:
        """`keys` and records of the parts, in order; the type of their token ids; a folder for temporary files."""
        self._keys = keys
        self._parts = parts
        self._recipe = recipe
        self._dtype = dtype
        self._scratch = scratch
        self._intact: set[Path] = set()
        counts = [part.counts[split].documents for split in _PRIORITY for part in parts]
        firsts = np.concatenate([[0], np.cumsum(counts)]).tolist()
        self._first: dict[Split, list[int]] = {
            split: firsts[place * len(parts) :] for place, split in enumerate(_PRIORITY)
        }
        """For each part the number that its first document of a split has among all, heldout before train."""
        self._documents = firsts[-1]

    def run(self, target: Path, shard_tokens: int, shuffle: bool, report: Callable[[], None]) -> dict[Split, Merged]:
        """Write the shards below `target`. `report` is called after each part of a split.

        Raises UserError where a part's files were damaged since they were written.
        """
        marks = self._marks()
        merged: dict[Split, Merged] = {}
        for split in SPLITS:
            folder = target / split
            folder.mkdir()
            counts = self._counts(split, marks)
            with ShardWriter(folder, self._dtype, shard_tokens) as writer:
                if shuffle and split == "train":
                    total = sum(one.documents for one in counts), sum(one.tokens for one in counts)
                    for tokens, ends in shuffled(
                        self._blocks(split, marks, report), *total, self._dtype, self._scratch
                    ):
                        writer.append(tokens, ends)
                else:
                    self._append(split, marks, writer, report)
                merged[split] = Merged(writer.finish(), counts)
        return merged

    def _append(self, split: Split, marks: Marks | None, writer: ShardWriter, report: Callable[[], None]) -> None:
        for number in range(len(self._keys)):
            with self._checked(number, split, "tok").open("rb") as tokens:
                for begin, ends in self._kept(number, split, marks):
                    tokens.seek(begin * self._dtype.itemsize)
                    writer.append(tokens, ends)
            report()

    def _blocks(self, split: Split, marks: Marks | None, report: Callable[[], None]) -> Iterator[Block]:
        """The documents that stay, a bounded number of tokens at a time."""
        for number in range(len(self._keys)):
            path = self._checked(number, split, "tok")
            for begin, ends in self._kept(number, split, marks):
                done = 0
                while done < len(ends):
                    before = int(ends[done - 1]) if done else 0
                    stop = max(int(np.searchsorted(ends, before + _TOKENS_AT_ONCE, side="right")), done + 1)
                    values = np.fromfile(
                        path, self._dtype, int(ends[stop - 1]) - before, offset=(begin + before) * self._dtype.itemsize
                    )
                    yield values, ends[done:stop] - np.uint64(before)
                    done = stop
            report()

    def _kept(self, number: int, split: Split, marks: Marks | None) -> Iterator[tuple[int, npt.NDArray[np.uint64]]]:
        """Runs of a part's documents that stay: the token at which a run begins, and the ends counted from there."""
        place = self._first[split][number]
        before = 0
        with self._checked(number, split, "end").open("rb") as file:
            while block := file.read(_DOCUMENTS_AT_ONCE * END_DTYPE.itemsize):
                ends = np.frombuffer(block, dtype=END_DTYPE)
                stays = np.ones(len(ends), bool) if marks is None else marks[place : place + len(ends)] == KEPT
                place += len(ends)
                edges = np.flatnonzero(np.diff(np.concatenate([[False], stays, [False]])))
                for first, stop in edges.reshape(-1, 2).tolist():
                    begin = int(ends[first - 1]) if first else before
                    yield begin, ends[first:stop] - np.uint64(begin)
                before = int(ends[-1])

    def _counts(self, split: Split, marks: Marks | None) -> tuple[Counts, ...]:
        """What each part gives to a split once documents that others repeat are out."""
        if marks is None:
            return tuple(part.counts[split] for part in self._parts)
        return tuple(self._without_repetitions(number, split, marks) for number in range(len(self._parts)))

    def _without_repetitions(self, number: int, split: Split, marks: Marks) -> Counts:
        before = self._parts[number].counts[split]
        place = self._first[split][number]
        documents, text_bytes = Counter[int](), Counter[int]()
        for block in _blocks_of(self._checked(number, split, "doc"), DOCUMENT_DTYPE):
            marked = np.array(marks[place : place + len(block)])
            place += len(block)
            for mark in np.unique(marked).tolist():
                documents[mark] += int((marked == mark).sum())
                text_bytes[mark] += int(block["text_bytes"][marked == mark].sum())
        removed = tuple(
            Removed(reason, documents[mark], text_bytes[mark]) for mark, reason in _REASONS.items() if documents[mark]
        )
        tokens = sum(int(ends[-1]) for _, ends in self._kept(number, split, marks))
        return Counts(documents[KEPT], tokens, text_bytes[KEPT], before.removed + removed)

    def _marks(self) -> Marks | None:
        """Which documents others repeat. Numbered as they have priority; None without such a filter."""
        filters = self._recipe.filters
        if not filters.exact_duplicates and filters.near_duplicates is None:
            return None
        marks = new_marks(self._documents, self._scratch)
        if filters.exact_duplicates:
            mark_repetitions(self._hashes(), marks, EXACT, self._scratch)
        if filters.near_duplicates is not None:
            bands = banding(filters.near_duplicates).bands
            for band in range(bands):
                mark_repetitions(self._bands(band, bands), marks, NEAR, self._scratch)
        return marks

    def _hashes(self) -> Iterator[Keys]:
        for split, number in self._in_priority():
            for block in _blocks_of(self._checked(number, split, "doc"), DOCUMENT_DTYPE):
                yield block["hash"]

    def _bands(self, band: int, bands: int) -> Iterator[Keys]:
        for split, number in self._in_priority():
            for block in _blocks_of(self._checked(number, split, "near"), np.dtype(("<u8", (bands,)))):
                yield block[:, band : band + 1]

    def _in_priority(self) -> Iterator[tuple[Split, int]]:
        return ((split, number) for split in _PRIORITY for number in range(len(self._keys)))

    def _path(self, number: int, split: Split, kind: Kind) -> Path:
        return spill_path(self._recipe.folder, self._keys[number], split, kind)

    def _checked(self, number: int, split: Split, kind: Kind) -> Path:
        """A part's file, once it was read and found to be what was written."""
        path = self._path(number, split, kind)
        if path not in self._intact:
            self._intact.add(checked(self._recipe.folder, self._parts[number], path))
        return path


def _blocks_of(path: Path, dtype: np.dtype[Any]) -> Iterator[npt.NDArray[Any]]:
    with path.open("rb") as file:
        while block := file.read(_DOCUMENTS_AT_ONCE * dtype.itemsize):
            yield np.frombuffer(block, dtype)
