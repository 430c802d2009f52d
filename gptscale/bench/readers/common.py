"""What a reader under measurement is, and what is measured of it.

Shape legend: B rows of a batch, T tokens of a sequence.
"""

from __future__ import annotations

import gc
import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

COMPARED_BATCHES = 8
"""After the resume position: their ids are compared."""
LEAST_TIMED_S = 1.0
"""A pass takes no less: what a process does slowly at first is to decide nothing."""
Batches = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Work:
    """One corpus of token ids and the batches that every reader makes of it."""

    folder: str
    """Of this reader alone, where it keeps the corpus in its own format."""
    ids: str
    """A file of uint16 ids, all documents one after the other."""
    ends: str
    """A file of int64: where each document ends, after an `end_of_text`."""
    end_of_text: int
    tokenizer: str
    """A sentencepiece model that has these ids, for those who ask for one."""
    sequence_length: int
    batch: int
    seed: int
    documents: bool = False
    """Also make `cu_seqlens` and positions that restart with each document."""

    @property
    def row(self) -> int:
        """Ids of a row: a sequence, and the target of its last token."""
        return self.sequence_length + 1

    def tokens(self) -> npt.NDArray[np.uint16]:
        return np.memmap(self.ids, np.uint16, mode="r")

    def document_ends(self) -> npt.NDArray[np.int64]:
        return np.fromfile(self.ends, np.int64)


class Reader(Protocol):
    """Batches in a shuffled order: tensors, the first of them int64 ids [B, T+1] or [B, T]."""

    flags: str
    """How it is set up, for whoever reads the report."""

    def __init__(self, work: Work, state: Any) -> None:
        """Open what `build` made; go on from `state` unless that is None."""
        ...

    def __iter__(self) -> Iterator[Batches]: ...

    def state(self) -> Any:
        """All that a new process needs to go on after the batches that were taken. Can be pickled."""
        ...


class Module(Protocol):
    """What each module of this package offers."""

    Reader: type[Reader]

    def build(self, work: Work) -> None:
        """Write the corpus in the reader's format."""
        ...

    def order(self, samples: int) -> object:
        """All that has to be held to read so many samples in a random order."""
        ...


@dataclass(frozen=True)
class Pass:
    """A fresh process that reads the corpus, as often as it takes for `LEAST_TIMED_S`."""

    flags: str
    first_batch_s: float
    """From nothing imported but torch and numpy to the first batch."""
    opened_s: float
    """The same from the reader's libraries imported."""
    tokens: int
    """Of the batches that were timed; inputs, not targets. The first of each reading is not, nor are those compared."""
    wall_s: float
    cpu_s: float
    """Of all threads and child processes of the process, in `wall_s`."""
    resident_bytes: int
    """At the end, beyond what torch and numpy took."""
    digest: str
    """Of the ids of some batches after the resume position."""


@dataclass(frozen=True)
class Resumed:
    """A fresh process that goes on in the middle."""

    first_batch_s: float
    opened_s: float
    digest: str


@dataclass(frozen=True)
class Ordered:
    samples: int
    wall_s: float
    peak_bytes: int
    """Most memory beyond what was resident before."""


ReaderOf = Callable[[], type[Reader]]
"""Imports a reader's module, and with it the libraries that it needs."""


@dataclass
class _Timed:
    """Batches that were taken by the clock."""

    batches: int = 0
    wall_s: float = 0.0
    cpu_s: float = 0.0

    def take(self, source: Iterator[Batches], count: int) -> None:
        began_s, began_cpu_s = time.perf_counter(), cpu_seconds()
        for _ in range(count):
            next(source)
        self.wall_s += time.perf_counter() - began_s
        self.cpu_s += cpu_seconds() - began_cpu_s
        self.batches += count


def run_pass(reader_of: ReaderOf, work: Work, batches: int, resume_at: int) -> tuple[Pass, Any]:
    """Read `batches` batches, again and again if that is soon done; the state after the first `resume_at` of them is
    returned too."""
    before = resident_bytes()
    began_s = time.perf_counter()
    make = reader_of()
    imported_s = time.perf_counter()
    reader = make(work, None)
    source = iter(reader)
    next(source)
    first_s = time.perf_counter()
    timed = _Timed()
    timed.take(source, resume_at - 1)
    state = reader.state()
    compared = digest(islice(source, COMPARED_BATCHES))
    timed.take(source, batches - resume_at - COMPARED_BATCHES)
    while timed.wall_s < LEAST_TIMED_S:
        del source  # which ends its threads
        source = iter(reader)  # whoever has no end goes on, others begin anew
        next(source)
        timed.take(source, batches - 1)
    gc.collect()
    resident = resident_bytes() - before
    return Pass(
        flags=reader.flags,
        first_batch_s=first_s - began_s,
        opened_s=first_s - imported_s,
        tokens=timed.batches * work.batch * work.sequence_length,
        wall_s=timed.wall_s,
        cpu_s=timed.cpu_s,
        resident_bytes=resident,
        digest=compared,
    ), state


def run_resume(reader_of: ReaderOf, work: Work, state: Any) -> Resumed:
    began_s = time.perf_counter()
    make = reader_of()
    imported_s = time.perf_counter()
    source = iter(make(work, state))
    first = next(source)
    first_s = time.perf_counter()
    return Resumed(
        first_s - began_s, first_s - imported_s, digest(chain([first], islice(source, COMPARED_BATCHES - 1)))
    )


def run_order(module: Module, samples: int) -> Ordered:
    gc.collect()
    before = reset_peak()
    began_s = time.perf_counter()
    kept = module.order(samples)
    wall_s = time.perf_counter() - began_s
    peak = peak_resident_bytes()
    del kept
    return Ordered(samples, wall_s, max(0, peak - before))


def digest(batches: Iterable[Batches]) -> str:
    """Of the ids alone, without the last of a row where there are targets of their own."""
    found = hashlib.sha256()
    for batch in batches:
        found.update(np.ascontiguousarray(batch[0].numpy(), np.int64).data)
    return found.hexdigest()


def cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def resident_bytes() -> int:
    return _status("VmRSS")


def peak_resident_bytes() -> int:
    return _status("VmHWM")


def reset_peak() -> int:
    """Forget the largest resident size so far, and say what it is now."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident_bytes()


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")
