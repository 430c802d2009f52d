"""A lock between processes that the kernel holds, so that a dead owner holds nothing."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from pathlib import Path
from types import TracebackType

from gptscale.runtime.errors import UserError

_NO_LOCKS_HERE = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK}


class FileLock:
    """A lock on a file (flock), which stays behind, empty, when the lock is released.

    It is never removed: removing it would let a second process lock a new file of the same name while a third still
    waits on the old one. The lock ends with its owner, however that died; started programs do not inherit it (close on
    exec) and neither do forked children.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None

    def acquire(self, blocking: bool, shared: bool = False) -> bool:
        """Take the lock; with `blocking` wait for it. False: somebody else has it (see `owner`).

        Any number of processes may have it `shared`, and then nobody has it for himself.

        Raises UserError where the file system cannot lock (Lustre mounted without `flock`, for one).
        """
        assert self._descriptor is None, f"{self.path} is already locked by this object"
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
            fcntl.flock(descriptor, kind | (0 if blocking else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(descriptor)
            return False
        except OSError as error:
            os.close(descriptor)
            if error.errno in _NO_LOCKS_HERE:
                raise UserError(
                    f"{self.path}: this file system has no file locks ({error.strerror})\n"
                    "use a folder on another file system, or mount this one with locks (Lustre: -o flock)"
                ) from error
            raise
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        _held.add(self)
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        return True

    def release(self) -> None:
        """Give the lock back; without one, do nothing."""
        if self._descriptor is None:
            return
        os.ftruncate(self._descriptor, 0)
        # Closing is not enough while a child forked a moment ago still has the descriptor.
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        self._forget()

    def owner(self) -> str:
        """Who wrote himself into the file, for messages: "process 123 on host", or "another process"."""
        try:
            return self.path.read_text().strip() or "another process"
        except FileNotFoundError:
            return "another process"

    def _forget(self) -> None:
        """Close without a word in the file: in a forked child the lock itself stays with the parent."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
            _held.discard(self)

    def __enter__(self) -> FileLock:
        self.acquire(blocking=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


_held: set[FileLock] = set()


def _forget_all() -> None:
    for lock in list(_held):
        lock._forget()


os.register_at_fork(after_in_child=_forget_all)
