"""Run tokenising tasks in processes, and hand back their results in the order of the parts."""

from __future__ import annotations

import multiprocessing
import sys
import types
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

from gptscale.data.sources import Part
from gptscale.data.tokenise import Recipe, Tokenised, start_worker, tokenise_part
from gptscale.runtime.errors import UserError
from gptscale.runtime.registry import loaded_plugins

_INLINE_BYTES = 1 << 20
_AHEAD = 2
"""Parts begun or waiting for each worker: bounds the spilled files, and keeps workers busy behind one slow part."""


def tokenise_all(parts: Sequence[Part], recipe: Recipe, workers: int) -> Generator[tuple[int, Tokenised]]:
    """Tokenise every part; yield (its number, result) in order. The results do not depend on `workers`.

    Closing the generator stops the processes.
    """
    workers = min(workers, len(parts))
    if workers == 1 or sum(part.input_bytes for part in parts) < _INLINE_BYTES:
        for number, part in enumerate(parts):
            yield number, tokenise_part(part, number, recipe)
        return
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker, initargs=(stop, loaded_plugins()))
    waiting: deque[tuple[int, Future[Tokenised]]] = deque()
    try:
        for number, part in enumerate(parts):
            with _no_main_module():
                waiting.append((number, pool.submit(tokenise_part, part, number, recipe)))
            if len(waiting) >= _AHEAD * workers:
                first, future = waiting.popleft()
                yield first, future.result()
        for first, future in waiting:
            yield first, future.result()
    except BrokenProcessPool as error:
        raise UserError(
            "data.workers: a process that tokenised text was killed, most likely for lack of memory\n"
            f"set data.workers below {workers}, or give the job more memory"
        ) from error
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)


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
