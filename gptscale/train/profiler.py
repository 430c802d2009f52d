"""A window of steps recorded with torch.profiler: a trace for Perfetto, and a page that says where the time went.

Outside of the window nothing is recorded and nothing costs: `span` is then one call into torch that says so.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch._C._autograd import DeviceType, _profiler_enabled
from torch.profiler import ProfilerActivity, profile, record_function

from gptscale.config.schema import ProfileConfig
from gptscale.runtime.files import write_bytes_atomically
from gptscale.train.profile_page import BACKWARD, Event, analyse, step_span, write_page

LOG = logging.getLogger("gptscale.train")


def span(name: str) -> AbstractContextManager[Any]:
    """A named range of the trace; nothing while nobody records."""
    return record_function(name) if _profiler_enabled() else nullcontext()


class StepProfiler:
    """Records the steps of `profile.steps` on the ranks of `profile.ranks`. On other ranks it does nothing."""

    def __init__(self, config: ProfileConfig, folder: Path, rank: int, ranks: int, device: torch.device) -> None:
        """`folder` is the run's."""
        self._config = config
        self._folder = folder
        self._place = f"rank {rank} of {ranks}, {device}"
        self._rank = rank
        self._device = device
        self._recording: profile | None = None
        self._left: AbstractContextManager[None] | None = None

    def announce(self, step: int, total_steps: int) -> None:
        """Say before the first step what will be recorded, and what of it cannot be."""
        if self._config.steps is None or self._rank != 0:
            return
        first, last = self._config.steps
        if last <= step:
            LOG.warning(f"profile.steps=[{first},{last}] is ignored: the run goes on from step {step}")
        elif first > total_steps:
            LOG.warning(f"profile.steps=[{first},{last}] is ignored: the run ends at step {total_steps}")
        elif first <= step or last > total_steps:
            LOG.warning(
                f"of profile.steps=[{first},{last}] only steps {max(first, step + 1)} to {min(last, total_steps)} "
                f"are recorded: the run goes from step {step + 1} to {total_steps}"
            )

    @contextmanager
    def step(self, number: int, total_steps: int) -> Iterator[None]:
        """Around the optimizer step of this number: recorded where it is in the window."""
        if not self._config.covers(number) or self._rank not in self._config.ranks:
            yield
            return
        assert self._config.steps is not None
        if self._recording is None:
            self._begin(number)
        with record_function(step_span(number)):
            yield
            if number == min(self._config.steps[1], total_steps):
                self._wait()  # kernels that are still under way belong to the step
        if number == min(self._config.steps[1], total_steps):
            self._end(number)

    def close(self) -> None:
        """Where the run ends within the window (a stop, an error), nothing is left running and nothing is written."""
        if self._recording is not None:
            self._stop()

    def _begin(self, number: int) -> None:
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._device.type == "cuda" else [])]
        self._first = number
        self._recording = profile(activities=activities, profile_memory=self._config.memory)
        self._left = backward_is_a_span()
        self._wait()
        self._recording.start()
        self._left.__enter__()

    def _stop(self) -> profile:
        assert self._recording is not None
        assert self._left is not None
        recording, self._recording = self._recording, None
        self._left.__exit__(None, None, None)
        recording.stop()
        return recording

    def _end(self, number: int) -> None:
        recording = self._stop()
        started_s = time.perf_counter()
        folder = self._folder / "profile" / f"steps-{self._first:08d}-{number:08d}"
        page = write_page(analyse(read_events(recording)), self._place)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            recording.export_chrome_trace(str(folder / f"rank-{self._rank}.trace.json.gz"))
            write_bytes_atomically(folder / f"rank-{self._rank}.summary.txt", page.encode())
        except OSError as error:  # a full disk must not end a training that may go on
            LOG.warning(f"the profile of steps {self._first} to {number} was not written: {error}")
            return
        LOG.info(
            f"profiled steps {self._first} to {number}: {folder}/rank-{self._rank}.summary.txt, and a trace for "
            f"https://ui.perfetto.dev beside it (written in {time.perf_counter() - started_s:.1f} s)"
        )

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


@contextmanager
def backward_is_a_span() -> Iterator[None]:
    """Within, every backward pass is a range of the trace, whichever engine asks for it.

    All of them go through `torch.autograd.backward`; autograd's own events are one a node, on another thread on a GPU.
    """
    plain: Callable[..., None] = torch.autograd.backward

    def recorded(*args: Any, **kwargs: Any) -> None:
        with record_function(BACKWARD):
            plain(*args, **kwargs)

    torch.autograd.backward = recorded
    try:
        yield
    finally:
        torch.autograd.backward = plain


def read_events(recording: profile) -> list[Event]:
    """All that happened, on the host and on the device, as plain values."""
    assert recording.profiler is not None
    results = recording.profiler.kineto_results
    assert results is not None
    return [
        Event(
            name=event.name(),
            start_ns=event.start_ns(),
            end_ns=event.start_ns() + event.duration_ns(),
            lane=event.device_resource_id() if on_device else event.start_thread_id(),
            on_device=on_device,
            is_range=event.is_user_annotation(),
            correlation=event.correlation_id(),
            allocated_bytes=event.nbytes() if event.name() == "[memory]" else 0,  # type: ignore[attr-defined]  # no stub
        )
        for event in results.events()
        if not event.is_hidden_event()
        for on_device in [event.device_type() != DeviceType.CPU]
    ]
