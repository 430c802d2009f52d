"""Many reads of files in one call of the kernel: a thread that reads rows lets go of the interpreter once, not at each
of them, so that another, which feeds the device, is not held up.

It is Linux's io_submit(2), by its number, as no library has it that comes with Python. What is read by way of the page
cache is there when the call returns, and so are its results. Where the kernel does not offer it, or a container forbids
it, the reads are made one by one, to the same effect.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import sys
import threading
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from gptscale.data.order import Ints

MOST_AT_ONCE = 256
"""Reads of one call. They count against the machine's fs.aio-max-nr, 65,536 mostly."""

Bytes = npt.NDArray[np.uint8]

_NUMBERS = {
    "x86_64": {"io_setup": 206, "io_destroy": 207, "io_getevents": 208, "io_submit": 209},
    "aarch64": {"io_setup": 0, "io_destroy": 1, "io_submit": 2, "io_getevents": 4},
}
"""Of system calls, by machine."""
_REQUEST = np.dtype(
    [
        ("number", "<u8"),
        ("key_and_flags", "<u8"),
        ("opcode", "<u2"),  # 0 reads
        ("priority", "<i2"),
        ("descriptor", "<u4"),
        ("target", "<u8"),
        ("size", "<u8"),
        ("offset", "<i8"),
        ("reserved", "<u8", (2,)),
    ]
)
"""`struct iocb` of linux/aio_abi.h."""
_RESULT = np.dtype([("number", "<u8"), ("request", "<u8"), ("read", "<i8"), ("more", "<i8")])
"""`struct io_event`."""


def read_rows(descriptors: Sequence[int], offsets: Ints, sizes: Ints, out_NB: Bytes) -> Ints:
    """Read `sizes[n]` bytes from byte `offsets[n]` of each of N files into the beginning of row n of `out_NB`, which is
    contiguous. Returns how many there were [N]: fewer where a file ends. Raises OSError."""
    queue = _queue()
    read = np.zeros(len(sizes), dtype=np.int64)
    if queue is not None:
        for first in range(0, len(sizes), MOST_AT_ONCE):
            some = slice(first, first + MOST_AT_ONCE)
            read[some] = queue.read(descriptors[some], offsets[some], sizes[some], out_NB[some])
    for row in np.flatnonzero(read < sizes).tolist():  # all of them, or one to be told of: by its error, or none
        target = out_NB[row, : sizes[row]].data
        read[row] = os.preadv(descriptors[row], [target], int(offsets[row]))
    return read


def reads_at_once() -> bool:
    """Whether the kernel takes many at once from this process."""
    return _queue() is not None


class _Queue:
    """A queue of the kernel's. Threads take turns."""

    def __init__(self, numbers: dict[str, int]) -> None:
        """Raises OSError where the kernel refuses."""
        self._call = ctypes.CDLL(None, use_errno=True).syscall
        self._call.restype = ctypes.c_long
        self._numbers = {name: ctypes.c_long(number) for name, number in numbers.items()}
        self._lock = threading.Lock()
        self._requests = np.zeros(MOST_AT_ONCE, _REQUEST)
        self._requests["number"] = np.arange(MOST_AT_ONCE)
        places = self._requests.ctypes.data + _REQUEST.itemsize * np.arange(MOST_AT_ONCE)
        self._places = places.astype(np.uint64)
        self._results = np.zeros(MOST_AT_ONCE, _RESULT)
        self._handle = ctypes.c_ulong(0)
        if self._kernel("io_setup", ctypes.c_uint(MOST_AT_ONCE), ctypes.byref(self._handle)) < 0:
            raise OSError(ctypes.get_errno(), "io_setup")

    def read(self, descriptors: Sequence[int], offsets: Ints, sizes: Ints, out_NB: Bytes) -> Ints:
        """As `read_rows`; 0 where the kernel would not read, for whatever reason."""
        count = len(sizes)
        with self._lock:
            asked = self._requests[:count]
            asked["descriptor"] = descriptors
            asked["target"] = out_NB.ctypes.data + np.arange(count) * out_NB.strides[0]
            asked["size"] = sizes
            asked["offset"] = offsets
            began = 0
            try:
                began = max(0, self._kernel("io_submit", self._handle, ctypes.c_long(count), _at(self._places)))
                results = self._finished(began).copy()
            except BaseException:  # a signal's: nothing may be left in the queue, nor be written to `out_NB` later
                self._kernel("io_destroy", self._handle)
                _queue.cache_clear()
                raise
        read = np.zeros(count, dtype=np.int64)
        read[results["number"].astype(np.int64)] = np.maximum(results["read"], 0)
        return read

    def _finished(self, count: int) -> npt.NDArray[Any]:
        """The results of `count` reads that began."""
        found = 0
        while found < count:
            left = ctypes.c_long(count - found)
            got = self._kernel("io_getevents", self._handle, left, left, _at(self._results[found:]), None)
            if got < 0 and ctypes.get_errno() != errno.EINTR:
                raise OSError(ctypes.get_errno(), "io_getevents")
            found += max(0, got)
        return self._results[:count]

    def _kernel(self, name: str, *arguments: Any) -> int:
        answer: int = self._call(self._numbers[name], *arguments)
        return answer


@lru_cache(maxsize=1)
def _queue() -> _Queue | None:
    """This process's; None where there is none to be had."""
    numbers = _NUMBERS.get(platform.machine())
    if sys.platform != "linux" or numbers is None or sys.maxsize < 1 << 32:
        return None
    try:
        return _Queue(numbers)
    except OSError:
        return None


os.register_at_fork(after_in_child=_queue.cache_clear)  # a queue is of one process


def _at(values: npt.NDArray[Any]) -> ctypes.c_void_p:
    return ctypes.c_void_p(values.ctypes.data)
