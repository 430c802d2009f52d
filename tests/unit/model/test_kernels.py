"""Kernels that need a GPU, as far as a CPU can show: masks, arguments, and who refuses what.

FlexAttention computes here without a gradient and uncompiled. The flash kernels are stood in for by functions that do
what their documentation says, one document at a time, in float64: what is tested is what they are called with. The real
ones run in `test_kernels_gpu.py`.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from gptscale.model import kernels
from gptscale.model.attention import attend
from gptscale.model.documents import Documents
from gptscale.model.flash_attention import attend_flash, attend_varlen
from gptscale.model.flex_attention import attend_flex, block_mask
from gptscale.model.kernels import KERNELS, Case, able, rule
from tests.helpers.attention import document_starts, plain, random_qkv

CPU = torch.device("cpu")


@pytest.mark.parametrize("tokens", [100, 384, 515])
@pytest.mark.parametrize("window", [None, 1, 40, 128, 200])
@pytest.mark.parametrize("documents", [False, True])
def test_flex_masks_are_what_torch_makes_of_the_same_rule(tokens: int, window: int | None, documents: bool) -> None:
    starts_BT = document_starts(2, tokens) if documents else torch.zeros(1, tokens, dtype=torch.int64)
    reach = tokens if window is None else window

    def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query - key < reach) & (key >= starts_BT[b, query])

    expected = create_block_mask(visible, len(starts_BT), 1, tokens, tokens, device="cpu")
    made = block_mask(tokens, window, CPU, Documents(starts_BT, CPU) if documents else None)
    for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices"):
        assert torch.equal(getattr(made, name), getattr(expected, name)), name
    for name in ("q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices"):  # what backward goes by
        assert torch.equal(getattr(made, name), getattr(expected, name)), name
    assert made.seq_lengths == expected.seq_lengths == (tokens, tokens)


def test_flex_masks_are_made_once() -> None:
    documents = Documents(document_starts(2, 300), CPU)
    assert block_mask(300, 50, CPU, documents) is block_mask(300, 50, CPU, documents)
    assert block_mask(300, 50, CPU, documents) is not block_mask(300, None, CPU, documents)
    assert block_mask(300, 50, CPU, None) is block_mask(300, 50, CPU, None)
    assert block_mask(300, 50, CPU, None) is not block_mask(300, 51, CPU, None)


@pytest.mark.parametrize("window", [None, 40, 200])
@pytest.mark.parametrize("documents", [False, True])
def test_flex_computes_attention(window: int | None, documents: bool) -> None:
    check_against_plain(lambda *asked: attend_flex(*asked, attend=flex_attention), window, documents)


@pytest.mark.parametrize("window", [None, 40, 200])
@pytest.mark.parametrize("documents", [False, True])
def test_flash_is_called_as_its_documentation_says(
    window: int | None, documents: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in = ModuleType("flash_attn")
    stand_in.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    stand_in.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", stand_in)
    check_against_plain(lambda q, k, v, window, docs: attend_flash(q, k, v, 0.0, window, docs), window, documents)


@pytest.mark.parametrize("window", [None, 40, 200])
@pytest.mark.parametrize("documents", [False, True])
def test_varlen_is_called_as_its_documentation_says(
    window: int | None, documents: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gptscale.model.flash_attention.torch_varlen", lambda: varlen_attn)
    check_against_plain(attend_varlen, window, documents)


def check_against_plain(kernel: Callable[..., Tensor], window: int | None, documents: bool) -> None:
    """With grouped heads; and a mask that is off by one must show."""
    tokens = 300
    q, k, v = (x.detach() for x in random_qkv(3, tokens, 4, 2, 16))
    starts_BT = document_starts(3, tokens) if documents else None
    y = kernel(q, k, v, window, None if starts_BT is None else Documents(starts_BT, CPU))
    assert y.shape == q.shape
    assert (y - plain(q, k, v, window, starts_BT)).abs().max().item() < 1e-5  # fp32: measured 2e-6
    if window is not None and not documents:
        assert (y - plain(q, k, v, window + 1, starts_BT)).abs().max().item() > 1e-2
    if starts_BT is not None:
        late_BT = torch.minimum(starts_BT + 1, torch.arange(tokens))
        assert (y - plain(q, k, v, window, late_BT)).abs().max().item() > 1e-2


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    deterministic: bool = False,
) -> Tensor:
    """`[i - window_size[0], i + window_size[1]]` inclusive; −1 is infinite; the default scale is 1 / √W."""
    assert causal
    assert softmax_scale is None
    left, right = window_size
    assert right in (-1, 0)
    return plain(q, k, v, None if left == -1 else left + 1).to(q.dtype)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    **options: Any,
) -> Tensor:
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert max_seqlen_q == max_seqlen_k
    y = torch.full_like(q, torch.nan)
    ends = cu_seqlens_q.tolist()
    assert ends[0] == 0
    assert ends[-1] == len(q)
    for start, end in itertools.pairwise(ends):
        assert 0 <= end - start <= max_seqlen_q
        if end > start:
            y[start:end] = flash_attn_func(*(x[None, start:end] for x in (q, k, v)), **options)[0]
    return y


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """`(-1, 0)` is causal, `(W, 0)` with a window in front; heads differ only where `enable_gqa` says so."""
    assert window_size[1] == 0
    assert enable_gqa == (query.shape[1] != key.shape[1])
    options = {"causal": True, "window_size": window_size}
    return flash_attn_varlen_func(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, **options)


def test_documents_in_every_form() -> None:
    starts_BT = torch.tensor([[0, 0, 0, 3, 3, 5], [0, 1, 1, 1, 1, 1]])
    documents = Documents(starts_BT, CPU)
    assert documents.positions.tolist() == [[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 3, 4]]
    # Begins of five documents, then the end, as often as 2³ + 1 numbers need.
    assert documents.cu_seqlens.tolist() == [0, 3, 5, 6, 7, 12, 12, 12, 12]
    assert documents.cu_seqlens.dtype == torch.int32
    assert documents.longest == 6  # the longest has 5 tokens: 8 as a power of two, but no row is longer than 6
    assert Documents(torch.zeros(2, 6, dtype=torch.int64), CPU).cu_seqlens.tolist() == [0, 6, 12]


def test_who_can_do_what(monkeypatch: pytest.MonkeyPatch) -> None:
    plain_case = Case(CPU, torch.float32, 1024, 64, 0.0, None, False)
    assert able(plain_case) == ["sdpa", "blocked"]
    half = plain_case._replace(dtype=torch.bfloat16)
    assert able(half) == ["sdpa", "blocked"]
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert able(half._replace(tokens=256)) == ["blocked", "sdpa"]
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert able(half._replace(tokens=256)) == ["sdpa", "blocked"], "products are emulated"
    for only_blocked in ({"dropout": 0.1}, {"window": 100}, {"documents": True}):
        assert able(plain_case._replace(**only_blocked)) == ["blocked"]  # type: ignore[arg-type]

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(kernels, "installed", lambda: True)
    cuda = half._replace(device=torch.device("cuda"))
    assert able(cuda) == ["sdpa", "blocked", "flex", "flash", "varlen"]
    assert able(cuda._replace(window=100)) == ["blocked", "flex", "flash", "varlen"]
    assert able(cuda._replace(documents=True)) == ["blocked", "flex", "flash", "varlen"]
    assert able(cuda._replace(dropout=0.1)) == ["sdpa", "blocked", "flash"]
    assert able(cuda._replace(dtype=torch.float32)) == ["sdpa", "blocked", "flex"]
    assert able(cuda._replace(head_width=12)) == ["sdpa", "blocked", "flash"]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert able(cuda) == ["sdpa", "blocked", "flex"]
    monkeypatch.setattr(kernels, "installed", lambda: False)
    assert "not installed" in str(KERNELS["flash"].refusal(cuda))


def test_a_kernel_that_cannot_is_not_replaced_in_silence() -> None:
    q, k, v = random_qkv(1, 20, 2, 2, 16)
    for kernel, window in (("sdpa", 5), ("flex", None), ("flash", None)):
        with pytest.raises(ValueError, match=f"kernel {kernel} cannot"):
            attend(q, k, v, kernel=kernel, window=window)  # type: ignore[arg-type]
    assert rule(Case.of(q, 0.0, 20, None)) == "sdpa"  # a window over the whole sequence hides nothing
    assert attend(q, k, v, kernel="sdpa", window=20).shape == q.shape
