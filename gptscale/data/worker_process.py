"""What a process that prepares text is told, to stop and that its parent has died; and what it tells: how far it is.

Imported in spawned processes: no torch here, nor in anything this imports.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import parent_process
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Event
from typing import TypeVar

from gptscale.runtime.registry import load_plugins


class StopAskedError(Exception):
    """The process that started this worker is giving up."""


_stop: Event | None = None
_in_flight: Synchronized[int] | None = None
_tell: Callable[[int], None] | None = None
Job = TypeVar("Job")
Result = TypeVar("Result")


def start_worker(stop: Event, in_flight: Synchronized[int], plugins: tuple[str, ...]) -> None:
    """Initialise a worker process: it obeys `stop` in time, and ends with its parent, however that died.

    `in_flight` is where all workers add up how much of jobs that are not finished was read. `plugins` register the
    sources that this process may be asked to read.
    """
    global _stop, _in_flight
    _stop, _in_flight = stop, in_flight
    os.environ["USE_TORCH"] = "0"  # or `datasets` imports torch, for tensors that nobody here wants
    parent = parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True, name="end with parent").start()
    load_plugins(plugins)


def check_stop() -> None:
    """Raises StopAskedError in a worker whose work nobody wants any more. To be called often."""
    if _stop is not None and _stop.is_set():
        raise StopAskedError


def note_read(count: int) -> None:
    """So many more bytes of the input of the job at work were read. To be called now and then; nothing rests on it but
    what is shown of progress."""
    if _tell is not None:
        _tell(count)


@contextmanager
def told_of_reading(tell: Callable[[int], None]) -> Iterator[None]:
    """Call `tell` for every `note_read`."""
    global _tell
    before, _tell = _tell, tell
    try:
        yield
    finally:
        _tell = before


def work(function: Callable[[Job], Result], job: Job) -> Result:
    """What `function` returns for a job, in a worker process. What it reads counts as in flight until it is done."""
    in_flight, read = _in_flight, 0
    assert in_flight is not None

    def tell(count: int) -> None:
        nonlocal read
        read += count
        with in_flight.get_lock():
            in_flight.value += count

    try:
        with told_of_reading(tell):
            return function(job)
    finally:
        with in_flight.get_lock():
            in_flight.value -= read
