"""Attention with torch's FlexAttention, which compiles a kernel for a mask. Only on CUDA: elsewhere it has no backward.

What a mask hides is told to it twice: as a function of two tokens, and as lists of blocks that are to be looked at. The
lists are made here from each token's first visible key. Torch's own `create_block_mask` evaluates the function for all
pairs, which is T² unless it is compiled as well.

Shape legend: B batch (1 where all sequences have one mask), T tokens, H query heads, K key/value heads, W features of
a head, N blocks of T.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from gptscale.model.documents import Documents

BLOCK = 128
"""Tokens of a block. FlexAttention's default; its kernels divide it further."""
LEAST_HEAD_WIDTH = 16
"""Its kernels take no narrower heads."""

Attend = Callable[..., Any]


def attend_flex(
    q_BTHW: Tensor,
    k_BTKW: Tensor,
    v_BTKW: Tensor,
    window: int | None = None,
    documents: Documents | None = None,
    attend: Attend | None = None,
) -> Tensor:
    """softmax(q kᵀ / √W, masked) v → [B, T, H, W]. `attend`: another `flex_attention` than the compiled one."""
    mask = block_mask(q_BTHW.shape[1], window, q_BTHW.device, documents)
    y_BHTW: Tensor = (attend or _compiled())(
        q_BTHW.transpose(1, 2),
        k_BTKW.transpose(1, 2),
        v_BTKW.transpose(1, 2),
        block_mask=mask,
        enable_gqa=q_BTHW.shape[2] != k_BTKW.shape[2],
    )
    return y_BHTW.transpose(1, 2)


def block_mask(tokens: int, window: int | None, device: torch.device, documents: Documents | None) -> BlockMask:
    """The mask, made once: for documents once a batch, else once a length and window."""
    if documents is None:
        return _unchanging_mask(tokens, window, device)
    made: BlockMask | None = documents.block_masks.get(window)
    if made is None:
        bounds_BT = documents.starts_on_device
        if window is not None:
            bounds_BT = torch.maximum(bounds_BT, _window_bounds(tokens, window, device))
        made = documents.block_masks[window] = make_block_mask(bounds_BT, from_bounds(bounds_BT))
    return made


def make_block_mask(bounds_BT: Tensor, visible: Callable[..., Tensor]) -> BlockMask:
    """`bounds_BT`: the first key that each token sees, rising along a row. Beyond it a token sees all up to itself.

    A block of keys is whole for a block of queries, so that the kernel need not ask `visible`, where the last query's
    first key lies before it and all of it before the first query. Nothing waits for the device.
    """
    tokens = bounds_BT.shape[1]
    blocks = -(-tokens // BLOCK)
    first_queries_N = torch.arange(blocks, device=bounds_BT.device) * BLOCK
    lowest_BN1 = bounds_BT[:, first_queries_N].unsqueeze(2)
    highest_BN1 = bounds_BT[:, (first_queries_N + BLOCK - 1).clamp_(max=tokens - 1)].unsqueeze(2)
    keys_N = first_queries_N
    before_NN = keys_N < first_queries_N.unsqueeze(1)
    seen_BNN = (keys_N + BLOCK > lowest_BN1) & (before_NN | (keys_N == first_queries_N.unsqueeze(1)))
    whole_BNN = (keys_N >= highest_BN1) & before_NN
    if tokens % BLOCK:
        whole_BNN[:, -1] = False  # the last block of queries is not full: the kernel has to look where it ends
    return BlockMask.from_kv_blocks(
        *_listed((seen_BNN & ~whole_BNN).unsqueeze(1)),
        *_listed(whole_BNN.unsqueeze(1)),
        BLOCK_SIZE=BLOCK,
        mask_mod=visible,
        seq_lengths=(tokens, tokens),
    )


def from_bounds(bounds_BT: Tensor) -> Callable[..., Tensor]:
    """Whether a query sees a key, for bounds that differ between sequences."""

    def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= bounds_BT[b, query])

    return visible


@lru_cache(maxsize=64)
def _unchanging_mask(tokens: int, window: int | None, device: torch.device) -> BlockMask:
    reach = tokens if window is None else window

    def causal(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key <= query

    def within_window(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query - key < reach)

    bounds_1T = _window_bounds(tokens, reach, device).unsqueeze(0)
    return make_block_mask(bounds_1T, causal if window is None else within_window)


def _window_bounds(tokens: int, window: int, device: torch.device) -> Tensor:
    return torch.arange(tokens, device=device).sub_(window - 1).clamp_(min=0)


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """How many of the last dimension are chosen, and their indices first in order: int32."""
    order = torch.argsort((~chosen).to(torch.int8), dim=-1, stable=True)
    return chosen.sum(-1, dtype=torch.int32), order.to(torch.int32)


@lru_cache(maxsize=1)
def _compiled() -> Attend:
    return torch.compile(flex_attention)
