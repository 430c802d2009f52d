"""Run tokenising tasks in processes."""

from __future__ import annotations

import multiprocessing
import sys
import types
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice

from gptscale.data.sources import Part
from gptscale.data.spill import Recipe, SpilledPart
from gptscale.data.tokenise import start_worker, tokenise_part
from gptscale.runtime.errors import UserError
from gptscale.runtime.registry import loaded_plugins

_INLINE_BYTES = 1 << 20
_AHEAD = 2
"""Parts begun or waiting for each worker: one waiting, so that none pauses between two."""


def tokenise_all(parts: Mapping[str, Part], recipe: Recipe, workers: int) -> Generator[tuple[str, SpilledPart]]:
    """Tokenise parts, given by their keys, into the spill folder; yield each one's key and record as it is finished.

    Closing the generator stops the processes.
    """
    workers = min(workers, len(parts))
    if workers <= 1 or sum(part.input_bytes for part in parts.values()) < _INLINE_BYTES:
        for key, part in parts.items():
            yield key, tokenise_part(part, key, recipe)
        return
    # The largest first, so that none is begun last and keeps the others waiting.
    ordered = iter(sorted(parts.items(), key=lambda one: -one[1].input_bytes))
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker, initargs=(stop, loaded_plugins()))
    running: dict[Future[SpilledPart], str] = {}
    try:
        while True:
            for key, part in islice(ordered, _AHEAD * workers - len(running)):
                with _no_main_module():
                    running[pool.submit(tokenise_part, part, key, recipe)] = key
            if not running:
                return
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield running.pop(future), future.result()
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
