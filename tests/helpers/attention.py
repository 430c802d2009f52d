"""Attention as a whole softmax in float64, inputs for it, and the comparison of a kernel with it.

Shape legend: B batch, T tokens, H query heads, K key/value heads, W features of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gptscale.model.attention import attend
from gptscale.model.documents import Documents
from gptscale.model.kernels import KernelName

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Largest difference as a share of the largest value. fp32: rounding of sums in another order, measured up to 2e-6.
Half types round probabilities and results to 8 or 11 bits (2⁻⁸ is 4e-3, 2⁻¹¹ is 5e-4), several times over."""


def plain(
    q_BTHW: Tensor,
    k_BTKW: Tensor,
    v_BTKW: Tensor,
    window: int | None = None,
    starts_BT: Tensor | None = None,
    scaled: bool = True,
) -> Tensor:
    q, k, v = (x.double().transpose(1, 2) for x in (q_BTHW, k_BTKW, v_BTKW))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scaled else 1.0)
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    if window is not None:
        hidden = hidden | torch.ones_like(hidden).tril(-window)
    if starts_BT is not None:
        tokens = torch.arange(scores.shape[-1], device=q.device)
        hidden = hidden | (tokens < starts_BT.to(q.device).unsqueeze(-1)).unsqueeze(1)
    return (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v).transpose(1, 2)


def random_qkv(
    batch: int,
    tokens: int,
    heads: int,
    kv_heads: int,
    width: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys of standard deviation 2, so that a wrong mask or scale shows; they want gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((heads, 2.0), (kv_heads, 2.0), (kv_heads, 1.0))
    q, k, v = (
        (std * torch.randn(batch, tokens, count, width, generator=generator)).to(device, dtype).requires_grad_()
        for count, std in shapes
    )
    return q, k, v


def document_starts(batch: int, tokens: int) -> Tensor:
    """Rows with documents of 1 to 60 tokens, for each token the position where its own begins."""
    generator = torch.Generator().manual_seed(1)
    first_BT = torch.rand(batch, tokens, generator=generator) < 0.05
    first_BT[:, 0] = True
    return torch.where(first_BT, torch.arange(tokens), 0).cummax(1).values


def packed(*rows: list[int]) -> Tensor:
    """Rows of documents of these lengths, for each token the position where its own begins."""
    return torch.stack([torch.cat([torch.full((n,), sum(row[:i])) for i, n in enumerate(row)]) for row in rows])


def check_kernel(
    kernel: KernelName,
    tokens: int,
    window: int | None = None,
    documents: bool = False,
    heads: tuple[int, int] = (4, 2),
    width: int = 16,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> None:
    """Values and all gradients of a kernel, grouped heads included; and that masks off by one, or no scale, show."""
    q, k, v = random_qkv(3, tokens, *heads, width, dtype, device)
    starts_BT = document_starts(3, tokens) if documents else None
    y = attend(q, k, v, 0.0, kernel, window, documents=None if starts_BT is None else Documents(starts_BT, device))
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(device)
    made = [y.double(), *(g.double() for g in torch.autograd.grad(y, (q, k, v), weights.to(dtype)))]

    def off(window: int | None, starts_BT: Tensor | None, scaled: bool = True) -> float:
        """Gradients are measured against the largest of all three: with one token those of q and k are zero."""
        exact = plain(q, k, v, window, starts_BT, scaled)
        right = torch.autograd.grad(exact, (q, k, v), weights.double())
        largest = max(g.double().abs().max().item() for g in right)
        differences = [(made[0] - exact).abs().max().item() / exact.abs().max().item()]
        differences += [(g - r).abs().max().item() / largest for g, r in zip(made[1:], right, strict=True)]
        return max(differences)

    limit = TOLERANCES[dtype]
    found = off(window, starts_BT)
    assert found < limit, f"{kernel}, {tokens} tokens, window {window}, documents {documents}: {found:.1e}"
    if tokens > 1 and window != 1:
        assert off(window, starts_BT, scaled=False) > 10 * limit
    longest = 60 if documents else tokens
    if window is not None and window < min(longest, tokens) // 2:
        assert off(window + 1, starts_BT) > 10 * limit
    if starts_BT is not None and window != 1:
        assert off(window, None) > 10 * limit
        assert off(window, torch.minimum(starts_BT + 1, torch.arange(tokens))) > 10 * limit
