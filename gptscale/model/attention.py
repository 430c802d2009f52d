"""Causal self-attention with grouped key/value heads, over all that came before or a window of it.

Shape legend: B batch, T new tokens, S tokens seen, D width, H query heads, K key/value heads, W features of a head.
"""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from gptscale.config.schema import ModelConfig
from gptscale.config.shape import head_width, kv_heads, qkv_bias, window_of_layer
from gptscale.model.documents import Documents
from gptscale.model.kernels import KERNELS, Case, KernelName, rule, torch_attention
from gptscale.model.linear import Again, Linear
from gptscale.model.norm import RMSNorm
from gptscale.model.positions import RotaryTable, Turns, rotate

AttentionKernel = KernelName | Literal["auto"]
LayerKind = Literal["full", "window"]
"""As in `model.attention_pattern`."""


class LayerCache(Protocol):
    """What attention needs of one layer's cache while it generates (`gptscale.generate.cache` has one)."""

    positions_BT: Tensor
    """Positions of the new tokens, int64."""
    visible_BTS: Tensor | None
    """True where a new token may look; None where the new tokens are the whole sequence and plain causality holds."""

    def extend(self, k_BTKW: Tensor, v_BTKW: Tensor) -> tuple[Tensor, Tensor]:
        """Stores the new keys and values; returns all that are held, [B, S, K, W] each."""


class Attention(nn.Module):
    """softmax(q kᵀ / √W, causal) v between projections q, k, v and o.

    With `qk_norm` the queries and keys of each head are normalised before they turn (Henry et al., arXiv 2010.04245, as
    Qwen3 has it). Heads are counted from the projections' real width, so projections that hold a slice of the heads
    just work.
    """

    def __init__(self, config: ModelConfig, layer: int, rotary: RotaryTable | None) -> None:
        super().__init__()
        self.head_width = head_width(config)
        self.window = window_of_layer(config, layer)
        self.kind: LayerKind = "full" if self.window is None else "window"
        self.dropout = config.dropout
        self.rotary = rotary
        self.kernel: AttentionKernel = "auto"
        """What training uses; evaluation too, unless training has dropout, which only some kernels have."""
        q_width, kv_width = config.heads * self.head_width, kv_heads(config) * self.head_width
        self.q = Linear(config.width, q_width, qkv_bias(config))
        self.k = Linear(config.width, kv_width, qkv_bias(config))
        self.v = Linear(config.width, kv_width, qkv_bias(config))
        self.o = Linear(q_width, config.width, config.bias)
        self.q_norm = RMSNorm(self.head_width, config.norm_epsilon) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_width, config.norm_epsilon) if config.qk_norm else None

    def forward(self, x_BTD: Tensor, cache: LayerCache | None = None, documents: Documents | None = None) -> Tensor:
        q_BTHW, k_BTKW, v_BTKW = self.project(x_BTD, self.turns(x_BTD, cache))
        return self.output(self.attend(q_BTHW, k_BTKW, v_BTKW, cache, documents))

    def turns(self, x_BTD: Tensor, cache: LayerCache | None = None) -> Turns | None:
        """By how much queries and keys turn; None without rotary positions."""
        if self.rotary is None:
            return None
        return self.rotary.turns(x_BTD.shape[1], x_BTD.device, None if cache is None else cache.positions_BT)

    def project(self, x_BTD: Tensor, turns: Turns | None, again: Again | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, T, H, W], keys and values [B, T, K, W] of the new tokens; `again` makes x in backward."""
        batch, tokens, _ = x_BTD.shape
        q_BTHW = self.q(x_BTD, again).view(batch, tokens, -1, self.head_width)
        k_BTKW = self.k(x_BTD, again).view(batch, tokens, -1, self.head_width)
        v_BTKW = self.v(x_BTD, again).view(batch, tokens, -1, self.head_width)
        if self.q_norm is not None and self.k_norm is not None:
            q_BTHW, k_BTKW = self.q_norm(q_BTHW), self.k_norm(k_BTKW)
        if turns is not None:
            q_BTHW, k_BTKW = rotate(q_BTHW, turns), rotate(k_BTKW, turns)
        return q_BTHW, k_BTKW, v_BTKW

    def attend(
        self,
        q_BTHW: Tensor,
        k_BTKW: Tensor,
        v_BTKW: Tensor,
        cache: LayerCache | None = None,
        documents: Documents | None = None,
    ) -> Tensor:
        """What each new token makes of all that it sees: [B, T, H, W]."""
        visible_BTS = None
        if cache is not None:
            k_BTKW, v_BTKW = cache.extend(k_BTKW, v_BTKW)
            visible_BTS = self._within_window(cache)
        dropout = self.dropout if self.training else 0.0
        kernel: AttentionKernel = self.kernel if dropout == self.dropout else "auto"
        return attend(q_BTHW, k_BTKW, v_BTKW, dropout, kernel, self.window, visible_BTS, documents)

    def output(self, y_BTHW: Tensor) -> Tensor:
        """What goes back into the residual stream: [B, T, D]."""
        y_BTD: Tensor = self.o(y_BTHW.flatten(2))
        return y_BTD

    def _within_window(self, cache: LayerCache) -> Tensor | None:
        """What the new tokens may see of the cache, in this layer."""
        if cache.visible_BTS is None or self.window is None:
            return cache.visible_BTS
        slots_S = torch.arange(cache.visible_BTS.shape[-1], device=cache.visible_BTS.device)
        return cache.visible_BTS & (slots_S > cache.positions_BT.unsqueeze(2) - self.window)


def attend(
    q_BTHW: Tensor,
    k_BSKW: Tensor,
    v_BSKW: Tensor,
    dropout: float = 0.0,
    kernel: AttentionKernel = "auto",
    window: int | None = None,
    visible_BTS: Tensor | None = None,
    documents: Documents | None = None,
) -> Tensor:
    """Attention over [B, T, heads, W] layouts → [B, T, H, W]; causal, or as `visible_BTS` says where it is given.

    A token sees the last `window` tokens, itself included, or all where there is none, and none before its document.
    `auto` takes a kernel by rule (`gptscale.model.kernels.rule`). Raises ValueError where the one named cannot do it.
    """
    if visible_BTS is not None:
        return torch_attention(q_BTHW, k_BSKW, v_BSKW, dropout, visible_BTS)
    case = Case.of(q_BTHW, dropout, window, documents)
    if kernel == "auto":
        kernel = rule(case)
    elif (why := KERNELS[kernel].refusal(case)) is not None:
        raise ValueError(f"attention kernel {kernel} cannot do {case}: {why}")
    return KERNELS[kernel].attend(q_BTHW, k_BSKW, v_BSKW, dropout, case.window, documents)
