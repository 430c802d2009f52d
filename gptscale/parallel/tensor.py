"""Tensor parallelism, applied to a model from outside: each rank of a group keeps a slice of every large matrix.

`gptscale.parallel.slices` says which. Between what widens and what narrows again a rank works on its own heads and
features alone. A block then has one sum over ranks behind attention and one behind the feed-forward, and in backward
one in front of each. Embedding and head are cut by rows of the vocabulary, and the full logits exist nowhere.

Norms, the biases of what narrows and learned positions are whole on every rank, and stay equal: each rank computes
their gradients from the same numbers.

Shape legend: B batch, T tokens, D width, O output features.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from gptscale.config.shape import padded_vocab
from gptscale.model.feedforward import FeedForward
from gptscale.model.gpt import GPT, Block
from gptscale.model.linear import Again, Linear, linear
from gptscale.parallel.norms import gather_output, share_out_norms, sum_scattered
from gptscale.parallel.ranks import Group


def join_slices(model: GPT, group: Group, shard_norms: bool = False) -> None:
    """Have a model of which each rank of a group has taken its slices work with its peers from now on.

    `shard_norms`: between the products each has a stretch of every row (`gptscale.parallel.norms`).
    `config.parallel_rules` has seen to it that heads, features and rows of the vocabulary divide by the group's size.
    """
    if group.size == 1:
        return
    part = _Part(group, padded_vocab(model.vocab_size, model.config.vocab_multiple) // group.size)
    model.embedding.lookup = partial(_lookup, part)
    model.head.part = part
    _copy_output(model.head.norm, group)
    for block in model.blocks:
        if not isinstance(block, Block):  # another stage's
            continue
        feed = gather_output if shard_norms else _copy_output
        feed(block.attention_norm, group)
        feed(block.feedforward_norm, group)
        block.attention.o = SummedLinear(block.attention.o, group, shard_norms)
        assert isinstance(block.feedforward, FeedForward), "experts are shared out by another axis"
        block.feedforward.down = SummedLinear(block.feedforward.down, group, shard_norms)
        for norm in (block.attention.q_norm, block.attention.k_norm):
            if norm is not None:  # one weight for all heads, of which this rank sees some
                norm.weight.register_hook(partial(_sum_of_heads, group))  # type: ignore[no-untyped-call]
        if model.config.dropout:
            block.attention.attend = partial(_attend_apart, block.attention.attend, group)  # type: ignore[method-assign]
    if shard_norms:
        share_out_norms(model, group)


class SummedLinear(Linear):
    """A linear layer of whose inputs each rank has a part: the products are summed, and the bias added once.

    `scatters`: each rank keeps its stretch of the sum.
    """

    def __init__(self, layer: Linear, group: Group, scatters: bool = False) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        self._group = group
        self._summed = sum_scattered if scatters else _summed

    def forward(self, x: Tensor, again: Again | None = None) -> Tensor:
        y = self._summed(linear(x, self.weight, again=again), self._group)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class _Part:
    """`gptscale.model.loss.VocabularyPart`, over a group."""

    def __init__(self, group: Group, rows: int) -> None:
        self.first = _first_row(group, rows)
        self.group = group

    def largest(self, values: Tensor) -> Tensor:
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self.group.handle)
        return values

    def total(self, values: Tensor) -> Tensor:
        return _sum_of_parts(self.group, values)

    def joined(self, logits: Tensor) -> Tensor:
        parts = [torch.empty_like(logits) for _ in range(self.group.size)]
        dist.all_gather(parts, logits.contiguous(), group=self.group.handle)
        return torch.cat(parts, dim=-1)


def _first_row(group: Group, rows: int) -> int:
    return group.rank * rows


class _Copy(torch.autograd.Function):
    """What all ranks of a group use: its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        # A copy: the gradient may be somebody else's too.
        return _sum_of_parts(ctx.group, grads[0].clone(memory_format=torch.contiguous_format)), None


class _Sum(torch.autograd.Function):
    """The sum over a group, in place, which every rank then uses alike: each part's gradient is the sum's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.mark_dirty(x)
        return _sum_of_parts(group, x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None


def _summed(x: Tensor, group: Group) -> Tensor:
    y: Tensor = _Sum.apply(x, group)  # type: ignore[no-untyped-call]
    return y


def _sum_of_parts(group: Group, x: Tensor) -> Tensor:
    dist.all_reduce(x, group=group.handle)
    return x


def _sum_of_heads(group: Group, grad_weight: Tensor) -> Tensor:
    """The gradient of what is used in all heads, from that in this rank's."""
    return _sum_of_parts(group, grad_weight.contiguous())


def _copy_output(module: nn.Module, group: Group) -> None:
    module.register_forward_hook(lambda _, inputs, output: _Copy.apply(output, group))  # type: ignore[no-untyped-call]


def _lookup(part: _Part, ids_BT: Tensor, weight: Tensor) -> Tensor:
    """Rows of the embedding [B, T, D], each from the rank that holds it. Exact: all others give zero."""
    rows = weight.shape[0]
    here_BT = ids_BT - part.first
    elsewhere_BT = (here_BT < 0) | (here_BT >= rows)
    x_BTD = F.embedding(here_BT.clamp(0, rows - 1), weight).masked_fill(elsewhere_BT.unsqueeze(-1), 0)
    return _summed(x_BTD, part.group)


def _attend_apart(attend: Callable[..., Tensor], group: Group, q_BTHW: Tensor, *rest: Any) -> Tensor:
    """Attention whose dropout is another on every rank, whose heads are others.

    Everything else that is dropped is the same on all, which draw it alike. What is drawn here comes of one number from
    the common generator, so that activation checkpointing's second forward draws the same.
    """
    seed = int(torch.randint(2**62, ())) + group.rank
    devices = [q_BTHW.device] if q_BTHW.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        return attend(q_BTHW, *rest)
