"""Adam's state as a checkpoint needs it: there before the first step, and counting the same step everywhere."""

from __future__ import annotations

from typing import Any

import torch


def ensure_adam_state(optimizer: torch.optim.Optimizer, tensor: torch.Tensor) -> dict[str, Any]:
    """State of one optimized tensor, made as AdamW would make it where the first step has not been taken."""
    state: dict[str, Any] = optimizer.state[tensor]
    if "exp_avg" not in state:
        # The fused kernel keeps its step count on the device of the tensor; AdamW makes it so, and fp32.
        state["step"] = torch.zeros((), dtype=torch.float32, device=tensor.device)
        state["exp_avg"] = torch.zeros_like(tensor, memory_format=torch.preserve_format)
        state["exp_avg_sq"] = torch.zeros_like(tensor, memory_format=torch.preserve_format)
    return state


def set_adam_step(optimizer: torch.optim.Optimizer, tensor: torch.Tensor, step: int) -> None:
    ensure_adam_state(optimizer, tensor)["step"].fill_(step)


def adam_updates(optimizer: torch.optim.Optimizer) -> int:
    """Updates applied so far: Adam's own count, which skipped steps do not advance."""
    return max((int(state["step"].item()) for state in optimizer.state.values() if "step" in state), default=0)
