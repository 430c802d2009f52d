"""Counts the operations of every matrix product that really runs, in-place and `out=` forms included."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class MatmulCount(TorchDispatchMode):
    """`dense` and `batched`: floating-point operations of 2-D and of batched products, a multiply-add being two."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = 0
        self.batched = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__.rstrip("_")
        if name in ("mm", "addmm"):
            left, right = args[-2:]
            self.dense += 2 * left.numel() * right.shape[-1]
        elif name in ("bmm", "baddbmm"):
            left, right = args[-2:]
            self.batched += 2 * left.numel() * right.shape[-1]
        else:
            assert not name.endswith(("matmul", "linear", "attention", "_mm")), f"{name} is not counted"
        return func(*args, **(kwargs or {}))


def count_matmuls(work: Any) -> MatmulCount:
    """Runs `work` and counts."""
    with torch.random.fork_rng(), MatmulCount() as count:
        work()
    return count
