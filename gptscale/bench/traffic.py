"""A communication logger: what a rank hands to its peers, counted where torch dispatches it.

Whoever asks for it (functions of `torch.distributed`, DDP's reducer in C++, FSDP, DeepSpeed), every operation of a
process group is one operator of torch's `c10d` library, or of the functional one over it, within which none is seen.
Functions that call each other end in one of these, so that nothing is counted twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from gptscale.plan.collectives import Operation, Payload


@dataclass(frozen=True)
class _Rule:
    operation: Operation
    argument: str
    """Which argument's tensors are the payload: the larger side of the operation."""


_RULES = {
    "allreduce_": _Rule("all-reduce", "tensors"),
    "allreduce_coalesced_": _Rule("all-reduce", "tensors"),
    "reduce_": _Rule("reduce", "tensors"),
    "allgather_": _Rule("all-gather", "output_tensors"),
    "allgather_coalesced_": _Rule("all-gather", "output_lists"),
    "_allgather_base_": _Rule("all-gather", "output_tensor"),
    "allgather_into_tensor_coalesced_": _Rule("all-gather", "outputs"),
    "reduce_scatter_": _Rule("reduce-scatter", "input_tensors"),
    "_reduce_scatter_base_": _Rule("reduce-scatter", "input_tensor"),
    "reduce_scatter_tensor_coalesced_": _Rule("reduce-scatter", "inputs"),
    "alltoall_": _Rule("all-to-all", "input_tensors"),
    "alltoall_base_": _Rule("all-to-all", "input"),
    "broadcast_": _Rule("broadcast", "tensors"),
    "send": _Rule("send", "tensors"),
}
_FUNCTIONAL_RULES = {
    "all_reduce": _Rule("all-reduce", "input"),
    "all_reduce_": _Rule("all-reduce", "input"),
}
"""Those that a distributed tensor's norm calls."""
_EMPTY = {
    "barrier",
    "monitored_barrier_",
    "check_for_nan",
    "recv_",
    "recv_any_source_",
    "wait_tensor",
    "_wrap_tensor_autograd",
}
"""Without a payload; what is received counts where it is sent."""


class TrafficCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within, counts what this process hands over. Raises NotImplementedError at an operation that it does not know."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.payload: Counter[tuple[Operation, int]] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if DTensor in types:
            return NotImplemented  # it takes itself apart into operations that come here again
        given = kwargs or {}
        rules = {"c10d": _RULES, "_c10d_functional": _FUNCTIONAL_RULES}.get(func.namespace)
        if rules is not None and func._opname not in _EMPTY:
            if func._opname not in rules:
                raise NotImplementedError(f"{func}: nobody has said what it sends")
            names = (argument.name for argument in func._schema.arguments)
            self._count(rules[func._opname], {**dict(zip(names, args, strict=False)), **given})
        return func(*args, **given)

    def _count(self, rule: _Rule, given: Mapping[str, Any]) -> None:
        if rule.operation == "send":
            ranks = 2  # however large the group is in which both are numbered
        elif "group_name" in given:
            ranks = torch._C._distributed_c10d._resolve_process_group(given["group_name"]).size()
        else:
            ranks = ProcessGroup.unbox(given["process_group"]).size()
        payload_bytes = sum(x.numel() * x.element_size() for x in _tensors(given[rule.argument]))
        if ranks > 1 and payload_bytes:
            self.payload[rule.operation, ranks] += payload_bytes

    def counted(self) -> Payload:
        return dict(self.payload)


def _tensors(nested: Any) -> Iterator[Tensor]:
    if isinstance(nested, torch.Tensor):
        yield nested
    else:
        for inner in nested:
            yield from _tensors(inner)
