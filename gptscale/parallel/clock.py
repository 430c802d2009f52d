"""How long the parts of a step take on a device, without waiting for it."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from gptscale.flow import Duration


class Clock:
    """Marks in the course of a step: of the host's clock on a CPU, events in the stream on a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._last: torch.cuda.Event | float = self._now()

    def lap(self) -> Duration:
        """The time from the last mark (at first: from construction) to here, where the next mark is set."""
        start, self._last = self._last, self._now()
        if isinstance(start, torch.cuda.Event):
            assert isinstance(self._last, torch.cuda.Event)
            return BetweenEvents(start, self._last)
        assert isinstance(self._last, float)
        return Seconds(self._last - start)

    def restart(self) -> None:
        """What went before belongs to no lap."""
        self._last = self._now()

    def _now(self) -> torch.cuda.Event | float:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


@dataclass(frozen=True)
class Seconds:
    """A time that is known."""

    elapsed_s: float

    def seconds(self) -> float:
        return self.elapsed_s


@dataclass(frozen=True)
class BetweenEvents:
    """A time that the device knows once it has passed both events."""

    start: torch.cuda.Event
    end: torch.cuda.Event

    def seconds(self) -> float:
        self.end.synchronize()  # at once where the event has passed, as it has a step later
        elapsed_ms: float = self.start.elapsed_time(self.end)
        return elapsed_ms / 1000
