"""Causal attention as plain matrix products, one sequence and one block of queries at a time.

Nothing quadratic is kept: backward computes the probabilities again, dropout's masks included, and the [H, Q, S] scores
of a block are all that exists at once. Blocks of queries skip the keys that causality hides. Torch's own CPU kernel is
faster in fp32 but has no dropout, where it falls back to whole T×T scores (`attention.attend` says which is used when).

Shape legend: B batch, T tokens, H query heads, K key/value heads, W features of a head, Q queries of a block,
S keys those queries may see (all up to the block's end).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

QUERY_BLOCK = 128
"""Queries of a block."""


def blocked_attention(q_BTHW: Tensor, k_BTKW: Tensor, v_BTKW: Tensor, dropout: float = 0.0) -> Tensor:
    """softmax(q kᵀ / √W, causal) v → [B, T, H, W], contiguous, in the type of q. H is a multiple of K."""
    group = q_BTHW.shape[2] // k_BTKW.shape[2]
    if group > 1:
        k_BTKW, v_BTKW = k_BTKW.repeat_interleave(group, dim=2), v_BTKW.repeat_interleave(group, dim=2)
    # Backward draws dropout's masks again from this seed. It comes from the global generator, so that activation
    # checkpointing, which restores that generator, meets the same masks.
    seed = int(torch.randint(2**62, (), device="cpu")) if dropout else 0
    y_BTHW: Tensor = _BlockedAttention.apply(q_BTHW, k_BTKW, v_BTKW, dropout, seed)  # type: ignore[no-untyped-call]
    return y_BTHW


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BTHW: Tensor, k_BTHW: Tensor, v_BTHW: Tensor, dropout: float, seed: int) -> Tensor:
        ctx.save_for_backward(q_BTHW, k_BTHW, v_BTHW)
        ctx.dropout, ctx.seed = dropout, seed
        y_BTHW = torch.empty_like(q_BTHW, memory_format=torch.contiguous_format)
        blocks = _Blocks(q_BTHW, dropout, seed)
        for b in range(len(q_BTHW)):
            q_HTW, k_HTW, v_HTW, y_HTW = _heads_first(b, q_BTHW, k_BTHW, v_BTHW, y_BTHW)
            for start, end in blocks.ranges:
                p_HQS, kept_HQS = blocks.probabilities(q_HTW, k_HTW, start, end)
                used_HQS = p_HQS if kept_HQS is None else p_HQS.mul_(kept_HQS)
                torch.bmm(used_HQS, v_HTW[:, :end], out=y_HTW[:, start:end])
        return y_BTHW

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad_y_BTHW,) = grads
        saved = ctx.saved_tensors  # asked for once: activation checkpointing allows no more
        q_BTHW, k_BTHW, v_BTHW = saved
        grad_q_BTHW, grad_k_BTHW, grad_v_BTHW = (
            torch.empty_like(x, memory_format=torch.contiguous_format) for x in saved
        )
        blocks = _Blocks(q_BTHW, ctx.dropout, ctx.seed)
        for b in range(len(q_BTHW)):
            q_HTW, k_HTW, v_HTW, grad_y_HTW = _heads_first(b, q_BTHW, k_BTHW, v_BTHW, grad_y_BTHW)
            grad_q_HTW, grad_k_HTW, grad_v_HTW = _heads_first(b, grad_q_BTHW, grad_k_BTHW, grad_v_BTHW)
            for start, end in blocks.ranges:
                p_HQS, kept_HQS = blocks.probabilities(q_HTW, k_HTW, start, end)
                q_HQW, k_HSW, grad_y_HQW = q_HTW[:, start:end], k_HTW[:, :end], grad_y_HTW[:, start:end]
                grad_k_HSW, grad_v_HSW = grad_k_HTW[:, :end], grad_v_HTW[:, :end]
                # The first block sees every key: it writes the gradients of keys and values, the others add to them.
                beta = 0 if end == q_BTHW.shape[1] else 1
                used_HQS = p_HQS if kept_HQS is None else p_HQS * kept_HQS
                torch.baddbmm(grad_v_HSW, used_HQS.transpose(1, 2), grad_y_HQW, beta=beta, out=grad_v_HSW)
                grad_p_HQS = torch.bmm(grad_y_HQW, v_HTW[:, :end].transpose(1, 2), out=blocks.scores(start, end))
                if kept_HQS is not None:
                    grad_p_HQS *= kept_HQS
                grad_s_HQS = torch._softmax_backward_data(grad_p_HQS, p_HQS, -1, p_HQS.dtype, grad_input=grad_p_HQS)
                grad_q_HQW = grad_q_HTW[:, start:end]
                torch.baddbmm(grad_q_HQW, grad_s_HQS, k_HSW, beta=0, alpha=blocks.scale, out=grad_q_HQW)
                grad_s_HSQ = grad_s_HQS.transpose(1, 2)
                torch.baddbmm(grad_k_HSW, grad_s_HSQ, q_HQW, beta=beta, alpha=blocks.scale, out=grad_k_HSW)
        return grad_q_BTHW, grad_k_BTHW, grad_v_BTHW, None, None


class _Blocks:
    """The blocks of queries, last one first, with scratch that all of them share."""

    def __init__(self, q_BTHW: Tensor, dropout: float, seed: int) -> None:
        _, tokens, self.heads, width = q_BTHW.shape
        size = min(QUERY_BLOCK, tokens)
        self.ranges = [(start, min(start + size, tokens)) for start in reversed(range(0, tokens, size))]
        self.scale = width**-0.5
        self.future_QQ = q_BTHW.new_full((size, size), -torch.inf).triu_(1)
        self.keep = 1.0 - dropout
        self.generator = torch.Generator(q_BTHW.device).manual_seed(seed) if dropout else None
        self._scores = q_BTHW.new_empty(self.heads * size * tokens)
        self._probabilities = torch.empty_like(self._scores)

    def scores(self, start: int, end: int) -> Tensor:
        """Scratch [H, Q, S]."""
        return self._scores[: self.heads * (end - start) * end].view(self.heads, end - start, end)

    def probabilities(self, q_HTW: Tensor, k_HTW: Tensor, start: int, end: int) -> tuple[Tensor, Tensor | None]:
        """Probabilities [H, Q, S] in scratch, and where dropout is on the factor of each: 0 or 1/keep."""
        s_HQS = self.scores(start, end)
        k_HWS = k_HTW[:, :end].transpose(1, 2)
        torch.baddbmm(s_HQS, q_HTW[:, start:end], k_HWS, beta=0, alpha=self.scale, out=s_HQS)
        s_HQS[:, :, start:] += self.future_QQ[: end - start, : end - start]
        p_HQS = self._probabilities[: s_HQS.numel()].view(s_HQS.shape)
        torch._softmax(s_HQS, -1, False, out=p_HQS)
        if self.generator is None:
            return p_HQS, None
        kept_HQS = torch.empty_like(p_HQS).bernoulli_(self.keep, generator=self.generator)
        return p_HQS, kept_HQS.div_(self.keep)


def _heads_first(b: int, *tensors_BTHW: Tensor) -> list[Tensor]:
    """Sequence b of each as a view [H, T, W], which a BLAS takes as it is."""
    return [tensor_BTHW[b].transpose(0, 1) for tensor_BTHW in tensors_BTHW]
