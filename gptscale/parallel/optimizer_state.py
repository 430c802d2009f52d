"""An optimizer's state as a checkpoint needs it: there before the first step, and counting the same step everywhere.

Which tensors an optimizer keeps of each parameter is said by its groups: `state_kinds`, Adam's two moments where they
say nothing. All are of the parameter's shape and start at zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from gptscale.flow import StateKind

ADAM_KINDS: tuple[StateKind, ...] = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Span:
    """Where a part of a parameter lies in a flat tensor that is optimized in its place.

    Elements [start, start + size) of the flattened parameter are elements [offset, offset + size) of the tensor.
    """

    parameter: str
    """Canonical name."""
    shape: tuple[int, ...]
    """Of the parameter, or of the slice of it that tensor parallelism leaves a rank."""
    start: int
    offset: int
    size: int


@runtime_checkable
class KnowsParameters(Protocol):
    """An optimizer that must know which parameters its tensors are parts of, because its update is not elementwise."""

    def bind(self, flats: Sequence[tuple[torch.Tensor, Sequence[Span]]]) -> None:
        """Called once, by an engine that has put these flat tensors in the parameters' place. A collective."""


def kinds_of(group: Mapping[str, Any]) -> tuple[StateKind, ...]:
    """The state that an optimizer keeps of the members of one of its groups."""
    return tuple(group.get("state_kinds", ADAM_KINDS))


def names_its_state(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it is known what it keeps: by its groups, or because it is Adam or of Adam's kin."""
    ours = isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW | KnowsParameters)
    return ours or all("state_kinds" in group for group in optimizer.param_groups)


def kinds_by_parameter(optimizer: torch.optim.Optimizer) -> dict[int, tuple[StateKind, ...]]:
    """The same for every tensor that it steps, by `id`."""
    return {id(tensor): kinds_of(group) for group in optimizer.param_groups for tensor in group["params"]}


def ensure_state(
    optimizer: torch.optim.Optimizer, tensor: torch.Tensor, kinds: tuple[StateKind, ...]
) -> dict[str, Any]:
    """State of one optimized tensor, made as the optimizer would make it where the first step has not been taken."""
    state: dict[str, Any] = optimizer.state[tensor]
    if kinds and kinds[0] not in state:
        # The fused kernel keeps its step count on the device of the tensor; AdamW makes it so, and fp32.
        state["step"] = torch.zeros((), dtype=torch.float32, device=tensor.device)
        for kind in kinds:
            state[kind] = torch.zeros_like(tensor, memory_format=torch.preserve_format)
    return state


def stored(
    optimizer: torch.optim.Optimizer, tensor: torch.Tensor, kinds: tuple[StateKind, ...]
) -> Iterator[tuple[StateKind, torch.Tensor]]:
    """The weight and its state, as tensors of the same shape."""
    state = ensure_state(optimizer, tensor, kinds)
    yield "weight", tensor.data
    for kind in kinds:
        yield kind, state[kind]


def set_step(optimizer: torch.optim.Optimizer, tensor: torch.Tensor, kinds: tuple[StateKind, ...], step: int) -> None:
    ensure_state(optimizer, tensor, kinds)["step"].fill_(step)


def updates_of(optimizer: torch.optim.Optimizer) -> int:
    """Updates applied so far: the optimizer's own count, which skipped steps do not advance."""
    return max((int(state["step"].item()) for state in optimizer.state.values() if "step" in state), default=0)
