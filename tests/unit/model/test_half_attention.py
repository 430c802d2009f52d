"""Our attention in half precision on a CPU: over operands laid out by heads, and with AMX's units torch's forward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gptscale.model.attention import attend

TOLERANCE = 2e-2
"""Of the largest value. Scores are rounded at 2**-9, and a sum of some hundred of them wanders by a few roundings."""


def found(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, window: int | None) -> list[Tensor]:
    inputs = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
    y_BTHW = attend(*inputs, kernel="blocked", window=window)
    return [y_BTHW.detach(), *torch.autograd.grad(y_BTHW, inputs, grad)]


@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("tokens", [64, 200, 600])
def test_it_is_that_of_float64_and_contiguous(
    tokens: int, window: int | None, amx: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """600 tokens are three blocks of queries or more, the last of them a short one."""
    # It chooses the way to compute; any CPU can take either.
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    generator = torch.Generator().manual_seed(0)
    half = [torch.randn(2, tokens, 4, 16, generator=generator).bfloat16() for _ in range(4)]
    expected = found(*(tensor.double() for tensor in half), window=window)
    for got, wanted in zip(found(*half, window=window), expected, strict=True):
        assert got.is_contiguous()
        assert (got.double() - wanted).abs().max() <= TOLERANCE * wanted.abs().max()
    if window is not None:  # the negative control: without it, all is another
        other = found(*half, window=None)
        assert (other[0].double() - expected[0]).abs().max() > 5 * TOLERANCE * expected[0].abs().max()
