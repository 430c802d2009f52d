"""Raw text to a prepared folder that either is complete or does not exist, whatever stops the process.

What is finished of it lies in a hidden folder beside the target, and a rerun does only what is missing. Several jobs
may tokenise into that folder at once. The same inputs give the same shards on any number of workers and jobs: parts are
fixed by the sources alone and joined in order.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from gptscale.config.schema import DataConfig, FilterConfig, PrepareConfig, SourceConfig, TokenizerConfig
from gptscale.data.corpus import read_manifest
from gptscale.data.preparation import Preparation, Progress, ProgressEvent
from gptscale.data.shards import MANIFEST, SPLITS, Manifest
from gptscale.data.store import is_remote
from gptscale.runtime.errors import UserError
from gptscale.runtime.files import fsync_folder
from gptscale.runtime.locks import FileLock

__all__ = ["Prepared", "Progress", "ProgressEvent", "corpus_folder", "ensure_prepared", "prepare", "prepare_task"]

_log = logging.getLogger(__name__)
_LOCK_POLL_S = 0.2
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT}


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
    identity: dict[str, object] = {
        "sources": [_settings(source) for source in data.sources],
        "tokenizer": asdict(tokenizer) if tokenizer.path is None else {"path": str(Path(tokenizer.path).absolute())},
        "heldout_fraction": data.heldout_fraction,
        "shard_tokens": data.shard_tokens,
    }
    if data.filters != FilterConfig():
        identity["filters"] = asdict(data.filters)
    if data.shuffle_documents:
        identity["shuffle_documents"] = True
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    names = "+".join(Path(source.path).stem or source.format for source in data.sources)
    readable = re.sub(r"[^A-Za-z0-9._+-]+", "-", names).strip(".-")[:48] or "text"
    return Path(data.corpora_dir) / f"{readable}-{digest}"


def _settings(source: SourceConfig) -> dict[str, object]:
    """What decides a source's text. A relative path means another text in another working directory."""
    settings = {key: value for key, value in asdict(source).items() if key not in ("name", "weight", "licence")}
    for key in (
        "token_dtype",
        "end_of_text",
        "fim_rate",
        "fim_spm_rate",
    ):  # a setting that came later must not rename what was prepared before
        if settings[key] == getattr(SourceConfig, key):
            del settings[key]
    if source.path and source.format != "huggingface" and not is_remote(source.path):
        settings["path"] = str(Path(source.path).absolute())
    return settings


def ensure_prepared(
    data: DataConfig, tokenizer: TokenizerConfig, progress: Progress | None = None, merge_only: bool = False
) -> Path:
    """The folder of the prepared `data.sources`; prepared now if it is not there. Safe to call from many processes.

    What is there is used, even if the text has changed or gone since, so that a run goes on with what it began with; a
    file or folder changed later than it was prepared is warned of.
    """
    folder = corpus_folder(data, tokenizer)
    if _finished(folder) and not _partial(folder).exists():
        _warn_of_newer_inputs([*(source.path for source in data.sources), tokenizer.path or ""], folder)
    else:
        _prepare(data, tokenizer, folder, progress, keep=True, merge_only=merge_only)
    return folder


def _warn_of_newer_inputs(paths: list[str], folder: Path) -> None:
    prepared_ns = (folder / "train" / MANIFEST).stat().st_mtime_ns
    for path in map(Path, filter(None, paths)):
        if path.exists() and path.stat().st_mtime_ns > prepared_ns:
            _log.warning("%s changed after it was prepared: remove %s to take up the change", path, folder)


def prepare(
    data: DataConfig,
    tokenizer: TokenizerConfig,
    target: Path,
    progress: Progress | None = None,
    merge_only: bool = False,
) -> Prepared:
    """Prepare `data.sources` into `target`, which must not exist yet (or be empty).

    Raises UserError where sources, tokenizer settings, disk or target do not allow it, and whatever `progress` raises
    to stop it; parts that are finished by then are kept in `.NAME.partial` beside the target, for the next time.
    `tokenizer.path`, where set, is taken as it is, and `tokenizer.vocab_size` is not looked at. With `merge_only`
    tokenised parts that are missing are an error, too.
    """
    _prepare(data, tokenizer, target, progress, keep=False, merge_only=merge_only)
    return Prepared(target, read_manifest(target, "train"), read_manifest(target, "heldout"))


def prepare_task(
    data: DataConfig,
    tokenizer: TokenizerConfig,
    target: Path,
    jobs: PrepareConfig,
    progress: Progress | None = None,
) -> int:
    """Tokenise the parts that are `jobs.task`'s, while other tasks do theirs; the number of parts that it had.

    They are kept for `prepare`, which merges them into `target` when all tasks have ended.
    """
    assert jobs.task is not None
    report = progress or (lambda event: None)
    with _locked(target, report, shared=True):
        if _finished(target):
            return 0
        _refuse_used(target)
        work = _partial(target)
        with (
            _full_disk_explained(target, work),
            _locked(work / f"task-{jobs.task}", report),
            Preparation(data, tokenizer, work, report) as preparation,
        ):
            with _locked(work / "tokenizer", report):
                preparation.find_tokenizer()
            return preparation.tokenise(jobs.task, jobs.tasks)


def _finished(folder: Path) -> bool:
    return all((folder / split / MANIFEST).is_file() for split in SPLITS)


def _partial(target: Path) -> Path:
    """Where the unfinished form of `target` lies."""
    return target.parent / f".{target.name}.partial"


def _prepare(
    data: DataConfig,
    tokenizer: TokenizerConfig,
    target: Path,
    progress: Progress | None,
    keep: bool,
    merge_only: bool,
) -> None:
    report = progress or (lambda event: None)
    with _locked(target, report):
        work = _partial(target)
        if _finished(target):  # whoever did it may have been killed as it cleaned up
            shutil.rmtree(work, ignore_errors=True)
            if keep:
                return
        _refuse_used(target)
        try:
            with _full_disk_explained(target, work):
                with Preparation(data, tokenizer, work, report) as preparation:
                    preparation.find_tokenizer()
                    if not merge_only:
                        preparation.tokenise()
                    finished = preparation.merge()
                if target.exists():
                    target.rmdir()
                finished.rename(target)
                fsync_folder(target.parent)
                shutil.rmtree(work)
        except BaseException:
            if not any((work / "parts").glob("*.json")):  # nothing worth keeping
                shutil.rmtree(work, ignore_errors=True)
            raise


def _refuse_used(target: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(
            f"{target}: exists already{' (prepared text)' if _finished(target) else ''}\n"
            "choose another target, or remove it first"
        )


@contextmanager
def _locked(path: Path, report: Progress, shared: bool = False) -> Iterator[None]:
    """Hold the lock beside `path`, alone or with others that share it. Makes the folder that `path` lies in."""
    lock = FileLock(path.parent / f".{path.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        free = lock.acquire(blocking=False, shared=shared)
    except OSError as error:  # read-only, not permitted, a file in the way
        raise UserError(
            f"{path.parent}: cannot write there ({error.strerror})\n"
            "set data.corpora_dir (or target) to a folder that you may write to"
        ) from error
    while not free:  # asked again and again, so that `report` can stop the wait
        report(ProgressEvent("wait"))
        time.sleep(_LOCK_POLL_S)
        free = lock.acquire(blocking=False, shared=shared)
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _full_disk_explained(target: Path, work: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_SPACE:
            raise
        raise UserError(
            f"{target.parent}: no space left on the disk while preparing {target.name} (it needs the tokens twice)\n"
            f"free some space and start again, or set data.corpora_dir (or target) to a larger disk and remove {work}"
        ) from error
