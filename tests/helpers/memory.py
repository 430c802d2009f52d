"""How much memory a piece of work really takes, counted and not sampled."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile


def peak_bytes(work: Callable[[], object]) -> int:
    """Most bytes that torch's CPU allocator held at one time on top of what it held before, while `work` ran."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        work()
    kineto = trace.profiler.kineto_results  # type: ignore[union-attr]
    changes = [(event.start_ns(), event.nbytes()) for event in kineto.events() if event.name() == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes, key=lambda item: item[0]):
        held += change
        peak = max(peak, held)
    assert peak > 0, "the profiler saw no allocation"
    return peak


def saved_for_backward(forward: Callable[[], object]) -> list[Tensor]:
    """Every tensor that autograd keeps for backward, as it was packed."""
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return saved


def storage_bytes(tensors: list[Tensor]) -> int:
    """Bytes behind the tensors, each storage once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
