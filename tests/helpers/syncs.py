"""Counts where a thread would wait for a device: seen on a CPU, where nobody waits, by who asks a tensor for a value.

    with counting() as counts:
        engine.train_step(microbatches, rate)
    assert counts.total == 0, counts.places

Counted are `item()`, `float()`, `bool()` and `if` of a tensor, `tolist()`, `numpy()`, `cpu()`, and operations whose
result has a shape that depends on values. Integers are not: those that a step reads lie on the host in any case
(control words, bounds of documents), but for how many tokens experts on other ranks get, and what a device computes are
floats and their comparisons. On a CUDA device
`torch.cuda.set_sync_debug_mode("error")` says the same, and of the copies between host and device too.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

ATEN = torch.ops.aten
ASKING = {
    ATEN._local_scalar_dense.default,
    ATEN.is_nonzero.default,
    ATEN.equal.default,
    ATEN.nonzero.default,
    ATEN.masked_select.default,
}
FETCHING: set[Callable[..., Any]] = {
    torch.Tensor.tolist,
    torch.Tensor.numpy,
    torch.Tensor.cpu,
    torch.Tensor.__array__,
}
IGNORED = ("/torch/", "/tests/helpers/syncs.py")


@dataclass
class Counts:
    places: Counter[str] = field(default_factory=Counter)
    """How often, by `file:line what`, of the innermost frame outside torch."""

    @property
    def total(self) -> int:
        return sum(self.places.values())

    def add(self, what: str, values: Any) -> None:
        if not isinstance(values, torch.Tensor) or not (values.is_floating_point() or values.dtype == torch.bool):
            return
        frames = [f for f in traceback.extract_stack() if not any(part in f.filename for part in IGNORED)]
        self.places[f"{Path(frames[-1].filename).name}:{frames[-1].lineno} {what}"] += 1


@contextmanager
def counting() -> Iterator[Counts]:
    """Counts what this thread asks for within."""
    counts = Counts()
    with _Fetches(counts), _Questions(counts):
        yield counts


class _Questions(TorchDispatchMode):
    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self._counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masked = func == ATEN.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1])
        if func in ASKING or masked:
            self._counts.add(func.__name__, args[0])
        return func(*args, **(kwargs or {}))


class _Fetches(TorchFunctionMode):
    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self._counts = counts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in FETCHING:
            self._counts.add(func.__name__, args[0])
        return func(*args, **(kwargs or {}))
