"""Tokenised parts to shards: in the order of the parts, without documents that others repeat, shuffled if asked for.

The same parts give the same shards. Memory is bounded, whatever there is to merge; the disk holds the tokens twice
meanwhile, and three times while they are shuffled. Shards are written by several processes, and one that is written is
kept, as are the marks of repetitions and the shuffled documents: a merge that was killed goes on.

    <folder>/out/<split>/shard-00000.tok.npy …  the shards
    <folder>/shards/<split>-shard-00000.json    the record of one that is written
    <folder>/marks                              which documents others repeat, once all is known of that
    <folder>/shuffle/                           documents in their new order, once all have found their place
    <folder>/scratch/                           what is of no use to the next process
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gptscale.data.duplicates import EXACT, KEPT, NEAR, Keys, Marks, mark_repetitions, new_marks, open_marks
from gptscale.data.near import banding
from gptscale.data.shard_plan import Tokenised, plan_shards, read_documents, runs
from gptscale.data.shard_writing import ShardJob, find_written, write_shard
from gptscale.data.shards import SPLITS, Removed, Split
from gptscale.data.shuffle import Block, find_shuffled, shuffle_documents
from gptscale.data.spill import DOCUMENT_DTYPE, Counts, Kind, Recipe, SpilledPart, check_intact, spill_path
from gptscale.data.workers import WorkerPool
from gptscale.flow import Shard

MERGE_VERSION = 1
"""Of what is kept between two processes that merge."""
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
        self,
        keys: Sequence[str],
        parts: Sequence[SpilledPart],
        recipe: Recipe,
        dtype: np.dtype[Any],
        folder: Path,
        pool: WorkerPool,
    ) -> None:
        """`keys` and records of the parts, in order; the type of their token ids. `folder` is of this merge alone: of
        these parts, and of what `run` is called with."""
        self._keys = keys
        self._parts = parts
        self._recipe = recipe
        self._dtype = dtype
        self._folder = folder
        self._scratch = folder / "scratch"
        self._pool = pool
        self._intact: set[Path] = set()
        counts = [part.counts[split].documents for split in _PRIORITY for part in parts]
        firsts = np.concatenate([[0], np.cumsum(counts)]).tolist()
        self._first: dict[Split, list[int]] = {
            split: firsts[place * len(parts) :] for place, split in enumerate(_PRIORITY)
        }
        """For each part the number that its first document of a split has among all, heldout before train."""
        self._documents = firsts[-1]

    def run(self, shard_tokens: int, shuffle: bool, report: Callable[[int, int], None]) -> dict[Split, Merged]:
        """Write the shards that are not there yet. `report` is called with how many are, and how many are to be.

        Raises UserError where a part's files were damaged since they were written.
        """
        shutil.rmtree(self._scratch, ignore_errors=True)
        for folder in (self._scratch, self._folder / "shards", *(self._folder / "out" / split for split in SPLITS)):
            folder.mkdir(parents=True, exist_ok=True)
        marks = self._marks()
        counts = {split: self._counts(split, marks) for split in SPLITS}
        jobs: dict[tuple[Split, str], ShardJob] = {}
        for split in SPLITS:
            shuffled = shuffle and split == "train"
            sources = self._shuffled(counts[split], marks) if shuffled else self._sources(split)
            for job in self._jobs(split, sources, None if shuffled else marks, shard_tokens):
                jobs[split, job.name] = job
        written = self._write(jobs, report)
        return {
            split: Merged(tuple(written[which] for which in jobs if which[0] == split), counts[split])
            for split in SPLITS
        }

    def _jobs(
        self, split: Split, sources: Sequence[Tokenised], marks: Marks | None, shard_tokens: int
    ) -> Iterator[ShardJob]:
        for number, plan in enumerate(plan_shards(sources, marks, shard_tokens)):
            name = f"shard-{number:05d}"
            yield ShardJob(
                name=name,
                plan=plan,
                sources={stretch.source: sources[stretch.source] for stretch in plan.stretches},
                marks=None if marks is None else self._folder / "marks",
                dtype=self._dtype.str,
                folder=self._folder / "out" / split,
                record=self._folder / "shards" / f"{split}-{name}.json",
            )

    def _write(
        self, jobs: Mapping[tuple[Split, str], ShardJob], report: Callable[[int, int], None]
    ) -> dict[tuple[Split, str], Shard]:
        written = {which: shard for which, job in jobs.items() if (shard := find_written(job)) is not None}
        missing = {which: job for which, job in jobs.items() if which not in written}
        report(len(written), len(jobs))
        for which, shard in self._pool.run(write_shard, missing, lambda job: job.plan.tokens * self._dtype.itemsize):
            written[which] = shard
            report(len(written), len(jobs))
        return written

    def _sources(self, split: Split) -> list[Tokenised]:
        return [self._source(number, split) for number in range(len(self._parts))]

    def _source(self, number: int, split: Split) -> Tokenised:
        tokens, ends = self._path(number, split, "tok"), self._checked(number, split, "end")
        files = self._parts[number].files
        return Tokenised(tokens, ends, files[tokens.name][1], files[ends.name][1], self._first[split][number])

    def _shuffled(self, counts: Sequence[Counts], marks: Marks | None) -> list[Tokenised]:
        """The documents of train that stay, in random order."""
        folder = self._folder / "shuffle"
        found = find_shuffled(folder)
        if found is None:
            documents, tokens = sum(one.documents for one in counts), sum(one.tokens for one in counts)
            found = shuffle_documents(self._blocks(marks), documents, tokens, self._dtype, folder, self._pool)
        return found

    def _blocks(self, marks: Marks | None) -> Iterator[Block]:
        """The documents of train that stay, a bounded number of tokens at a time."""
        item = self._dtype.itemsize
        for number in range(len(self._parts)):
            path = self._checked(number, "train", "tok")
            for documents in read_documents(self._source(number, "train"), marks):
                for first, stop in runs(documents.stays):
                    while first < stop:
                        begin = int(documents.starts[first])
                        most = int(np.searchsorted(documents.ends[:stop], begin + _TOKENS_AT_ONCE, side="right"))
                        last = max(most, first + 1)
                        values = np.fromfile(
                            path, self._dtype, int(documents.ends[last - 1]) - begin, offset=begin * item
                        )
                        yield values, documents.ends[first:last] - begin
                        first = last

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
        tokens = sum(
            int((one.ends - one.starts)[one.stays].sum()) for one in read_documents(self._source(number, split), marks)
        )
        return Counts(documents[KEPT], tokens, text_bytes[KEPT], before.removed + removed)

    def _marks(self) -> Marks | None:
        """Which documents others repeat. Numbered as they have priority; None without such a filter."""
        filters = self._recipe.filters
        if not filters.exact_duplicates and filters.near_duplicates is None:
            return None
        path = self._folder / "marks"
        if path.exists():
            return open_marks(path)
        marks = new_marks(self._documents, self._scratch / "marks")
        if filters.exact_duplicates:
            mark_repetitions(self._hashes(), marks, EXACT, self._scratch)
        if filters.near_duplicates is not None:
            bands = banding(filters.near_duplicates).bands
            for band in range(bands):
                mark_repetitions(self._bands(band, bands), marks, NEAR, self._scratch)
        marks.flush()
        os.replace(self._scratch / "marks", path)
        return open_marks(path)

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
            check_intact(path, self._parts[number].files[path.name][1])
            self._intact.add(path)
        return path


def _blocks_of(path: Path, dtype: np.dtype[Any]) -> Iterator[npt.NDArray[Any]]:
    with path.open("rb") as file:
        while block := file.read(_DOCUMENTS_AT_ONCE * dtype.itemsize):
            yield np.frombuffer(block, dtype)
