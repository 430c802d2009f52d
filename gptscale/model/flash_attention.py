"""Attention with FlashAttention's own kernels (Dao, arXiv 2307.08691): windows and documents skip what they hide.

Two builds of them: the package `flash_attn`, where it is installed, and the one inside torch for sequences of unequal
length (`torch.nn.attention.varlen`), without dropout. Both take documents as `cu_seqlens`, all of a batch in a row.

Shape legend: B batch, T tokens, H query heads, K key/value heads, W features of a head.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from gptscale.model.documents import Documents

MOST_HEAD_WIDTH = 256
LEAST_CAPABILITY = (8, 0)
"""Compute capability of the oldest GPUs that have these kernels (Ampere)."""


def attend_flash(
    q_BTHW: Tensor,
    k_BTKW: Tensor,
    v_BTKW: Tensor,
    dropout: float = 0.0,
    window: int | None = None,
    documents: Documents | None = None,
) -> Tensor:
    """The package's. Its window counts the tokens before a token, ours the token itself too."""
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    options = {
        "dropout_p": dropout,
        "causal": True,
        "window_size": (-1, -1) if window is None else (window - 1, 0),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    if documents is None:
        y_BTHW: Tensor = flash_attn_func(q_BTHW, k_BTKW, v_BTKW, **options)
        return y_BTHW
    q, k, v = (x.flatten(0, 1) for x in (q_BTHW, k_BTKW, v_BTKW))
    ends, longest = documents.cu_seqlens, documents.longest
    y: Tensor = flash_attn_varlen_func(q, k, v, ends, ends, longest, longest, **options)
    return y.view(q_BTHW.shape)


def attend_varlen(
    q_BTHW: Tensor,
    k_BTKW: Tensor,
    v_BTKW: Tensor,
    window: int | None = None,
    documents: Documents | None = None,
) -> Tensor:
    """Torch's. Sequences of one length are documents as well."""
    varlen = torch_varlen()
    assert varlen is not None
    batch, tokens = q_BTHW.shape[:2]
    ends = whole_rows(batch, tokens, q_BTHW.device) if documents is None else documents.cu_seqlens
    longest = tokens if documents is None else documents.longest
    y: Tensor = varlen(
        *(x.flatten(0, 1) for x in (q_BTHW, k_BTKW, v_BTKW)),
        ends,
        ends,
        longest,
        longest,
        window_size=(-1, 0) if window is None else (window - 1, 0),  # tokens before it, and none after
        enable_gqa=q_BTHW.shape[2] != k_BTKW.shape[2],
    )
    return y.view(q_BTHW.shape)


@lru_cache(maxsize=64)
def whole_rows(batch: int, tokens: int, device: torch.device) -> Tensor:
    """`cu_seqlens` of sequences of one length."""
    with torch.inference_mode(False):  # made while generating, it must still serve training
        return torch.arange(0, batch * tokens + 1, tokens, dtype=torch.int32, device=device)


@lru_cache(maxsize=1)
def torch_varlen() -> Callable[..., Any] | None:
    """Torch's function; None where this version lacks it, or windows and groups in it."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if {"window_size", "enable_gqa"} <= set(inspect.signature(varlen_attn).parameters) else None


def installed() -> bool:
    """Whether the package `flash_attn` can be used."""
    try:
        import flash_attn  # noqa: F401
    except ImportError:
        return False
    return True
