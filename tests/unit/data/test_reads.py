"""Many reads in one call of the kernel: the same bytes as one by one, whatever the kernel does."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptscale.data import reads
from gptscale.data.reads import MOST_AT_ONCE, read_rows

SIZE = 1 << 20


@pytest.fixture
def files(tmp_path: Path) -> Iterator[list[int]]:
    generator = np.random.default_rng(0)
    descriptors = []
    for number in range(3):
        path = tmp_path / str(number)
        path.write_bytes(generator.bytes(SIZE))
        descriptors.append(os.open(path, os.O_RDONLY))
    yield descriptors
    for descriptor in descriptors:
        os.close(descriptor)


@pytest.fixture(autouse=True)
def own_queue() -> Iterator[None]:
    """What a test does to the queue is forgotten after it."""
    yield
    reads._queue.cache_clear()


def check(files: list[int], count: int, width: int = 500, seed: int = 0) -> None:
    """Read rows of several sizes and compare them with plain reads."""
    generator = np.random.default_rng(seed)
    descriptors = [files[number] for number in generator.integers(0, len(files), count)]
    offsets = generator.integers(0, SIZE - width, count)
    offsets[::7] = SIZE - generator.integers(0, 2 * width, len(offsets[::7]))  # some end with the file, or before it
    sizes = generator.integers(1, width + 1, count)
    out = np.full((count, width), 7, dtype=np.uint8)
    read = read_rows(descriptors, offsets, sizes, out)
    for row in range(count):
        expected = os.pread(descriptors[row], int(sizes[row]), int(offsets[row]))
        assert read[row] == len(expected)
        assert out[row, : read[row]].tobytes() == expected
        assert (out[row, sizes[row] :] == 7).all(), "nothing beyond what was asked for"


def no_preads(*_: object) -> int:
    raise AssertionError("read one by one")


def test_this_machine_reads_many_at_once(files: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the tests below would not test it."""
    monkeypatch.setattr(reads.os, "preadv", no_preads)
    out = np.empty((300, 100), dtype=np.uint8)
    offsets = np.arange(300, dtype=np.int64) * 1000
    assert (read_rows([files[0]] * 300, offsets, np.full(300, 100), out) == 100).all()
    assert out.tobytes() == b"".join(os.pread(files[0], 100, int(offset)) for offset in offsets)


@pytest.mark.parametrize("count", [0, 1, 5, MOST_AT_ONCE, MOST_AT_ONCE + 1, 3 * MOST_AT_ONCE + 17])
def test_the_bytes_are_those_of_plain_reads(files: list[int], count: int) -> None:
    check(files, count)


def test_without_a_queue_rows_are_read_one_by_one(files: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.ENOSYS, "io_setup")

    monkeypatch.setattr(reads._Queue, "_kernel", refuse)
    reads._queue.cache_clear()
    assert reads._queue() is None
    check(files, 200)


def test_what_the_kernel_does_not_take_is_read_one_by_one(files: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """It may take the first few of what it is given, or none: EAGAIN."""
    kernel, turn = reads._Queue._kernel, iter(range(10_000))

    def takes_few(queue: Any, name: str, *arguments: Any) -> int:
        if name == "io_submit":
            which = next(turn) % 3
            if which == 0:
                return -1
            if which == 1:
                arguments[1].value = min(arguments[1].value, 5)
        return kernel(queue, name, *arguments)

    reads._queue()
    monkeypatch.setattr(reads._Queue, "_kernel", takes_few)
    check(files, 6 * MOST_AT_ONCE)


def test_results_may_come_few_at_a_time(files: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, turn = reads._Queue._kernel, iter(range(10_000))

    def late(queue: Any, name: str, *arguments: Any) -> int:
        if name == "io_getevents":
            if next(turn) % 2:  # a signal came first
                ctypes.set_errno(errno.EINTR)
                return -1
            arguments[1].value = arguments[2].value = min(arguments[1].value, 50)
        return kernel(queue, name, *arguments)

    reads._queue()
    monkeypatch.setattr(reads._Queue, "_kernel", late)
    check(files, 3 * MOST_AT_ONCE)


def test_an_error_of_a_file_is_told_as_of_a_plain_read(files: list[int], tmp_path: Path) -> None:
    folder = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(IsADirectoryError):
            read_rows([files[0], folder], np.zeros(2, np.int64), np.full(2, 10), np.empty((2, 10), np.uint8))
    finally:
        os.close(folder)
    with pytest.raises(OSError, match="Bad file descriptor"):
        read_rows([files[0], 9999], np.zeros(2, np.int64), np.full(2, 10), np.empty((2, 10), np.uint8))
    check(files, 200)  # and it goes on


def test_threads_share_the_queue(files: list[int]) -> None:
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for number in range(25):
                check(files, 150, seed=1000 * seed + number)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_a_forked_process_gets_a_queue_of_its_own(files: list[int]) -> None:
    check(files, 10)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            check(files, 300)
            status = 0 if reads._queue() is not None else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    check(files, 300)


class HandlerError(Exception):
    """Raised by a signal's handler."""


def test_a_signal_between_two_calls_leaves_nothing_behind(files: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads that were begun are over before the arrays that they fill can go away, and their results are not taken for
    those of later ones."""
    kernel = reads._Queue._kernel
    armed = iter([True])

    def interrupted(queue: Any, name: str, *arguments: Any) -> int:
        answer = kernel(queue, name, *arguments)
        if name == "io_submit" and next(armed, False):
            signal.raise_signal(signal.SIGUSR1)
            time.sleep(0)  # the handler has run by now
        return answer

    def handle(*_: object) -> None:
        raise HandlerError

    reads._queue()
    monkeypatch.setattr(reads._Queue, "_kernel", interrupted)
    before: Callable[..., Any] | int | None = signal.signal(signal.SIGUSR1, handle)
    try:
        with pytest.raises(HandlerError):
            check(files, 100)
    finally:
        signal.signal(signal.SIGUSR1, before)
    for seed in range(5):
        check(files, 200, seed=seed)
