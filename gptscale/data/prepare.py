"""Raw text to shards: sample, train the tokenizer, tokenise in parallel, write shards, and the manifests last.

Everything is written into a folder beside the target and renamed at the end, so that a prepared folder either is
complete or does not exist, whatever stops the process. The same inputs give the same shards on any number of workers:
parts are fixed by the sources alone and their results joined in order.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from gptscale.config.rules import text_names
from gptscale.config.schema import DataConfig, SourceConfig, TokenizerConfig
from gptscale.data.corpus import read_manifest
from gptscale.data.shards import (
    END_DTYPE,
    MANIFEST,
    SPLITS,
    TOKENIZER,
    Manifest,
    PartRecord,
    ShardWriter,
    Split,
    token_dtype,
)
from gptscale.data.sources import Part, find_parts, read_part
from gptscale.data.tokenise import HASH_RANGE, Counts, Recipe, Tokenised, identity_hash, is_heldout, spill_paths
from gptscale.data.workers import tokenise_all
from gptscale.runtime.errors import UserError
from gptscale.runtime.files import fsync_folder, write_bytes_atomically
from gptscale.runtime.hardware import usable_cores
from gptscale.runtime.locks import FileLock
from gptscale.tokenizer import Tokenizer, train_tokenizer

_log = logging.getLogger(__name__)
_ENDS_AT_ONCE = 1 << 16
_LOCK_POLL_S = 0.2
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT}


@dataclass(frozen=True)
class ProgressEvent:
    """How far preparing has come. `tokens` are those written so far."""

    stage: Literal["wait", "tokenizer", "tokenise", "done"]
    parts_done: int = 0
    parts: int = 0
    tokens: int = 0


Progress = Callable[[ProgressEvent], None]


@dataclass(frozen=True)
class Prepared:
    """A finished folder and what it holds."""

    folder: Path
    train: Manifest
    heldout: Manifest


def corpus_folder(data: DataConfig, tokenizer: TokenizerConfig) -> Path:
    """Where the prepared form of `data.sources` lies: a readable name, and a hash of all that decides its content.

    A pure function of the settings, so that starting a run does not take longer with more text: a text that changes
    behind the same path leads to the same folder, and `ensure_prepared` warns where it can tell.
    """
    identity = {
        "sources": [_settings(source) for source in data.sources],
        "tokenizer": asdict(tokenizer) if tokenizer.path is None else {"path": str(Path(tokenizer.path).absolute())},
        "heldout_fraction": data.heldout_fraction,
        "shard_tokens": data.shard_tokens,
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    names = "+".join(Path(source.path).stem or source.format for source in data.sources)
    readable = re.sub(r"[^A-Za-z0-9._+-]+", "-", names).strip(".-")[:48] or "text"
    return Path(data.corpora_dir) / f"{readable}-{digest}"


def _settings(source: SourceConfig) -> dict[str, object]:
    """What decides a source's text. A relative path means another text in another working directory."""
    settings = {key: value for key, value in asdict(source).items() if key not in ("name", "weight", "licence")}
    if source.path and source.format != "huggingface":
        settings["path"] = str(Path(source.path).absolute())
    return settings


def ensure_prepared(data: DataConfig, tokenizer: TokenizerConfig, progress: Progress | None = None) -> Path:
    """The folder of the prepared `data.sources`; prepared now if it is not there. Safe to call from many processes.

    What is there is used, even if the text has changed or gone since, so that a run goes on with what it began with; a
    file or folder changed later than it was prepared is warned of.
    """
    folder = corpus_folder(data, tokenizer)
    if _finished(folder):
        _warn_of_newer_inputs([*(source.path for source in data.sources), tokenizer.path or ""], folder)
    else:
        _prepare_locked(data, tokenizer, folder, progress, keep=True)
    return folder


def _warn_of_newer_inputs(paths: list[str], folder: Path) -> None:
    prepared_ns = (folder / "train" / MANIFEST).stat().st_mtime_ns
    for path in map(Path, filter(None, paths)):
        if path.exists() and path.stat().st_mtime_ns > prepared_ns:
            _log.warning("%s changed after it was prepared: remove %s to take up the change", path, folder)


def prepare(data: DataConfig, tokenizer: TokenizerConfig, target: Path, progress: Progress | None = None) -> Prepared:
    """Prepare `data.sources` into `target`, which must not exist yet (or be empty).

    Raises UserError where sources, tokenizer settings, disk or target do not allow it, and whatever `progress` raises
    to stop it; nothing is left behind then.
    `tokenizer.path`, where set, is taken as it is, and `tokenizer.vocab_size` is not looked at.
    """
    _prepare_locked(data, tokenizer, target, progress, keep=False)
    return Prepared(target, read_manifest(target, "train"), read_manifest(target, "heldout"))


def _finished(folder: Path) -> bool:
    return all((folder / split / MANIFEST).is_file() for split in SPLITS)


def _prepare_locked(
    data: DataConfig, tokenizer: TokenizerConfig, target: Path, progress: Progress | None, keep: bool
) -> None:
    report = progress or (lambda event: None)
    lock = FileLock(target.parent / f".{target.name}.lock")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        free = lock.acquire(blocking=False)
    except OSError as error:  # read-only, not permitted, a file in the way
        raise UserError(
            f"{target.parent}: cannot write there ({error.strerror})\n"
            "set data.corpora_dir (or target) to a folder that you may write to"
        ) from error
    while not free:  # asked again and again, so that `report` can stop the wait
        report(ProgressEvent("wait"))
        time.sleep(_LOCK_POLL_S)
        free = lock.acquire(blocking=False)
    try:
        if keep and _finished(target):
            return
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise UserError(
                f"{target}: exists already{' (prepared text)' if _finished(target) else ''}\n"
                "choose another target, or remove it first"
            )
        work = target.parent / f".{target.name}.partial"
        shutil.rmtree(work, ignore_errors=True)  # of a process that was killed
        with _removed_on_failure(work, target):
            work.mkdir()
            _prepare(data, tokenizer, work, report)
            if target.exists():
                target.rmdir()
            work.rename(target)
            fsync_folder(target.parent)
    finally:
        lock.release()


@contextmanager
def _removed_on_failure(work: Path, target: Path) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        shutil.rmtree(work, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in _NO_SPACE:
            raise UserError(
                f"{target.parent}: no space left on the disk while preparing {target.name}\n"
                "free some space, or set data.corpora_dir (or target) to a folder on a larger disk"
            ) from error
        raise


def _prepare(data: DataConfig, settings: TokenizerConfig, work: Path, report: Progress) -> None:
    parts = _parts(data)
    report(ProgressEvent("tokenizer", parts=len(parts)))
    tokenizer = _tokenizer(data, settings, parts, work / TOKENIZER)
    spill = work / "spill"
    spill.mkdir()
    recipe = Recipe(work / TOKENIZER, tokenizer.sha256, data.heldout_fraction, spill)
    results: list[Tokenised] = []
    tokens = 0
    with ExitStack() as stack:
        writers = {split: stack.enter_context(_writer(work / split, tokenizer, data.shard_tokens)) for split in SPLITS}
        for number, result in stack.enter_context(closing(tokenise_all(parts, recipe, data.workers or usable_cores()))):
            for split in SPLITS:
                _move_spill(spill, number, split, writers[split])
            results.append(result)
            tokens += result.train.tokens + result.heldout.tokens
            report(ProgressEvent("tokenise", parts_done=len(results), parts=len(parts), tokens=tokens))
        _refuse_empty(results, data.heldout_fraction)
        shards = {split: writers[split].finish() for split in SPLITS}
    spill.rmdir()
    for split in SPLITS:
        records = tuple(
            PartRecord(
                name=part.name,
                source=_origin(part),
                licence=part.licence,
                version=part.version,
                source_name=part.source.name or "",
                **asdict(_of(result, split)),
            )
            for part, result in zip(parts, results, strict=True)
        )
        Manifest(
            split=split,
            tokenizer_sha256=tokenizer.sha256,
            vocab_size=tokenizer.vocab_size,
            end_of_text=tokenizer.end_of_text,
            dtype=token_dtype(tokenizer.vocab_size).str,
            tokens=sum(record.tokens for record in records),
            documents=sum(record.documents for record in records),
            text_bytes=sum(record.text_bytes for record in records),
            shards=shards[split],
            parts=records,
        ).write(work / split)
    report(ProgressEvent("done", parts_done=len(parts), parts=len(parts), tokens=tokens))


def _parts(data: DataConfig) -> list[Part]:
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
    if data.shard_tokens < 1 or (data.workers is not None and data.workers < 1):
        raise UserError("data.shard_tokens and data.workers must be at least 1\ncorrect them")
    parts = [
        part
        for number, (source, name) in enumerate(zip(data.sources, text_names(data.sources), strict=True))
        for part in find_parts(replace(source, name=name), f"data.sources[{number}]")
    ]
    if not parts:
        raise UserError("data.sources hold no text\nname sources that hold text")
    return parts


def _tokenizer(data: DataConfig, settings: TokenizerConfig, parts: list[Part], target: Path) -> Tokenizer:
    if settings.path is None:
        return train_tokenizer(
            _sample(parts, settings.training_bytes, data.heldout_fraction), settings.vocab_size, target
        )
    tokenizer = Tokenizer.load(Path(settings.path))
    write_bytes_atomically(target, Path(settings.path).read_bytes())
    return tokenizer


def _sample(parts: list[Part], budget_bytes: int, heldout_fraction: float) -> Iterator[str]:
    """Training text for the tokenizer: each part's first documents, as its size allows; nothing held out."""
    total = sum(max(part.input_bytes, 1) for part in parts)
    for part in parts:
        left = max(1, budget_bytes * max(part.input_bytes, 1) // total)
        for document in read_part(part):
            if is_heldout(identity_hash(document.identity), heldout_fraction):
                continue
            text = document.text[:left]
            yield text
            left -= len(text.encode())
            if left <= 0:
                break


def _writer(folder: Path, tokenizer: Tokenizer, shard_tokens: int) -> ShardWriter:
    folder.mkdir()
    return ShardWriter(folder, token_dtype(tokenizer.vocab_size), shard_tokens)


def _move_spill(spill: Path, number: int, split: Split, writer: ShardWriter) -> None:
    """Append a part's documents to the shards and remove its spilled files."""
    token_path, end_path = spill_paths(spill, number, split)
    with token_path.open("rb") as tokens, end_path.open("rb") as ends:
        before = np.uint64(0)
        while block := ends.read(_ENDS_AT_ONCE * END_DTYPE.itemsize):
            absolute = np.frombuffer(block, dtype=END_DTYPE)
            writer.append(tokens, absolute - before)
            before = absolute[-1]
    token_path.unlink()
    end_path.unlink()


def _origin(part: Part) -> str:
    return part.format if part.source.format == "auto" else part.source.format


def _of(result: Tokenised, split: Split) -> Counts:
    return result.train if split == "train" else result.heldout


def _refuse_empty(results: list[Tokenised], heldout_fraction: float) -> None:
    trained = sum(result.train.documents for result in results)
    held_out = sum(result.heldout.documents for result in results)
    if trained and held_out:
        return
    if not trained and not held_out:
        raise UserError("data.sources hold no text: every document is empty\nname sources that hold text")
    if trained == 1:
        raise UserError(
            "data.sources hold one document, and one has to be held out for evaluation\n"
            "cut the text into several files, or into lines of a .jsonl file"
        )
    if not held_out:
        enough = (min(result.smallest_hash for result in results) + 1) / HASH_RANGE
        raise UserError(
            f"data.heldout_fraction={heldout_fraction} holds out none of the {trained} documents\n"
            f"set data.heldout_fraction={_rounded_up(enough)} or more, or name more text"
        )
    raise UserError(
        f"data.heldout_fraction={heldout_fraction} holds out all of the {held_out} documents\n"
        "set it lower, or name more text"
    )


def _rounded_up(fraction: float) -> str:
    """Three significant digits, never below `fraction`."""
    step = 10.0 ** (np.floor(np.log10(fraction)) - 2)
    return f"{np.ceil(fraction / step) * step:.3g}"
