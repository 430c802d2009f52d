"""The matrix products of an optimizer step and nothing else: what no way to take that step can do without."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from gptscale.bench.ours import Step
from gptscale.flow import Batch

_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}


@dataclass(frozen=True)
class _Stored:
    """How a tensor lies in memory."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class ProductRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within, notes every matrix product that torch dispatches, whoever asks for it: modules, or their gradients."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, Any, Any]] = []
        """Each product's operator, arguments and named arguments, with a `_Stored` for each tensor."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if func.namespace == "aten" and func._opname.rstrip("_") in _PRODUCTS:
            self.calls.append((func, *(tree_map(_stored, some) for some in (tuple(args), dict(given)))))
        return func(*args, **given)

    @property
    def flops(self) -> int:
        """Of all of them, a multiply-add being two. What `addmm` adds does not count."""
        return sum(_flops(args) for _, args, _ in self.calls)


def replay(calls: Sequence[tuple[Any, Any, Any]], device: torch.device) -> Step:
    """The same products again, of random numbers. Tensors that lie alike are one, which favours no way to take a
    step."""
    made: dict[_Stored, Tensor] = {}

    def tensor(like: Any) -> Any:
        if not isinstance(like, _Stored):
            return like
        if like not in made:
            empty = torch.empty_strided(like.shape, like.stride, dtype=like.dtype, device=device)
            made[like] = empty.normal_(std=0.02)
        return made[like]

    ready = [partial(func, *tree_map(tensor, args), **tree_map(tensor, given)) for func, args, given in calls]

    def step(_: Sequence[Batch]) -> float:
        last = torch.zeros((), device=device)
        with torch.no_grad():
            for product in ready:
                last = product()
        return float(last.flatten()[0])  # waits for the device

    return step


def _stored(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return _Stored(tuple(value.shape), tuple(value.stride()), value.dtype)


def _flops(args: Any) -> int:
    *_, a, b = (x.shape for x in args if isinstance(x, _Stored))
    batch, rows, inner = (1, *a)[-3:]
    return int(2 * batch * rows * inner * b[-1])
