"""Atomic writes: all or nothing, with real files and real limits."""

from __future__ import annotations

import errno
import os
import resource
import signal
from pathlib import Path

import pytest

from gptscale.runtime.files import write_bytes_atomically


def test_writes_and_replaces(tmp_path: Path) -> None:
    target = tmp_path / "manifest.json"
    write_bytes_atomically(target, b"old")
    write_bytes_atomically(target, b"new" * 100_000)
    assert target.read_bytes() == b"new" * 100_000
    assert os.listdir(tmp_path) == ["manifest.json"]


def test_mode_follows_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_bytes_atomically(tmp_path / "file", b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_a_failed_write_leaves_the_old_content_and_no_rubbish(tmp_path: Path) -> None:
    target = tmp_path / "file"
    write_bytes_atomically(target, b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
            write_bytes_atomically(target, b"x" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_failed_rename_leaves_no_rubbish(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(IsADirectoryError):
        write_bytes_atomically(tmp_path / "taken", b"x")
    assert os.listdir(tmp_path) == ["taken"]


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_bytes_atomically(tmp_path / "none" / "file", b"x")
