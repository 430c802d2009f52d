"""Shards are fetched before they are needed: the order is a pure function, so that what comes is known."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Iterator

from gptscale.data.cache import ShardCache, Wanted
from gptscale.runtime.errors import StoppedError, UserError

LOG = logging.getLogger(__name__)
STEPS = 64
"""Looked ahead from the step that is being read."""
_ROOM_POLL_S = 1.0
_SHARE = 0.5
"""Of a limited cache: the shards of all steps looked ahead to. The rest is for what other corpora and ranks use."""


class _EndedError(Exception):
    pass


class ReadAhead:
    """A thread that fetches what each of the next steps wants, in their order, until it is closed.

    It never holds a shard and never needs room that is in use, so whoever reads is not held up. What it cannot fetch it
    leaves, with a word in the log, to whoever needs it, who tries anew and raises.
    """

    def __init__(self, cache: ShardCache, steps: Iterator[list[Wanted]]) -> None:
        """`steps`: what each step wants, from the one on that is read first."""
        self._cache = cache
        self._steps = steps
        self._reached = -1
        self._changed = threading.Condition()
        self._closed = False
        self._failed: set[str] = set()
        """Shards, by digest, that could not be fetched; they were tried often enough."""
        self._thread = threading.Thread(target=self._work, daemon=True, name="read-ahead")
        self._thread.start()

    def reached(self) -> None:
        """The next step is being read from now on."""
        with self._changed:
            self._reached += 1
            self._changed.notify()

    def close(self) -> None:
        """End the thread, in the midst of a transfer too."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        window: deque[tuple[int, list[Wanted]]] = deque()
        try:
            for number, wanted in enumerate(self._steps):
                window.append((number, wanted))
                for shard in wanted if self._due(window) else []:
                    self._fetch(shard)
        except (_EndedError, StoppedError):
            pass

    def _due(self, window: deque[tuple[int, list[Wanted]]]) -> bool:
        """Wait until the last step of the window is near, and the shards of all its steps fit their share; False where
        it has been read before that.

        The step that is read, and the next, are always due: they have to be read anyway.
        """
        limit = self._cache.limit_bytes
        with self._changed:
            while True:
                self._check()
                while window[0][0] < self._reached:
                    window.popleft()
                    if not window:
                        return False
                near = window[-1][0] - self._reached
                shards = {shard.digest: shard.size for _, step in window for shard in step}
                if near <= 1 or (near <= STEPS and (limit is None or sum(shards.values()) <= limit * _SHARE)):
                    return True
                self._changed.wait()

    def _fetch(self, shard: Wanted) -> None:
        def check() -> None:
            self._cache.check()
            self._check()

        if shard.digest in self._failed:
            return
        try:
            while not self._cache.fetch_ahead(shard, check):
                with self._changed:
                    self._check()
                    self._changed.wait(_ROOM_POLL_S)
        except UserError as error:
            self._failed.add(shard.digest)
            LOG.warning(f"reading ahead: {str(error).splitlines()[0]}")

    def _check(self) -> None:
        if self._closed:
            raise _EndedError
