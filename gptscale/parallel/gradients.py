"""Gradients as one flat buffer, their norm, and clipping."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from gptscale.parallel.ranks import Group


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
def average_gradients(parameters: Sequence[Tensor], replicas: Group, shares: int) -> None:
    """Replace every gradient by its sum over replicas, divided by `shares`: one all-reduce, of whose result they become
    views.
    """
    if shares == 1:
        return
    flat = take_gradients(parameters, sum(parameter.numel() for parameter in parameters))
    if replicas.size > 1:
        dist.all_reduce(flat, group=replicas.handle)
    flat.div_(shares)
    start = 0
    for parameter in parameters:
        parameter.grad = flat.narrow(0, start, parameter.numel()).view_as(parameter)
        start += parameter.numel()


def gradient_norm(parameters: Sequence[Tensor], peers: Group | None = None) -> Tensor:
    """L2 norm over all gradients, and over those that `peers` hold, each of its own: fp32 scalar."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm if peers is None else norm_over(norm, peers)


def norm_over(norm: Tensor, peers: Group) -> Tensor:
    """The norm of what all peers hold together, from each one's own."""
    if peers.size == 1:
        return norm
    squares = norm.square()
    dist.all_reduce(squares, group=peers.handle)
    return squares.sqrt()


def prepare_update(
    optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], norm: Tensor, limit: float, factor: float = 1.0
) -> bool:
    """Have the optimizer's next step divide gradients by `factor` and clip them, or change nothing.

    `norm` is that of the divided gradients. Nothing changes where it is not finite: a fused kernel skips by
    itself. For an optimizer without one the device is asked, which waits; False then says that it must not step. Call
    `release_kernel` after the step.
    """
    if hand_to_kernel(optimizer, norm, limit, factor):
        return True
    if not torch.isfinite(norm):
        return False
    by = divisor(norm, limit, factor)
    if by is not None:
        torch._foreach_div_([parameter.grad for parameter in parameters if parameter.grad is not None], by)
    return True


def hand_to_kernel(optimizer: torch.optim.Optimizer, norm: Tensor, limit: float, factor: float = 1.0) -> bool:
    """Tell the fused kernel what to divide gradients by and whether to skip; False where there is none to be told.

    This is how torch's own GradScaler does it: the kernel divides by `grad_scale` as it reads, which costs no pass of
    its own, and where `found_inf` is 1 it changes neither weights nor state, its step count included.
    """
    if not steps_in_kernel(optimizer):
        return False
    optimizer.grad_scale = divisor(norm, limit, factor)  # type: ignore[attr-defined]
    optimizer.found_inf = (~torch.isfinite(norm)).float()  # type: ignore[attr-defined]
    return True


def divisor(norm: Tensor, limit: float, factor: float) -> Tensor | None:
    """What gradients have to be divided by, for `factor` and clipping together; None where it is 1 in any case.

    Clipping multiplies by limit / (norm + 1e-6), at most 1, as `torch.nn.utils.clip_grad_norm_` does.
    """
    if limit <= 0:
        return None if factor == 1.0 else torch.full_like(norm, factor)
    return torch.clamp((norm + 1e-6) / limit, min=1.0) * factor


def steps_in_kernel(optimizer: torch.optim.Optimizer) -> bool:
    """Whether `step` heeds `grad_scale` and `found_inf`: torch's fused optimizers say so, for its own GradScaler."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def release_kernel(optimizer: torch.optim.Optimizer) -> None:
    """Take back what `hand_to_kernel` told: it holds for one step."""
    if steps_in_kernel(optimizer):
        optimizer.grad_scale = optimizer.found_inf = None  # type: ignore[attr-defined]
