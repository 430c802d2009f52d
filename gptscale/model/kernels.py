"""The attention kernels there are, and what each can do. None of them holds anything of T×T.

Shape legend: B batch, T tokens, H query heads, K key/value heads, W features of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gptscale.model.blocked_attention import blocked_attention
from gptscale.model.documents import Documents
from gptscale.model.flash_attention import (
    LEAST_CAPABILITY,
    MOST_HEAD_WIDTH,
    attend_flash,
    attend_varlen,
    installed,
    torch_varlen,
)
from gptscale.model.flex_attention import LEAST_HEAD_WIDTH, attend_flex

KernelName = Literal["blocked", "sdpa", "flex", "flash", "varlen"]

BLOCKED_MAX_TOKENS = 256
"""Up to this length the rule takes `blocked` for half precision on a CPU."""


class Case(NamedTuple):
    """What is asked of a kernel."""

    device: torch.device
    dtype: torch.dtype
    tokens: int
    head_width: int
    dropout: float
    window: int | None
    documents: bool

    @classmethod
    def of(cls, q_BTHW: Tensor, dropout: float, window: int | None, documents: Documents | None) -> Case:
        """A window that reaches over the whole sequence is none."""
        tokens, width = q_BTHW.shape[1], q_BTHW.shape[3]
        window = None if window is None or window >= tokens else window
        return cls(q_BTHW.device, q_BTHW.dtype, tokens, width, dropout, window, documents is not None)


Refusal = str | None
"""Why a kernel cannot do a case; None where it can."""


@dataclass(frozen=True)
class Kernel:
    """`attend(q_BTHW, k_BTKW, v_BTKW, dropout, window, documents)` → [B, T, H, W]; grouped heads are its own affair."""

    attend: Callable[[Tensor, Tensor, Tensor, float, int | None, Documents | None], Tensor]
    refusal: Callable[[Case], Refusal]
    windows: bool = True
    """Whether it has windows and documents at all."""


def _blocked(
    q_BTHW: Tensor, k_BTKW: Tensor, v_BTKW: Tensor, dropout: float, window: int | None, documents: Documents | None
) -> Tensor:
    starts_BT = None if documents is None else documents.starts_BT
    return blocked_attention(q_BTHW, k_BTKW, v_BTKW, dropout, window, starts_BT)


def _sdpa(
    q_BTHW: Tensor, k_BTKW: Tensor, v_BTKW: Tensor, dropout: float, window: int | None, documents: Documents | None
) -> Tensor:
    return torch_attention(q_BTHW, k_BTKW, v_BTKW, dropout)


def torch_attention(
    q_BTHW: Tensor, k_BSKW: Tensor, v_BSKW: Tensor, dropout: float = 0.0, visible_BTS: Tensor | None = None
) -> Tensor:
    """Torch's `scaled_dot_product_attention`: causal, or as `visible_BTS` says, which then is a T×S mask."""
    grouped = q_BTHW.shape[2] != k_BSKW.shape[2]
    if grouped and q_BTHW.device.type == "cuda" and q_BTHW.element_size() > 2:
        # Torch's CUDA kernel for wide types takes no groups: it would fall back to whole T×T scores.
        group = q_BTHW.shape[2] // k_BSKW.shape[2]
        k_BSKW, v_BSKW = k_BSKW.repeat_interleave(group, dim=2), v_BSKW.repeat_interleave(group, dim=2)
        grouped = False
    y_BHTW = F.scaled_dot_product_attention(
        q_BTHW.transpose(1, 2),
        k_BSKW.transpose(1, 2),
        v_BSKW.transpose(1, 2),
        attn_mask=None if visible_BTS is None else visible_BTS.unsqueeze(1),
        dropout_p=dropout,
        is_causal=visible_BTS is None,
        enable_gqa=grouped,
    )
    return y_BHTW.transpose(1, 2)


def _sdpa_refusal(case: Case) -> Refusal:
    if case.window is not None or case.documents:
        return "it would need a whole T×T mask for windows and documents"
    if case.dropout and case.device.type == "cpu":
        return "torch has no CPU kernel with dropout: it would hold T×T scores"
    return None


def _flex_refusal(case: Case) -> Refusal:
    if case.device.type != "cuda":
        return "torch has its backward on CUDA only"
    if case.dropout:
        return "it has no dropout"
    if case.head_width < LEAST_HEAD_WIDTH:
        return f"its heads have at least {LEAST_HEAD_WIDTH} features"
    return None


def _flash_refusal(case: Case) -> Refusal:
    if not installed():
        return "the package flash-attn is not installed"
    return _no_flash_hardware(case)


def _varlen_refusal(case: Case) -> Refusal:
    if torch_varlen() is None:
        return "this torch has no varlen_attn with windows and grouped heads"
    if case.dropout:
        return "it has no dropout"
    if case.head_width % 8:
        return "its heads have a multiple of 8 features"
    return _no_flash_hardware(case)


def _no_flash_hardware(case: Case) -> Refusal:
    if case.device.type != "cuda":
        return "it runs on CUDA only"
    if case.dtype not in (torch.bfloat16, torch.float16):
        return "it computes in bf16 and fp16 only"
    if case.head_width > MOST_HEAD_WIDTH:
        return f"its heads have at most {MOST_HEAD_WIDTH} features"
    if torch.cuda.get_device_capability(case.device) < LEAST_CAPABILITY:
        return "it needs an Ampere GPU or a newer one"
    return None


KERNELS: dict[KernelName, Kernel] = {
    "blocked": Kernel(_blocked, lambda case: None),
    "sdpa": Kernel(_sdpa, _sdpa_refusal, windows=False),
    "flex": Kernel(lambda q, k, v, dropout, window, documents: attend_flex(q, k, v, window, documents), _flex_refusal),
    "flash": Kernel(attend_flash, _flash_refusal),
    "varlen": Kernel(
        lambda q, k, v, dropout, window, documents: attend_varlen(q, k, v, window, documents), _varlen_refusal
    ),
}


def rule(case: Case) -> KernelName:
    """The kernel that is taken without timing: torch's `sdpa` where it can, `blocked` elsewhere.

    And `blocked` in half precision up to `BLOCKED_MAX_TOKENS` tokens on a CPU that multiplies bf16 itself: forward and
    backward were measured 1.6 times as fast at 256 tokens on one with AMX, before it kept probabilities, and twice on
    one with AVX512-BF16. Where products are emulated it was measured 3 to 15 times slower.
    """
    short = case.dtype.itemsize == 2 and case.tokens <= BLOCKED_MAX_TOKENS
    short = short and case.device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return "blocked" if short or _sdpa_refusal(case) is not None else "sdpa"


def able(case: Case) -> list[KernelName]:
    """Every kernel that can do it, the rule's first."""
    first = rule(case)
    return [first, *(name for name, kernel in KERNELS.items() if name != first and kernel.refusal(case) is None)]
