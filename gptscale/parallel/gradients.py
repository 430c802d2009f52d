"""Gradients as one flat buffer, their norm, and clipping."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def take_gradients(parameters: Sequence[Tensor], elements: int) -> Tensor:
    """All gradients in one flat tensor of `elements` (zeros at the end where that is more); they are taken away.

    A parameter without a gradient gives zeros.
    """
    parts = [
        torch.zeros_like(parameter.data).view(-1) if parameter.grad is None else parameter.grad.reshape(-1)
        for parameter in parameters
    ]
    missing = elements - sum(part.numel() for part in parts)
    if missing:
        parts.append(parts[0].new_zeros(missing))
    for parameter in parameters:
        parameter.grad = None
    return torch.cat(parts)


@torch.no_grad()
def average_gradients(parameters: Sequence[Tensor]) -> None:
    """Replace every gradient by its mean over all ranks: one all-reduce, of whose result they become views."""
    if dist.get_world_size() == 1:
        return
    flat = take_gradients(parameters, sum(parameter.numel() for parameter in parameters))
    dist.all_reduce(flat)
    flat.div_(dist.get_world_size())
    start = 0
    for parameter in parameters:
        parameter.grad = flat.narrow(0, start, parameter.numel()).view_as(parameter)
        start += parameter.numel()


def gradient_norm(parameters: Sequence[Tensor]) -> Tensor:
    """L2 norm over all gradients: fp32 scalar."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def clipped_step(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], norm: Tensor, limit: float) -> None:
    """One step on gradients of this `norm`, scaled down to `limit` where it is above (0: never)."""
    if limit > 0 and not clip_in_kernel(optimizer, norm, limit):
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    optimizer.step()
    if limit > 0:
        optimizer.grad_scale = None  # type: ignore[attr-defined]


def clip_in_kernel(optimizer: torch.optim.Optimizer, norm: Tensor, limit: float) -> bool:
    """Have the fused kernel divide gradients by what clipping asks for, where it can; False where it cannot.

    The kernel divides by `grad_scale` as it reads, which is how a gradient scaler unscales: no pass of its own. The
    factor is that of `torch.nn.utils.clip_grad_norm_`: limit / (norm + 1e-6), at most 1.
    """
    if limit <= 0:
        return True
    if not all(group.get("fused") for group in optimizer.param_groups):
        return False
    optimizer.grad_scale = torch.clamp((norm + 1e-6) / limit, min=1.0)  # type: ignore[attr-defined]
    return True
