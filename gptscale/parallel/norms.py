"""Norms and residual stream cut along the sequence over tensor peers (Korthikanti et al., arXiv 2205.05198, section 3).

Between the products of a block every tensor peer would compute and keep the same. Here each has a stretch of every row:
what was a sum over peers leaves each its stretch of the sum, and what a product reads is gathered before it. A ring
sends as many bytes either way, and what a layer keeps there is shared out.

Norms and the biases behind sums then learn from a stretch: their gradients are summed over the peers.

Shape legend: B batch, T tokens of a row, S tokens of a stretch, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from gptscale.model.attention import Attention, LayerCache
from gptscale.model.gpt import GPT, Block
from gptscale.model.positions import Turns
from gptscale.parallel.ranks import Group


def share_out_norms(model: GPT, group: Group) -> None:
    """Have the blocks work on stretches: called by `join_slices`, which has the products gather and scatter.

    `config.parallel_rules` has seen to it that rows divide by the group's size. Rows to generate from are filled up.
    """
    model.embedding.register_forward_hook(lambda _, inputs, x_BTD: scattered(x_BTD, group))
    last = model.blocks[-1]
    if isinstance(last, Block):  # on the last stage of a pipeline: the head reads whole rows
        last.register_forward_hook(lambda _, inputs, x_BSD: whole(x_BSD, group))
    for block in model.blocks:
        if not isinstance(block, Block):
            continue
        attention = block.attention
        attention.turns = partial(_turns, group, attention)  # type: ignore[method-assign]
        learners = [*block.attention_norm.parameters(), *block.feedforward_norm.parameters()]
        for bias in (attention.o.bias, getattr(block.feedforward.down, "bias", None)):
            learners += [] if bias is None else [bias]
        for parameter in learners:
            parameter.register_hook(partial(_summed, group))  # type: ignore[no-untyped-call]


def scattered(x_BTD: Tensor, group: Group) -> Tensor:
    """This rank's stretch of what all have alike."""
    missing = -x_BTD.shape[1] % group.size
    return _moved(F.pad(x_BTD, (0, 0, 0, missing)) if missing else x_BTD, group, _stretch, _gather)


def whole(x_BSD: Tensor, group: Group) -> Tensor:
    """Whole rows on every rank, for what all compute alike."""
    return _moved(x_BSD, group, _gather, _stretch)


def gathered(x_BSD: Tensor, group: Group) -> Tensor:
    """Whole rows for products of which each rank has a part: a stretch's gradient is the sum of theirs."""
    return _moved(x_BSD, group, _gather, _sum_and_scatter)


def sum_scattered(x_BTD: Tensor, group: Group) -> Tensor:
    """This rank's stretch of the sum over the group."""
    return _moved(x_BTD, group, _sum_and_scatter, _gather)


Move = Callable[[Tensor, Group], Tensor]


def _moved(x: Tensor, group: Group, there: Move, back: Move) -> Tensor:
    y: Tensor = _Moved.apply(x, group, there, back)  # type: ignore[no-untyped-call]
    return y


class _Moved(torch.autograd.Function):
    """`there` in forward, and gradients `back`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, there: Move, back: Move) -> Tensor:
        ctx.group, ctx.back = group, back
        return there(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return ctx.back(grads[0], ctx.group), None, None, None


def _stretch(x_BTD: Tensor, group: Group) -> Tensor:
    return x_BTD.chunk(group.size, 1)[group.rank].contiguous()


def _gather(x_BSD: Tensor, group: Group) -> Tensor:
    batch, tokens, width = x_BSD.shape
    parts = x_BSD.new_empty(group.size * batch, tokens, width)
    dist.all_gather_into_tensor(parts, x_BSD.contiguous(), group=group.handle)
    return parts.view(group.size, batch, tokens, width).transpose(0, 1).reshape(batch, group.size * tokens, width)


def _sum_and_scatter(x_BTD: Tensor, group: Group) -> Tensor:
    batch, tokens, width = x_BTD.shape
    stretch = tokens // group.size
    parts_NBSD = x_BTD.reshape(batch, group.size, stretch, width).transpose(0, 1).contiguous()
    summed_BSD = x_BTD.new_empty(batch, stretch, width)
    dist.reduce_scatter_tensor(summed_BSD, parts_NBSD.flatten(0, 1), group=group.handle)
    return summed_BSD


def _summed(group: Group, gradient: Tensor) -> Tensor:
    gradient = gradient.contiguous()
    dist.all_reduce(gradient, group=group.handle)
    return gradient


def _turns(group: Group, attention: Attention, x_BSD: Tensor, cache: LayerCache | None = None) -> Turns | None:
    """Of whole rows."""
    assert cache is None
    if attention.rotary is None:
        return None
    return attention.rotary.turns(x_BSD.shape[1] * group.size, x_BSD.device, None)


def gather_output(module: nn.Module, group: Group) -> None:
    module.register_forward_hook(lambda _, inputs, x_BSD: gathered(x_BSD, group))
