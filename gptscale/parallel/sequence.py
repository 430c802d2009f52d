"""Sequence parallelism, applied to a model from outside: each rank of a group computes a stretch of every row.

As in DeepSpeed-Ulysses (Jacobs et al., arXiv 2309.14509): all but attention works on single tokens and needs nobody.
Around attention the ranks exchange stretches for heads, by DeepSpeed's `DistributedAttention`: within, a rank sees
whole rows, and its share of the heads. So windows, documents and grouped heads are what they are on one rank.

Every rank is given whole rows, a few bytes a token, and takes its stretch of them. Each holds the whole model, and its
gradient is that of its stretch: they are summed over the group as over data ranks.

Shape legend: B batch, T tokens of a row, S tokens of a stretch, H heads, W features of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from gptscale.model.attention import Attention, LayerCache
from gptscale.model.documents import Documents
from gptscale.model.gpt import GPT, Block
from gptscale.model.positions import Turns
from gptscale.parallel.ranks import Group


def split_sequences(model: GPT, group: Group) -> None:
    """Have the model compute this rank's stretches in training and evaluation, with its peers, from now on.

    `config.parallel_rules` has seen to it that heads and rows divide by the group's size. Generation works on whole
    rows, on every rank alike.
    """
    if group.size == 1:
        return
    from deepspeed.sequence.layer import DistributedAttention

    stretch = Stretch(group)
    if model.config.positions == "learned":
        model.embedding.register_forward_pre_hook(partial(_positions_of, stretch))
    for block in model.blocks:
        assert isinstance(block, Block)
        attention = block.attention
        whole = DistributedAttention(attention.attend, group.process_group, scatter_idx=2, gather_idx=1)
        attention.turns = partial(_turns, stretch, attention, attention.turns)  # type: ignore[method-assign]
        attention.attend = partial(_attend, stretch, attention.attend, whole)  # type: ignore[method-assign]
    model.forward = partial(_forward, stretch, model.forward)  # type: ignore[method-assign]


class Stretch:
    """Which part of a row is this rank's."""

    def __init__(self, group: Group) -> None:
        self._rank = group.rank
        self._size = group.size
        self.cuts = True
        """False while whole rows are computed."""

    def of(self, x_BT: Tensor) -> Tensor:
        """This rank's columns: [B, S]."""
        return x_BT.chunk(self._size, 1)[self._rank]

    def positions(self, tokens: int, device: torch.device) -> Tensor:
        """Positions in the row of a stretch of `tokens`: [1, S]."""
        first = self._rank * tokens
        return torch.arange(first, first + tokens, device=device).unsqueeze(0)

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        self.cuts = False
        try:
            yield
        finally:
            self.cuts = True


def _forward(
    stretch: Stretch,
    forward: Callable[..., Tensor],
    inputs_BT: Tensor,
    targets_BT: Tensor | None = None,
    *rest: Any,
    **named: Any,
) -> Tensor:
    if targets_BT is None:
        with stretch.set_aside():
            return forward(inputs_BT, None, *rest, **named)
    return forward(stretch.of(inputs_BT), stretch.of(targets_BT), *rest, **named)


def _positions_of(stretch: Stretch, _: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """What an embedding with learned positions is called with, in place of ids and the positions in whole rows."""
    ids_BS, positions_BT = inputs
    if not stretch.cuts:
        return inputs
    if positions_BT is not None:
        return ids_BS, stretch.of(positions_BT)
    return ids_BS, stretch.positions(ids_BS.shape[1], ids_BS.device)


def _turns(
    stretch: Stretch,
    attention: Attention,
    turns: Callable[..., Turns | None],
    x_BSD: Tensor,
    cache: LayerCache | None = None,
) -> Turns | None:
    if attention.rotary is None or not stretch.cuts:
        return turns(x_BSD, cache)
    tokens, device = x_BSD.shape[1], x_BSD.device
    return attention.rotary.turns(tokens, device, stretch.positions(tokens, device))


def _attend(
    stretch: Stretch,
    attend: Callable[..., Tensor],
    whole: Callable[..., Tensor],
    q_BSHW: Tensor,
    k_BSKW: Tensor,
    v_BSKW: Tensor,
    cache: LayerCache | None = None,
    documents: Documents | None = None,
) -> Tensor:
    if not stretch.cuts:
        return attend(q_BSHW, k_BSKW, v_BSKW, cache, documents)
    batch_dim, no_rotation = 0, None
    return whole(q_BSHW, k_BSKW, v_BSKW, batch_dim, no_rotation, cache, documents)
