"""Shards from a store on this host's disk: each fetched once, shared by all processes and runs, and bounded in size.

    <cache>/<xxh3-128>.npy           a shard, checked; named by its content, so that equal shards are one
    <cache>/<xxh3-128>.lock          held by whoever fetches it
    <cache>/<xxh3-128>.<…>.part      on its way; of its full size from the start, so that it counts
    <cache>/<sha256>-tokenizer.model tokenizers; small, they stay and do not count
    <cache>/lock                     held for a moment by whoever makes room

Whoever uses a shard, or writes a `.part`, has a shared kernel lock on the file itself, so a file that can be locked
exclusively is of nobody alive: a shard that may be evicted, or what a killed process left. Nobody waits for room while
he uses a shard, so there is no deadlock; the price: where all is in use the limit gives way, by a shard a process.

Locks are flock's: the folder belongs on a local disk, or on a network file system that locks across hosts.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gptscale.data.shards import file_xxh3_128
from gptscale.data.transfer import Check, Patience, RemoteStore, go_on
from gptscale.runtime.errors import UserError
from gptscale.runtime.locks import FileLock

_POLL_S = 0.05
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT}


@dataclass(frozen=True)
class Wanted:
    """A shard's file in a store, as its manifest records it."""

    store: RemoteStore
    name: str
    """Below the store's address."""
    size: int
    digest: str
    """xxh3-128."""

    @property
    def url(self) -> str:
        return self.store.url(self.name)


class ShardCache:
    """The shards in a folder, as one process uses them. Any thread may."""

    def __init__(
        self,
        folder: Path,
        limit_bytes: int | None = None,
        verify: bool = False,
        patience: Patience | None = None,
        check: Check = go_on,
    ) -> None:
        """`limit_bytes`: of all shards together; None is no limit. With `verify` a shard that is there already is read
        and checked before its first use. `check` is asked while anything is waited for, and raises to end that.

        Raises UserError where the folder cannot be written to or locked.
        """
        self.folder = folder
        self.limit_bytes = limit_bytes
        self.patience = patience or Patience()
        self.check = check
        self.verify = verify
        """Whether everything is checked before its first use that can be."""
        self._verified: set[str] = set()
        self._beyond_limit = threading.Lock()
        self._forced: set[int] = set()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with self._making_room():
                pass
        except OSError as error:
            raise UserError(
                f"{folder}: cannot write there ({error.strerror})\nset data.cache_dir to a folder that you may write to"
            ) from error

    def path(self, digest: str) -> Path:
        return self.folder / f"{digest}.npy"

    def hold(self, wanted: Wanted, check: Check = go_on) -> int:
        """A descriptor of the shard's file, fetched if it has to be; nobody evicts it until `release`.

        A thread that holds one shard must not ask for another. Raises UserError, and what `check` does.
        """

        def checks() -> None:
            self.check()
            check()

        while True:
            descriptor = self._open(wanted)
            if descriptor is not None:
                return descriptor
            with self._turn(wanted, checks) as mine:
                if mine:
                    descriptor = self._open(wanted)  # whoever had the turn before may have brought it
                    return self._fetch_anyway(wanted, checks) if descriptor is None else descriptor

    def release(self, descriptor: int) -> None:
        forced = descriptor in self._forced
        self._forced.discard(descriptor)
        os.close(descriptor)
        if forced:
            self._beyond_limit.release()

    def fetch_ahead(self, wanted: Wanted, check: Check = go_on) -> bool:
        """Have the shard on the disk, or on its way, without using it; False where that would need room in use.

        Raises UserError, and what `check` does.
        """
        lock, path = FileLock(self._lock_path(wanted)), self.path(wanted.digest)
        if path.exists():
            _touch(path)
            return True
        if not lock.acquire(blocking=False):
            return True
        try:
            if not path.exists():
                descriptor = self._fetch(wanted, check, force=False)
                if descriptor is None:
                    return False
                os.close(descriptor)
        finally:
            lock.release()
        return True

    def _open(self, wanted: Wanted) -> int | None:
        """A locked descriptor of the file; None where it is not there, or what is there is not right (and now gone)."""
        path = self.path(wanted.digest)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        fcntl.flock(descriptor, fcntl.LOCK_SH)  # whoever evicts has it for a moment only
        found = os.fstat(descriptor)
        if found.st_nlink == 0:  # evicted between the two lines
            os.close(descriptor)
            return None
        if found.st_size != wanted.size or not self._is_right(path, wanted):
            self._remove(path, found)
            os.close(descriptor)
            return None
        _touch(descriptor)
        return descriptor

    def _is_right(self, path: Path, wanted: Wanted) -> bool:
        if not self.verify or wanted.digest in self._verified:
            return True
        if file_xxh3_128(path) != wanted.digest:
            return False
        self._verified.add(wanted.digest)
        return True

    def _remove(self, path: Path, found: os.stat_result) -> None:
        """Remove a damaged file, unless another is there by now."""
        with self._making_room(), contextlib.suppress(FileNotFoundError):
            if os.stat(path).st_ino == found.st_ino:
                path.unlink()

    @contextlib.contextmanager
    def _turn(self, wanted: Wanted, check: Check) -> Iterator[bool]:
        """Wait for the turn to fetch this shard; False: it is not needed, the shard is there.

        A process that has its turn and does not get on (it is suspended, say) is not waited for beyond all patience.
        """
        lock = FileLock(self._lock_path(wanted))
        borne_s = 2 * (self.patience.timeout_s + self.patience.longest_wait_s)
        mine = True
        while not lock.acquire(blocking=False):
            check()
            if self.path(wanted.digest).exists():
                mine = False
                break
            if time.time() - max([self._lock_path(wanted).stat().st_mtime, *self._progress(wanted)]) > borne_s:
                break
            time.sleep(_POLL_S)
        try:
            yield mine
        finally:
            lock.release()

    def _progress(self, wanted: Wanted) -> Iterator[float]:
        """When the files that are on the way to this shard were written to last."""
        for part in self.folder.glob(f"{wanted.digest}.*.part"):
            with contextlib.suppress(FileNotFoundError):
                yield part.stat().st_mtime

    def _fetch_anyway(self, wanted: Wanted, check: Check) -> int:
        """Fetch, beyond the limit if it must be, which one thread of a process does at a time."""
        descriptor = self._fetch(wanted, check, force=False)
        if descriptor is not None:
            return descriptor
        while not self._beyond_limit.acquire(timeout=_POLL_S):
            check()
        try:
            descriptor = self._fetch(wanted, check, force=True)
            assert descriptor is not None
        except BaseException:
            self._beyond_limit.release()
            raise
        self._forced.add(descriptor)
        return descriptor

    def _fetch(self, wanted: Wanted, check: Check, force: bool) -> int | None:
        """Bring the shard, and a locked descriptor of it. None: there is no room, without `force`."""
        part = self.folder / f"{wanted.digest}.{os.getpid()}-{secrets.token_hex(4)}.part"
        try:
            with self._making_room():
                if not (self._make_room(wanted.size) or force):
                    return None
                descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
                fcntl.flock(descriptor, fcntl.LOCK_SH)
                os.ftruncate(descriptor, wanted.size)
            try:
                wanted.store.fetch(wanted.name, wanted.size, wanted.digest, part, check)
                os.fsync(descriptor)  # a machine that loses power has the whole file, or none of that name
                os.replace(part, self.path(wanted.digest))
            except BaseException:
                os.close(descriptor)
                part.unlink(missing_ok=True)
                raise
        except OSError as error:
            if error.errno not in _NO_SPACE:
                raise
            raise UserError(
                f"{self.folder}: no space left on the disk for {wanted.url} ({wanted.size:,} bytes)\n"
                "set data.cache_bytes to what the disk has room for, or data.cache_dir to a folder on a larger one"
            ) from error
        self._verified.add(wanted.digest)
        return descriptor

    def _make_room(self, size: int) -> bool:
        """Evict what was used least lately and nobody uses, until `size` bytes more are within the limit."""
        files = []
        for entry in os.scandir(self.folder):
            if entry.name.endswith((".npy", ".part")):
                with contextlib.suppress(FileNotFoundError):
                    files.append((entry.stat().st_mtime, entry.stat().st_size, Path(entry.path)))
        kept = sum(bytes_ for _, bytes_, path in files if not (path.suffix == ".part" and _evict(path)))
        if self.limit_bytes is None:
            return True
        for _, bytes_, path in sorted(files):
            if kept + size <= self.limit_bytes:
                break
            if path.suffix == ".npy" and _evict(path):
                kept -= bytes_
        return kept + size <= self.limit_bytes

    def _making_room(self) -> FileLock:
        return FileLock(self.folder / "lock")

    def _lock_path(self, wanted: Wanted) -> Path:
        return self.folder / f"{wanted.digest}.lock"


def _evict(path: Path) -> bool:
    """Remove a file that nobody uses. Only for whoever makes room: the lock that it takes is in nobody's way then."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except (FileNotFoundError, PermissionError):  # gone, or another user's
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
    except (BlockingIOError, PermissionError):
        return False
    finally:
        os.close(descriptor)
    return True


def _touch(file: int | Path) -> None:
    """It was used, or is about to be. Another user's file keeps its time."""
    with contextlib.suppress(FileNotFoundError, PermissionError):
        os.utime(file)
