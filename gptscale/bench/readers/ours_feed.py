"""gptscale's own, as training reads it: a thread makes ready what comes, some steps ahead, and hashes it."""

from __future__ import annotations

from collections.abc import Iterator

from gptscale.bench.readers import ours
from gptscale.data.stream import StepFeed
from gptscale.flow import Batch


class Reader(ours.Reader):
    flags = "the same with the thread that keeps some steps ahead of training, samples hashed"

    def _steps(self, step: int) -> Iterator[list[Batch]]:
        with StepFeed(self._stream, self._plan, self._split, 0, step * self._rows) as feed:
            for data in feed:
                yield data.microbatches
