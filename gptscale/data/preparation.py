"""The steps from raw text to shards: tokenizer, tokenised parts, shards and manifests; what is finished is kept."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from gptscale.config.names import source_names
from gptscale.config.schema import DataConfig, FilterConfig, TokenizerConfig
from gptscale.data.filters import check_filters, refused
from gptscale.data.fim import fill_in_middle
from gptscale.data.merge import MERGE_VERSION, Merge, Merged
from gptscale.data.provenance import part_records
from gptscale.data.shards import SPLITS, Manifest, Split, token_dtype
from gptscale.data.sources import FORMATS, Part, find_parts, read_part
from gptscale.data.spill import SPILL_VERSION, Recipe, SpilledPart, digest_of, find_spilled, input_key, part_key
from gptscale.data.tokenise import HASH_RANGE, TokeniseJob, identity_hash, is_heldout, tokenise_part
from gptscale.data.workers import WorkerPool
from gptscale.runtime.errors import UserError
from gptscale.runtime.files import write_bytes_atomically
from gptscale.runtime.hardware import usable_cores
from gptscale.tokenizer import Tokenizer
from gptscale.tokenizer.tokenizer import FILES
from gptscale.tokenizer.train import train_tokenizer


@dataclass(frozen=True)
class ProgressEvent:
    """How far preparing has come."""

    stage: Literal["wait", "tokenizer", "tokenise", "merge", "done"]
    parts_done: int = 0
    parts: int = 0
    """In `merge` shards, not parts."""
    tokens: int = 0
    """Of the parts done."""
    bytes_done: int = 0
    """Those of parts that are not done yet included, where their format tells."""
    bytes: int = 0
    """Of input, as far as it is known."""
    bytes_before: int = 0
    """Of `bytes_done`, those that were done before this process began."""


Progress = Callable[[ProgressEvent], None]


class Preparation:
    """Text on its way into shards, in the folder `work`. Call `find_tokenizer`, then `tokenise`, then `merge`.

    A context: leaving it ends the processes that were started.
    """

    def __init__(self, data: DataConfig, tokenizer: TokenizerConfig, work: Path, report: Progress) -> None:
        """Raises UserError for settings that lead to no shards."""
        check_filters(data.filters)
        self._data = data
        self._settings = tokenizer
        self._work = work
        self._report = report
        self._parts = _parts(data, tokenizer)
        self._pool = WorkerPool(data.workers or usable_cores())

    def __enter__(self) -> Preparation:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.close()

    def find_tokenizer(self) -> None:
        """Train the tokenizer, or take the one that is given or was trained already for the same text."""
        self._report(ProgressEvent("tokenizer", parts=len(self._parts)))
        if self._settings.path is not None:
            given = Path(self._settings.path)
            loaded = Tokenizer.load(given)
            path = self._work / "tokenizer" / loaded.sha256 / loaded.file_name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes_atomically(path, given.read_bytes())
        else:
            path = self._work / "tokenizer" / self._tokenizer_key() / FILES[0]
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                sample = _sample(
                    self._parts, self._settings.training_bytes, self._data.heldout_fraction, self._data.filters
                )
                train_tokenizer(
                    sample, self._settings.vocab_size, path, any(part.source.fim_rate for part in self._parts)
                )
        folder = self._work / "parts"
        folder.mkdir(exist_ok=True)
        self._tokenizer = Tokenizer.load(path)
        for source in self._data.sources:
            fill_in_middle(source.fim_rate, source.fim_spm_rate, self._tokenizer)  # refuses a vocabulary without tokens
        self._recipe = Recipe(path, self._tokenizer.sha256, self._data.heldout_fraction, self._data.filters, folder)

    def _tokenizer_key(self) -> str:
        """Of all that decides what is learnt: the text that the sample is taken from, and how much of it."""
        filters = self._data.filters
        return digest_of(
            ({} if filters == FilterConfig() else {"filters": asdict(filters)})
            | {
                "spill": SPILL_VERSION,
                "inputs": [input_key(part) for part in self._parts],
                "vocab_size": self._settings.vocab_size,
                "training_bytes": self._settings.training_bytes,
                "heldout_fraction": self._data.heldout_fraction,
            }
        )

    @cached_property
    def _keys(self) -> list[str]:
        """What the parts' files are called, in order. Of a source that is named twice, two are the same."""
        return [part_key(part, self._recipe) for part in self._parts]

    def tokenise(self, task: int = 0, tasks: int = 1) -> int:
        """Tokenise what is missing of the parts, or of every `tasks`-th from `task` on; how many parts those are."""
        parts = dict(zip(self._keys, self._parts, strict=True))
        mine = dict(list(parts.items())[task::tasks])
        before = {key: found for key in mine if (found := find_spilled(self._recipe.folder, key)) is not None}
        missing = {key: part for key, part in mine.items() if key not in before}
        bytes_before = sum(mine[key].input_bytes for key in before)
        progress = ProgressEvent(
            "tokenise",
            len(before),
            len(mine),
            sum(part.tokens for part in before.values()),
            bytes_before,
            sum(part.input_bytes for part in mine.values()),
            bytes_before,
        )
        self._report(progress)
        jobs = {key: TokeniseJob(part, key, self._recipe) for key, part in missing.items()}

        def watch(in_flight: int) -> None:
            self._report(replace(progress, bytes_done=min(progress.bytes_done + in_flight, progress.bytes)))

        for key, result in self._pool.run(tokenise_part, jobs, lambda job: job.part.input_bytes, watch):
            progress = replace(
                progress,
                parts_done=progress.parts_done + 1,
                tokens=progress.tokens + result.tokens,
                bytes_done=progress.bytes_done + missing[key].input_bytes,
            )
            self._report(progress)
        return len(mine)

    def merge(self) -> Path:
        """Write shards and manifests from the tokenised parts; the finished folder, below `work`.

        Raises UserError where a part is missing or damaged, and where a split would be empty.
        """
        spilled = self._spilled()
        if empty := _empty(spilled, self._data.heldout_fraction):
            shutil.rmtree(self._work)
            raise UserError(empty)
        dtype = token_dtype(self._tokenizer.vocab_size)
        folder = self._merge_folder(dtype)
        target = folder / "out"
        tokens = sum(part.tokens for part in spilled)
        merged = Merge(self._keys, spilled, self._recipe, dtype, folder, self._pool).run(
            self._data.shard_tokens,
            self._data.shuffle_documents,
            lambda done, shards: self._report(ProgressEvent("merge", done, shards, tokens)),
        )
        for split in SPLITS:
            if not merged[split].shards:
                raise UserError(
                    f"data.filters: without duplicates there is no text left for {split}\n"
                    "prepare more text, or with another data.heldout_fraction"
                )
        write_bytes_atomically(target / self._tokenizer.file_name, self._recipe.tokenizer_path.read_bytes())
        for split in SPLITS:
            self._manifest(split, merged[split]).write(target / split)
        tokens = sum(count.tokens for split in SPLITS for count in merged[split].counts)
        self._report(ProgressEvent("done", len(spilled), len(spilled), tokens))
        return target

    def _merge_folder(self, dtype: np.dtype[np.generic]) -> Path:
        """Where the parts come together: of all that decides the shards, so that what is there of them counts."""
        settings = {
            "merge": MERGE_VERSION,
            "parts": self._keys,
            "dtype": dtype.str,
            "shard_tokens": self._data.shard_tokens,
            "shuffle": self._data.shuffle_documents,
        }
        folder = self._work / f"merge-{digest_of(settings)}"
        for other in self._work.glob("merge-*"):
            if other != folder:
                shutil.rmtree(other)  # it would take room for nothing
        folder.mkdir(exist_ok=True)
        return folder

    def _spilled(self) -> list[SpilledPart]:
        found = [find_spilled(self._recipe.folder, key) for key in self._keys]
        missing = [part.name for part, one in zip(self._parts, found, strict=True) if one is None]
        if missing:
            raise UserError(
                f"prepare.merge: {len(missing)} of {len(found)} parts are not tokenised yet, {missing[0]} for one\n"
                "run their tasks (again), or leave prepare.merge out to tokenise them here"
            )
        return [one for one in found if one is not None]

    def _manifest(self, split: Split, merged: Merged) -> Manifest:
        records = part_records(self._parts, merged.counts)
        return Manifest(
            split=split,
            tokenizer_sha256=self._tokenizer.sha256,
            vocab_size=self._tokenizer.vocab_size,
            end_of_text=self._tokenizer.end_of_text,
            dtype=token_dtype(self._tokenizer.vocab_size).str,
            tokens=sum(record.tokens for record in records),
            documents=sum(record.documents for record in records),
            text_bytes=sum(record.text_bytes for record in records),
            shards=merged.shards,
            parts=records,
            shuffled=self._data.shuffle_documents and split == "train",
        )


def _parts(data: DataConfig, tokenizer: TokenizerConfig) -> list[Part]:
    if not data.sources:
        raise UserError(
            "data.sources is empty: there is no text to prepare\nname text, or prepared shards in data.path"
        )
    weights = {source.weight for source in data.sources}
    if len(weights) > 1:
        raise UserError(
            "data.sources have different weights, and text is prepared whole\n"
            "prepare each source by itself and give data.path a list of {path, weight}"
        )
    if not 0 < data.heldout_fraction < 1:
        raise UserError(
            f"data.heldout_fraction={data.heldout_fraction} must lie between 0 and 1\n"
            "set it to e.g. 0.02: evaluation needs text that training has not seen"
        )
    for number, source in enumerate(data.sources):
        if not (0 <= source.fim_rate <= 1 and 0 <= source.fim_spm_rate <= 1):
            raise UserError(
                f"data.sources[{number}]: fim_rate={source.fim_rate}, fim_spm_rate={source.fim_spm_rate} are shares\n"
                "set them between 0 and 1"
            )
        if source.fim_rate and source.format in FORMATS and FORMATS.get(source.format).tokens:
            raise UserError(
                f"data.sources[{number}].fim_rate={source.fim_rate}, but format={source.format} is no text to cut\n"
                "set fim_rate=0, or name the text itself"
            )
    if data.shard_tokens < 1 or (data.workers is not None and data.workers < 1):
        raise UserError("data.shard_tokens and data.workers must be at least 1\ncorrect them")
    parts = [
        part
        for number, (source, name) in enumerate(zip(data.sources, source_names(data.sources), strict=True))
        for part in find_parts(replace(source, name=name), f"data.sources[{number}]")
    ]
    for part in parts:
        if tokenizer.path is None and FORMATS.get(part.format).tokens:
            raise UserError(
                f"{part.name}: token ids, and tokenizer.path does not say of which vocabulary\n"
                "set tokenizer.path to the tokenizer.model or tokenizer.json that made them"
            )
    if not parts:
        raise UserError("data.sources hold no text\nname sources that hold text")
    return parts


def _sample(parts: list[Part], budget_bytes: int, heldout_fraction: float, filters: FilterConfig) -> Iterator[str]:
    """Training text for the tokenizer: of each part the first documents that the filters leave, as its size allows;
    nothing held out."""
    total = sum(max(part.input_bytes, 1) for part in parts)
    for part in parts:
        left = max(1, budget_bytes * max(part.input_bytes, 1) // total)
        for document in read_part(part):
            if is_heldout(identity_hash(document.identity), heldout_fraction) or refused(document.text, filters):
                continue
            text = document.text[:left]
            yield text
            left -= len(text.encode())
            if left <= 0:
                break


def _empty(parts: list[SpilledPart], heldout_fraction: float) -> str:
    """What to say where one split has no document; "" where both have some."""
    trained = sum(part.counts["train"].documents for part in parts)
    held_out = sum(part.counts["heldout"].documents for part in parts)
    if trained and held_out:
        return ""
    if not trained and not held_out:
        if any(counts.removed for part in parts for counts in part.counts.values()):
            return "data.filters leave no document\nset them wider, or name other text"
        return "data.sources hold no text: every document is empty\nname sources that hold text"
    if trained == 1:
        return (
            "data.sources hold one document, and one has to be held out for evaluation\n"
            "cut the text into several files, or into lines of a .jsonl file"
        )
    if not held_out:
        enough = (min(part.smallest_hash for part in parts) + 1) / HASH_RANGE
        return (
            f"data.heldout_fraction={heldout_fraction} holds out none of the {trained} documents\n"
            f"set data.heldout_fraction={_rounded_up(enough)} or more, or name more text"
        )
    return (
        f"data.heldout_fraction={heldout_fraction} holds out all of the {held_out} documents\n"
        "set it lower, or name more text"
    )


def _rounded_up(fraction: float) -> str:
    """Three significant digits, never below `fraction`."""
    step = 10.0 ** (np.floor(np.log10(fraction)) - 2)
    return f"{np.ceil(fraction / step) * step:.3g}"
