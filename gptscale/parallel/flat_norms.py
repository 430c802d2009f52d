"""Norms of gradients that lie flat, over everybody who holds some, and clipping by them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gptscale.parallel.gradients import divisor, hand_to_kernel
from gptscale.parallel.ranks import Group


def clip(optimizer: Any, gradients: list[Tensor], norm: Tensor, limit: float, scale: float) -> None:
    """Unscale and clip, in the kernel or before it. `norm` is that of the scaled gradients, known to be finite if not
    in the kernel.
    """
    norm = norm.to(gradients[0].device)
    if not hand_to_kernel(optimizer, norm / scale, limit, scale):
        by = divisor(norm / scale, limit, scale)
        if by is not None:
            torch._foreach_div_(gradients, by)


def counted(gradients: list[Tensor], parameters: list[Tensor], not_first: frozenset[int]) -> list[Tensor]:
    """Those of parameters that no peer counts in this rank's place."""
    if not not_first:
        return gradients
    pairs = zip(gradients, parameters, strict=True)
    return [gradient for gradient, parameter in pairs if id(parameter) not in not_first]


def add_up(squares: Tensor, replicas: Any, peers: Group | None) -> None:
    """Sum, in place, over the ranks that share out a parameter, and over those that hold others."""
    if dist.get_world_size(group=replicas) > 1:
        dist.all_reduce(squares, group=replicas)
    if peers is not None:
        dist.all_reduce(squares, group=peers.handle)


def masked_norm(squares: Tensor) -> Tensor:
    """Their root; −1 where it is not finite, which is how DeepSpeed says so."""
    norm = squares.sqrt()
    return norm.masked_fill(~norm.isfinite(), -1.0)


def sum_of_squares(gradients: list[Tensor], device: torch.device) -> Tensor:
    if not gradients:
        return torch.zeros((), device=device)
    return torch.stack(torch._foreach_norm(gradients)).square().sum()
