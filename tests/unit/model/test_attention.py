"""Both attention kernels against a float64 softmax, and the memory they take."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gptscale.model.attention import attend
from gptscale.model.blocked_attention import QUERY_BLOCK, blocked_attention
from tests.helpers.memory import peak_bytes, saved_for_backward, storage_bytes


def plain(
    q_BTHW: Tensor, k_BTKW: Tensor, v_BTKW: Tensor, window: int | None = None, starts_BT: Tensor | None = None
) -> Tensor:
    q, k, v = (x.double().transpose(1, 2) for x in (q_BTHW, k_BTKW, v_BTKW))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    if window is not None:
        hidden = hidden | torch.ones(scores.shape[-2:], dtype=torch.bool).tril(-window)
    if starts_BT is not None:
        hidden = hidden | (torch.arange(scores.shape[-1]) < starts_BT.unsqueeze(-1)).unsqueeze(1)
    return (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v).transpose(1, 2)


def random_qkv(
    batch: int, tokens: int, heads: int, kv_heads: int, width: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    q = (2 * torch.randn(batch, tokens, heads, width)).to(dtype).requires_grad_()
    k = (2 * torch.randn(batch, tokens, kv_heads, width)).to(dtype).requires_grad_()
    v = torch.randn(batch, tokens, kv_heads, width).to(dtype).requires_grad_()
    return q, k, v


@pytest.mark.parametrize("kernel", ["blocked", "sdpa"])
@pytest.mark.parametrize(
    "shape",
    [
        (2, 1, 2, 2, 8),
        (3, 20, 4, 4, 16),
        (2, QUERY_BLOCK, 2, 1, 8),
        (2, QUERY_BLOCK + 1, 4, 2, 12),
        (1, 2 * QUERY_BLOCK + 57, 6, 2, 8),
    ],
)
def test_values_and_gradients(kernel: str, shape: tuple[int, int, int, int, int]) -> None:
    q, k, v = random_qkv(*shape)
    y = attend(q, k, v, kernel=kernel)  # type: ignore[arg-type]
    expected = plain(q, k, v)
    weights = torch.randn_like(y)
    assert y.shape == q.shape
    assert (y - expected).abs().max().item() < 1e-5
    # Noise is measured against the largest gradient of all three: with one token those of q and k are zero.
    made = torch.autograd.grad(y, (q, k, v), weights)
    right = torch.autograd.grad(expected, (q, k, v), weights.double())
    scale = max(g.abs().max().item() for g in right)
    for gradient, reference in zip(made, right, strict=True):
        assert (gradient - reference).abs().max().item() < 1e-5 * scale


@pytest.mark.parametrize("window", [None, 1, 5, QUERY_BLOCK, QUERY_BLOCK + 40, 10_000])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("tokens", [20, 2 * QUERY_BLOCK + 57])
def test_windows_and_documents(window: int | None, documents: bool, tokens: int) -> None:
    q, k, v = random_qkv(3, tokens, 4, 2, 8)
    starts_BT = document_starts(3, tokens) if documents else None
    y = blocked_attention(q, k, v, window=window, starts_BT=starts_BT)
    expected = plain(q, k, v, window, starts_BT)
    weights = torch.randn_like(y)
    assert (y - expected).abs().max().item() < 1e-5
    made = torch.autograd.grad(y, (q, k, v), weights)
    right = torch.autograd.grad(expected, (q, k, v), weights.double())
    scale = max(g.abs().max().item() for g in right)
    for gradient, reference in zip(made, right, strict=True):
        assert (gradient - reference).abs().max().item() < 1e-5 * scale
    # Controls: a wrong bound shows, where it is shorter than the documents are.
    if window is not None and window < (30 if documents else tokens):
        assert (y - plain(q, k, v, window + 1, starts_BT)).abs().max().item() > 1e-2
    if documents and window != 1:
        assert (y - plain(q, k, v, window)).abs().max().item() > 1e-2


def document_starts(batch: int, tokens: int) -> Tensor:
    """Rows with documents of 1 to 60 tokens, for each token the position where its own begins."""
    generator = torch.Generator().manual_seed(1)
    first_BT = torch.rand(batch, tokens, generator=generator) < 0.05
    first_BT[:, 0] = True
    return torch.where(first_BT, torch.arange(tokens), 0).cummax(1).values


def test_dropout_within_a_window() -> None:
    q, k, v = random_qkv(1, 6, 2, 1, 4, torch.float64)

    def dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        torch.manual_seed(11)
        return blocked_attention(q, k, v, 0.3, window=3, starts_BT=torch.tensor([[0, 0, 0, 0, 4, 4]]))

    assert torch.autograd.gradcheck(dropped, (q, k, v))


@pytest.mark.parametrize("kernel", ["blocked", "sdpa"])
def test_half_precision_follows(kernel: str) -> None:
    q, k, v = random_qkv(2, 150, 4, 2, 16, torch.bfloat16)
    y = attend(q, k, v, kernel=kernel)  # type: ignore[arg-type]
    assert y.dtype == torch.bfloat16
    assert (y - plain(q, k, v)).abs().max().item() < 0.06


def test_a_mask_says_what_is_seen() -> None:
    q, k, v = random_qkv(2, 6, 4, 2, 8)
    tail = q[:, 4:]
    visible = (torch.arange(6) <= torch.tensor([[4], [5]])).expand(2, 2, 6)
    assert torch.allclose(attend(tail, k, v, visible_BTS=visible).double(), plain(q, k, v)[:, 4:], atol=1e-5)


def test_dropout_of_blocked_attention() -> None:
    q, k, v = random_qkv(1, 6, 2, 1, 4, torch.float64)

    def dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        torch.manual_seed(11)
        return blocked_attention(q, k, v, dropout=0.3)

    # Numerical and analytical gradients agree only if backward meets the masks that forward drew.
    assert torch.autograd.gradcheck(dropped, (q, k, v))
    assert not torch.allclose(dropped(q, k, v), plain(q, k, v))
    torch.manual_seed(0)
    mean = torch.stack([blocked_attention(q, k, v, dropout=0.3) for _ in range(800)]).mean(0)
    assert (mean - plain(q, k, v)).abs().max().item() < 0.15


def test_choice_of_kernel() -> None:
    def used(dtype: torch.dtype, tokens: int, dropout: float) -> str:
        q, k, v = random_qkv(1, tokens, 1, 1, 8, dtype)
        node = attend(q, k, v, dropout).grad_fn
        assert node is not None
        return "blocked" if "BlockedAttention" in node.name() else "sdpa"

    assert used(torch.float32, 64, 0.0) == "sdpa"
    assert used(torch.float32, 64, 0.1) == "blocked"
    assert used(torch.bfloat16, 256, 0.0) == "blocked"
    assert used(torch.bfloat16, 257, 0.0) == "sdpa"


@pytest.mark.parametrize(
    ("kernel", "dropout", "window"),
    [("blocked", 0.0, None), ("auto", 0.1, None), ("auto", 0.0, None), ("auto", 0.0, 100)],
)
def test_memory_grows_with_tokens_and_not_with_their_square(kernel: str, dropout: float, window: int | None) -> None:
    heads, width, short, long = 4, 16, 256, 1024
    saved, peaks = {}, {}
    for tokens in (short, long):
        q, k, v = random_qkv(1, tokens, heads, heads, width)

        def step(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> None:
            attend(q, k, v, dropout, kernel, window).sum().backward()  # type: ignore[arg-type]

        saved[tokens] = storage_bytes(
            saved_for_backward(lambda q=q, k=k, v=v: attend(q, k, v, dropout, kernel, window))  # type: ignore[misc]
        )
        peaks[tokens] = peak_bytes(step)
    one_square_bytes = heads * long * long * 4
    assert saved[long] <= 4 * saved[short]
    # Four times the tokens: less than six times the memory, where squares would take sixteen times.
    assert peaks[long] < 6 * peaks[short]
    assert peaks[long] < one_square_bytes
    # Control: the same measure sees a plain softmax.
    assert peak_bytes(lambda: plain(q, k, v).sum().backward()) > one_square_bytes
