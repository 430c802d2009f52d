"""When a stage of a pipeline computes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.runtime.pipe.engine import PipelineEngine as DeepSpeedPipelineEngine
from deepspeed.runtime.pipe.schedule import BackwardPass, ForwardPass


@contextmanager
def watched_schedule() -> Iterator[list[tuple[float, float]]]:
    """Within, notes when each forward and backward pass of this rank begins and ends.

    In seconds of a clock that all processes of a host have in common. On a GPU it waits for each pass.
    """
    intervals: list[tuple[float, float]] = []
    stock = DeepSpeedPipelineEngine._INSTRUCTION_MAP
    noted = {kind: _noted(stock[kind], intervals) for kind in (ForwardPass, BackwardPass)}
    DeepSpeedPipelineEngine._INSTRUCTION_MAP = stock | noted
    try:
        yield intervals
    finally:
        DeepSpeedPipelineEngine._INSTRUCTION_MAP = stock


def _noted(execute: Callable[..., Any], intervals: list[tuple[float, float]]) -> Callable[..., Any]:
    def run(engine: Any, *args: Any, **kwargs: Any) -> Any:
        start_s = time.monotonic()
        result = execute(engine, *args, **kwargs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        intervals.append((start_s, time.monotonic()))
        return result

    return run
