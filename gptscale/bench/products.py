"""The matrix products of an optimizer step and nothing else: less than any way to take that step can do with.

Those within a fused attention kernel are not seen.
"""

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
    """The same products again, of random numbers. Those read that lie alike are one tensor, and so are those written:
    weights of one shape stay in a cache that a real step's do not, which makes the replay if anything too fast."""
    read: dict[_Stored, Tensor] = {}
    written: dict[_Stored, Tensor] = {}

    def ready_call(func: Any, args: Any, given: Any) -> partial[Tensor]:
        in_place = func._opname.endswith("_")
        first = args[:1] if in_place else ()
        rest = tree_map(lambda one: _tensor(one, read, device), args[len(first) :])
        named = {
            name: _tensor(one, written if name == "out" else read, device) if isinstance(one, _Stored) else one
            for name, one in given.items()
        }
        return partial(func, *(_tensor(one, written, device) for one in first), *rest, **named)

    ready = [ready_call(*call) for call in calls]

    def step(_: Sequence[Batch]) -> float:
        last = torch.zeros((), device=device)
        with torch.no_grad():
            for product in ready:
                last = product()
        return float(last.flatten()[0])  # waits for the device

    return step


def _tensor(like: Any, made: dict[_Stored, Tensor], device: torch.device) -> Any:
    """The one of `made` that lies like it; another is made where there is none. What is no tensor stays as it is."""
    if not isinstance(like, _Stored):
        return like
    if like not in made:
        reach = 1 + sum((size - 1) * step for size, step in zip(like.shape, like.stride, strict=True))
        numbers = torch.empty(reach, dtype=like.dtype, device=device).normal_(std=0.02)
        made[like] = numbers.as_strided(like.shape, like.stride)
    return made[like]


def _stored(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return _Stored(tuple(value.shape), tuple(value.stride()), value.dtype)


def _flops(args: Any) -> int:
    *_, a, b = (x.shape for x in args if isinstance(x, _Stored))
    batch, rows, inner = (1, *a)[-3:]
    return int(2 * batch * rows * inner * b[-1])
