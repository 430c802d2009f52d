"""Both attention kernels against a float64 softmax, and the memory they take."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gptscale.model import blocked_attention as blocked
from gptscale.model.attention import AttentionKernel, attend
from gptscale.model.blocked_attention import KEPT_TOKENS, QUERY_BLOCK, SMALL_QUERY_BLOCK, blocked_attention
from gptscale.model.documents import Documents
from gptscale.model.kernels import Case, KernelName, able
from tests.helpers.attention import check_kernel, document_starts, packed, plain, random_qkv
from tests.helpers.memory import peak_bytes, saved_for_backward, storage_bytes


@pytest.mark.parametrize("kernel", ["blocked", "sdpa"])
@pytest.mark.parametrize(
    ("tokens", "heads", "width"),
    [
        (1, (2, 2), 8),
        (20, (4, 4), 16),
        (SMALL_QUERY_BLOCK + 1, (2, 2), 8),
        (QUERY_BLOCK, (2, 1), 8),
        (QUERY_BLOCK + 1, (4, 2), 12),
        (2 * QUERY_BLOCK + 57, (6, 2), 8),
    ],
)
def test_values_and_gradients(kernel: KernelName, tokens: int, heads: tuple[int, int], width: int) -> None:
    check_kernel(kernel, tokens, heads=heads, width=width)


@pytest.mark.parametrize("window", [None, 1, 5, QUERY_BLOCK, QUERY_BLOCK + 40, 10_000])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("tokens", [20, 2 * QUERY_BLOCK - 57, 2 * QUERY_BLOCK + 57])
def test_windows_and_documents(window: int | None, documents: bool, tokens: int) -> None:
    within = Documents(document_starts(1, tokens), "cpu") if documents else None
    case = Case.of(torch.empty(1, tokens, 1, 8), 0.0, window, within)
    here = able(case)
    assert here == (["blocked"] if documents or case.window is not None else ["sdpa", "blocked"])
    for kernel in here:
        check_kernel(kernel, tokens, window, documents, width=8)


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


def test_choice_of_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def used(dtype: torch.dtype, tokens: int, dropout: float) -> str:
        q, k, v = random_qkv(1, tokens, 1, 1, 8, dtype)
        node = attend(q, k, v, dropout).grad_fn
        assert node is not None
        return "blocked" if "BlockedAttention" in node.name() else "sdpa"

    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert used(torch.float32, 64, 0.0) == "sdpa"
    assert used(torch.float32, 64, 0.1) == "blocked"
    assert used(torch.bfloat16, 256, 0.0) == "blocked"
    assert used(torch.bfloat16, 257, 0.0) == "sdpa"


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("window", [None, 100])
def test_probabilities_of_few_tokens_are_kept_for_backward(window: int | None, documents: bool) -> None:
    """Kept or made again, they are the same."""

    def results(tokens: int, dropout: float = 0.0) -> tuple[int, list[Tensor]]:
        torch.manual_seed(3)
        inputs = random_qkv(2, tokens, 4, 4, 16)
        starts_BT = document_starts(2, tokens) if documents else None
        y = blocked_attention(*inputs, dropout, window, starts_BT)
        assert y.grad_fn is not None
        kept = len(y.grad_fn.saved_tensors) - 3  # type: ignore[attr-defined]
        return kept, [y.detach(), *torch.autograd.grad(y.square().sum(), inputs)]

    kept, found = results(KEPT_TOKENS)
    assert kept == 2 * KEPT_TOKENS // SMALL_QUERY_BLOCK
    assert results(KEPT_TOKENS + 1)[0] == results(KEPT_TOKENS, 0.1)[0] == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocked, "KEPT_TOKENS", KEPT_TOKENS - 1)
        kept, again = results(KEPT_TOKENS)
    assert kept == 0
    for one, other in zip(found, again, strict=True):
        # Blocks are of another size then, so that sums are rounded in another order.
        assert (one - other).abs().max() <= 2e-6 * other.abs().max()


@pytest.mark.parametrize(
    ("kernel", "dropout", "window", "documents"),
    [
        ("blocked", 0.0, None, False),
        ("auto", 0.1, None, False),
        ("auto", 0.0, None, False),
        ("auto", 0.0, 100, False),
        ("auto", 0.0, None, True),
        ("auto", 0.0, 100, True),
    ],
)
def test_memory_grows_with_tokens_and_not_with_their_square(
    kernel: AttentionKernel, dropout: float, window: int | None, documents: bool
) -> None:
    heads, width, short, long = 4, 16, 2 * KEPT_TOKENS, 8 * KEPT_TOKENS
    saved, peaks = {}, {}
    for tokens in (short, long):
        q, k, v = random_qkv(1, tokens, heads, heads, width)
        # One document fills the second half: what grows with the longest one shows.
        within = Documents(packed([tokens // 16] * 8 + [tokens // 2]), "cpu") if documents else None

        def forward(q: Tensor = q, k: Tensor = k, v: Tensor = v, within: Documents | None = within) -> Tensor:
            return attend(q, k, v, dropout, kernel, window, documents=within)

        saved[tokens] = storage_bytes(saved_for_backward(forward))
        peaks[tokens] = peak_bytes(lambda forward=forward: forward().sum().backward())  # type: ignore[misc]
    one_square_bytes = heads * long * long * 4
    assert saved[long] <= 4 * saved[short]
    # Four times the tokens: less than six times the memory, where squares would take sixteen times.
    assert peaks[long] < 6 * peaks[short]
    assert peaks[long] < one_square_bytes
    # Control: the same measure sees a plain softmax.
    assert peak_bytes(lambda: plain(q, k, v).sum().backward()) > one_square_bytes
