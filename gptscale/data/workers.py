"""Processes that share out the work of preparing text."""

from __future__ import annotations

import multiprocessing
import sys
import time
import types
from collections.abc import Callable, Generator, Hashable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar

from gptscale.data.worker_process import start_worker, told_of_reading, work
from gptscale.runtime.errors import UserError
from gptscale.runtime.registry import loaded_plugins

_INLINE_BYTES = 1 << 20
_WATCH_EVERY_S = 1.0
_AHEAD = 2
"""Jobs begun or waiting for each process: one waiting, so that none pauses between two."""

Key = TypeVar("Key", bound=Hashable)
Job = TypeVar("Job")
Result = TypeVar("Result")


class WorkerPool:
    """Up to `workers` processes. They start with the first work that is worth it; `close` ends them."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._processes = 0
        self._pool: ProcessPoolExecutor | None = None

    def run(
        self,
        function: Callable[[Job], Result],
        jobs: Mapping[Key, Job],
        size: Callable[[Job], int],
        watch: Callable[[int], None] = lambda in_flight: None,
    ) -> Generator[tuple[Key, Result]]:
        """What `function`, a module's own, returns for each job, yielded as they are finished. Raises what it does.

        `size` says how many bytes a job reads. Little is done here, in order. `watch` is called about once a second
        with how many bytes of jobs that are not finished were read, as far as `note_read` tells; it may raise.
        """
        count = min(self._workers, len(jobs))
        if count <= 1 or sum(map(size, jobs.values())) < _INLINE_BYTES:
            for key, job in jobs.items():
                with told_of_reading(_now_and_then(watch)):
                    result = function(job)
                yield key, result
            return
        pool = self._started(count)
        # The largest first, so that none is begun last and keeps the others waiting.
        waiting = iter(sorted(jobs.items(), key=lambda one: -size(one[1])))
        running: dict[Future[Result], Key] = {}
        try:
            while True:
                for key, job in islice(waiting, _AHEAD * count - len(running)):
                    with _no_main_module():
                        running[pool.submit(work, function, job)] = key
                if not running:
                    return
                done, _ = wait(running, timeout=_WATCH_EVERY_S, return_when=FIRST_COMPLETED)
                if not done:
                    watch(self._in_flight.value)
                for future in done:
                    yield running.pop(future), future.result()
        except BrokenProcessPool as error:
            raise UserError(
                "data.workers: a process that prepared text was killed, most likely for lack of memory\n"
                f"set data.workers below {count}, or give the job more memory"
            ) from error

    def close(self) -> None:
        if self._pool is not None:
            self._stop.set()
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def _started(self, count: int) -> ProcessPoolExecutor:
        if self._pool is None or self._processes < count:
            self.close()
            context = multiprocessing.get_context("spawn")
            self._stop, self._in_flight = context.Event(), context.Value("q", 0)
            self._processes = count
            self._pool = ProcessPoolExecutor(
                count,
                mp_context=context,
                initializer=start_worker,
                initargs=(self._stop, self._in_flight, loaded_plugins()),
            )
        return self._pool


def _now_and_then(watch: Callable[[int], None]) -> Callable[[int], None]:
    """For `note_read` of one job that is done here."""
    read, called_s = 0, time.monotonic()

    def tell(count: int) -> None:
        nonlocal read, called_s
        read += count
        if time.monotonic() - called_s >= _WATCH_EVERY_S:
            called_s = time.monotonic()
            watch(read)

    return tell


@contextmanager
def _no_main_module() -> Iterator[None]:
    """Hide the program's main module while a worker starts.

    A spawned process imports its parent's main module first. Here that may be the training program, with torch behind
    it, or a user's script without a guard, which would start all over again; the workers need neither.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
