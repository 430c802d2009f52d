"""Causal attention as plain matrix products, one sequence and one block of queries at a time.

Nothing quadratic is kept: backward computes the probabilities again, dropout's masks included, and the [H, Q, S] scores
of a block are all that exists at once. Only of sequences of at most `KEPT_TOKENS` tokens are they kept, which are few
for so few tokens, and take half of the time to compute again. Blocks of queries skip the keys that no query of theirs
sees. Torch's own CPU kernel has no dropout, where it falls back to whole T×T scores (`attention.attend` says which is
used when). With AMX its forward is the faster one, and is taken here where it can be, its backward the slower.

Shape legend: B batch, T tokens, H query heads, K key/value heads, W features of a head, Q queries of a block,
S keys from the first that any of those queries sees to the block's end.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

QUERY_BLOCK, LARGE_QUERY_BLOCK, SMALL_QUERY_BLOCK = 128, 256, 64
"""Queries of a block. The large one in half precision with AMX, whose units like that, but not where there are bounds
or dropout: then smaller blocks have less to compute. The small one in fp32 where probabilities are kept."""
KEPT_TOKENS = 256
"""Of at most so many tokens the probabilities are kept on a CPU, where there is no dropout: at most 256 numbers for
each head and token, beside some 14 times a head's width of everything else that a layer keeps. Forward and backward
were measured 1.7 times as fast in bf16 as without (AVX512-BF16, 256 tokens), and 1.2 times in fp32."""


def blocked_attention(
    q_BTHW: Tensor,
    k_BTKW: Tensor,
    v_BTKW: Tensor,
    dropout: float = 0.0,
    window: int | None = None,
    starts_BT: Tensor | None = None,
) -> Tensor:
    """softmax(q kᵀ / √W, causal) v → [B, T, H, W], contiguous, in the type of q. H is a multiple of K.

    A token sees the last `window` tokens, itself included, and none before its document's start: `starts_BT` holds for
    each token the position in its row at which its document begins (int64, on the host).
    """
    group = q_BTHW.shape[2] // k_BTKW.shape[2]
    if group > 1:
        k_BTKW, v_BTKW = k_BTKW.repeat_interleave(group, dim=2), v_BTKW.repeat_interleave(group, dim=2)
    # Backward draws dropout's masks again from this seed. It comes from the global generator, so that activation
    # checkpointing, which restores that generator, meets the same masks.
    seed = int(torch.randint(2**62, (), device="cpu")) if dropout else 0
    y_BTHW: Tensor = _BlockedAttention.apply(  # type: ignore[no-untyped-call]
        q_BTHW, k_BTKW, v_BTKW, dropout, seed, window, starts_BT
    )
    return y_BTHW


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_BTHW: Tensor,
        k_BTHW: Tensor,
        v_BTHW: Tensor,
        dropout: float,
        seed: int,
        window: int | None,
        starts_BT: Tensor | None,
    ) -> Tensor:
        ctx.settings = (dropout, seed, window, starts_BT)
        keeps = _keeps(q_BTHW, dropout)
        # Torch's own forward takes half as long there, and its backward longer.
        if not keeps and _has_amx(q_BTHW) and _is_plain(dropout, window, starts_BT):
            ctx.save_for_backward(q_BTHW, k_BTHW, v_BTHW)
            q_BHTW, k_BHTW, v_BHTW = (tensor.transpose(1, 2) for tensor in (q_BTHW, k_BTHW, v_BTHW))
            y_BHTW = F.scaled_dot_product_attention(q_BHTW, k_BHTW, v_BHTW, is_causal=True)
            return y_BHTW.transpose(1, 2).contiguous()
        blocks = _Blocks(q_BTHW, *ctx.settings)
        q_BTHW, k_BTHW, v_BTHW = _by_heads(q_BTHW, k_BTHW, v_BTHW)
        y_BTHW = torch.empty_like(q_BTHW)
        kept: list[Tensor] = []
        for b in range(len(q_BTHW)):
            q_HTW, k_HTW, v_HTW, y_HTW = _heads_first(b, q_BTHW, k_BTHW, v_BTHW, y_BTHW)
            for block in blocks.of_row(b):
                p_HQS, kept_HQS = blocks.probabilities(q_HTW, k_HTW, block)
                used_HQS = p_HQS if kept_HQS is None else p_HQS.mul_(kept_HQS)
                torch.bmm(used_HQS, v_HTW[:, block.keys], out=y_HTW[:, block.queries])
                if keeps:
                    kept.append(p_HQS)
        ctx.save_for_backward(q_BTHW, k_BTHW, v_BTHW, *kept)
        return y_BTHW.contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad_y_BTHW,) = grads
        q_BTHW, k_BTHW, v_BTHW, *kept = ctx.saved_tensors  # asked for once: activation checkpointing allows no more
        blocks = _Blocks(q_BTHW, *ctx.settings)
        q_BTHW, k_BTHW, v_BTHW, grad_y_BTHW = _by_heads(q_BTHW, k_BTHW, v_BTHW, grad_y_BTHW)
        # Without a lower bound the first block sees every key: it writes their gradients, the others add to them.
        make = torch.zeros_like if blocks.bounded else torch.empty_like
        grad_q_BTHW, grad_k_BTHW, grad_v_BTHW = torch.empty_like(q_BTHW), make(k_BTHW), make(v_BTHW)
        known = iter(kept)
        for b in range(len(q_BTHW)):
            q_HTW, k_HTW, v_HTW, grad_y_HTW = _heads_first(b, q_BTHW, k_BTHW, v_BTHW, grad_y_BTHW)
            grad_q_HTW, grad_k_HTW, grad_v_HTW = _heads_first(b, grad_q_BTHW, grad_k_BTHW, grad_v_BTHW)
            for block in blocks.of_row(b):
                if kept:
                    p_HQS, kept_HQS = next(known), None
                else:
                    p_HQS, kept_HQS = blocks.probabilities(q_HTW, k_HTW, block)
                q_HQW, k_HSW, grad_y_HQW = q_HTW[:, block.queries], k_HTW[:, block.keys], grad_y_HTW[:, block.queries]
                grad_k_HSW, grad_v_HSW = grad_k_HTW[:, block.keys], grad_v_HTW[:, block.keys]
                beta = 1 if blocks.bounded or block.end < q_BTHW.shape[1] else 0
                used_HQS = p_HQS if kept_HQS is None else p_HQS * kept_HQS
                torch.baddbmm(grad_v_HSW, used_HQS.transpose(1, 2), grad_y_HQW, beta=beta, out=grad_v_HSW)
                grad_p_HQS = torch.bmm(grad_y_HQW, v_HTW[:, block.keys].transpose(1, 2), out=blocks.scores(block))
                if kept_HQS is not None:
                    grad_p_HQS *= kept_HQS
                grad_s_HQS = torch._softmax_backward_data(grad_p_HQS, p_HQS, -1, p_HQS.dtype, grad_input=grad_p_HQS)
                grad_q_HQW = grad_q_HTW[:, block.queries]
                torch.baddbmm(grad_q_HQW, grad_s_HQS, k_HSW, beta=0, alpha=blocks.scale, out=grad_q_HQW)
                grad_s_HSQ = grad_s_HQS.transpose(1, 2)
                torch.baddbmm(grad_k_HSW, grad_s_HSQ, q_HQW, beta=beta, alpha=blocks.scale, out=grad_k_HSW)
        return grad_q_BTHW.contiguous(), grad_k_BTHW.contiguous(), grad_v_BTHW.contiguous(), None, None, None, None


class _Block(NamedTuple):
    """Queries [start, end), which see keys from `first` on; `bounds_Q`, unless None, has each one's own first key."""

    start: int
    end: int
    first: int
    bounds_Q: Tensor | None

    @property
    def queries(self) -> slice:
        return slice(self.start, self.end)

    @property
    def keys(self) -> slice:
        return slice(self.first, self.end)


class _Blocks:
    """The blocks of queries, last one first, with scratch that all of them share."""

    def __init__(self, q_BTHW: Tensor, dropout: float, seed: int, window: int | None, starts_BT: Tensor | None) -> None:
        _, tokens, self.heads, width = q_BTHW.shape
        self._keeps = _keeps(q_BTHW, dropout)
        if _has_amx(q_BTHW) and _is_plain(dropout, window, starts_BT):
            wanted = LARGE_QUERY_BLOCK
        else:
            wanted = SMALL_QUERY_BLOCK if self._keeps and not _half_on_host(q_BTHW) else QUERY_BLOCK
        size = min(wanted, tokens)
        self.ranges = [(start, min(start + size, tokens)) for start in reversed(range(0, tokens, size))]
        self.scale = width**-0.5
        self.future_QQ = q_BTHW.new_full((size, size), -torch.inf).triu_(1)
        self.keep = 1.0 - dropout
        self.generator = torch.Generator(q_BTHW.device).manual_seed(seed) if dropout else None
        self.bounded = window is not None or starts_BT is not None
        self._starts_BT = starts_BT
        self._window_T = None if window is None else torch.arange(tokens).sub_(window - 1).clamp_(min=0)
        longest = tokens if window is None else min(tokens, window + size - 1)
        self._scores = q_BTHW.new_empty(self.heads * size * longest)
        self._probabilities = None if self._keeps else torch.empty_like(self._scores)

    def of_row(self, b: int) -> Iterator[_Block]:
        """The blocks of sequence b."""
        bounds_T = self._window_T
        if self._starts_BT is not None:
            starts_T = self._starts_BT[b]
            bounds_T = starts_T if bounds_T is None else torch.maximum(bounds_T, starts_T)
        for start, end in self.ranges:
            if bounds_T is None:
                yield _Block(start, end, 0, None)
            else:
                bounds_Q = bounds_T[start:end]
                first, last = int(bounds_Q[0]), int(bounds_Q[-1])
                yield _Block(start, end, first, bounds_Q if first < last else None)

    def scores(self, block: _Block) -> Tensor:
        """Scratch [H, Q, S]."""
        queries, keys = block.end - block.start, block.end - block.first
        return self._scores[: self.heads * queries * keys].view(self.heads, queries, keys)

    def probabilities(self, q_HTW: Tensor, k_HTW: Tensor, block: _Block) -> tuple[Tensor, Tensor | None]:
        """Probabilities [H, Q, S], in scratch where they are not kept, and where dropout is on the factor of each: 0 or
        1/keep."""
        s_HQS = self.scores(block)
        queries = block.end - block.start
        k_HWS = k_HTW[:, block.keys].transpose(1, 2)
        torch.baddbmm(s_HQS, q_HTW[:, block.queries], k_HWS, beta=0, alpha=self.scale, out=s_HQS)
        s_HQS[:, :, block.start - block.first :] += self.future_QQ[:queries, :queries]
        if block.bounds_Q is not None:
            # Bounds only rise along the row: beyond the last query's every key is seen, as far as causality lets it.
            keys_S = torch.arange(block.first, int(block.bounds_Q[-1]))
            hidden_QS = (keys_S < block.bounds_Q.unsqueeze(1)).to(s_HQS.device)
            s_HQS[:, :, : len(keys_S)].masked_fill_(hidden_QS, -torch.inf)
        if self._probabilities is None:
            return torch._softmax(s_HQS, -1, False), None
        p_HQS = self._probabilities[: s_HQS.numel()].view(s_HQS.shape)
        torch._softmax(s_HQS, -1, False, out=p_HQS)
        if self.generator is None:
            return p_HQS, None
        kept_HQS = torch.empty_like(p_HQS).bernoulli_(self.keep, generator=self.generator)
        return p_HQS, kept_HQS.div_(self.keep)


def _keeps(q_BTHW: Tensor, dropout: float) -> bool:
    """Whether probabilities are kept for backward."""
    return q_BTHW.device.type == "cpu" and q_BTHW.shape[1] <= KEPT_TOKENS and not dropout


def _has_amx(tensor: Tensor) -> bool:
    """Whether products of it are made by AMX's units."""
    return _half_on_host(tensor) and torch.cpu._is_amx_tile_supported()


def _half_on_host(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype.itemsize == 2


def _is_plain(dropout: float, window: int | None, starts_BT: Tensor | None) -> bool:
    return not dropout and window is None and starts_BT is None


def _by_heads(*tensors_BTHW: Tensor) -> list[Tensor]:
    """As [B, T, H, W], but each head's tokens one after the other in memory where products want that.

    A CPU's half-precision products take up to twice as long of rows that lie apart; its fp32 ones do not mind.
    """
    if not _half_on_host(tensors_BTHW[0]):
        return list(tensors_BTHW)
    return [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in tensors_BTHW]


def _heads_first(b: int, *tensors_BTHW: Tensor) -> list[Tensor]:
    """Sequence b of each as a view [H, T, W], which a BLAS takes as it is."""
    return [tensor_BTHW[b].transpose(0, 1) for tensor_BTHW in tensors_BTHW]
