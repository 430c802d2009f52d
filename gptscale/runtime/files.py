"""Files that are either wholly there or not there at all, whatever kills the process or the machine."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def write_bytes_atomically(path: Path, data: bytes) -> None:
    """Replace `path` by `data`: a reader, and a machine that loses power, sees the old content or the new, never a mix.

    The bytes reach the disk before the name does. On any failure the temporary file is removed, `path` is untouched and
    the error (OSError: no space, read-only, …) goes to the caller. Missing folders are the caller's to create.
    """
    temporary = path.parent / f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
    # Mode 0666 less the umask, like any other file of the run; tempfile's 0600 would hide it from colleagues.
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def fsync_folder(path: Path) -> None:
    """Make the names in a folder durable: without this a renamed file can vanish with the power."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
