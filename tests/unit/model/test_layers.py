"""Linear, norms and rotary positions: gradients, precision, and what they keep for backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gptscale.config.schema import ModelConfig
from gptscale.model.feedforward import _GatedSilu
from gptscale.model.linear import Linear, linear
from gptscale.model.norm import LayerNorm, RMSNorm
from gptscale.model.positions import RotaryTable, rotate
from tests.helpers.memory import saved_for_backward


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype).requires_grad_()


def turn(table: RotaryTable, x_BTHD: Tensor, positions_BT: Tensor | None = None) -> Tensor:
    return rotate(x_BTHD, table.turns(x_BTHD.shape[1], x_BTHD.device, positions_BT))


def build_linear(inputs: int, outputs: int, bias: bool = True) -> Linear:
    torch.manual_seed(0)
    layer = Linear(inputs, outputs, bias)
    for p in layer.parameters():
        torch.nn.init.normal_(p)
    return layer


def test_linear_casts_and_gives_fp32_gradients() -> None:
    layer = build_linear(12, 20)
    x = drawn(3, 5, 12)
    y = linear(x.bfloat16(), layer.weight, layer.bias)
    assert y.dtype == torch.bfloat16
    (y.float() * torch.arange(20)).sum().backward()
    grads = [x.grad, layer.weight.grad, layer.bias.grad if layer.bias is not None else None]
    expected = torch.autograd.grad((layer(x) * torch.arange(20)).sum(), (x, layer.weight, layer.bias))
    for made, right in zip(grads, expected, strict=True):
        assert made is not None
        assert made.dtype == torch.float32
        assert (made - right).abs().max().item() < 0.02 * right.abs().max().item()


def test_linear_keeps_no_cast_copy_of_its_weight() -> None:
    layer = build_linear(12, 20)
    x = drawn(3, 5, 12, dtype=torch.bfloat16)
    saved = saved_for_backward(lambda: layer(x))
    assert {t.data_ptr() for t in saved} == {x.data_ptr(), layer.weight.data_ptr()}
    # Control: under autocast the copy is there.
    with torch.autocast("cpu", torch.bfloat16):
        autocast = saved_for_backward(lambda: F.linear(x, layer.weight))
    assert any(t.dtype == torch.bfloat16 and t.numel() == 240 for t in autocast)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_takes_the_weight_that_is_there_in_backward(dtype: torch.dtype) -> None:
    # ZeRO-3 empties a parameter after forward and fills it anew, elsewhere in memory, before backward.
    layer = build_linear(12, 20)
    x = drawn(3, 12, dtype=dtype)
    y = layer(x)
    values = layer.weight.data.clone()
    layer.weight.data = torch.empty(0)
    layer.weight.data = values * 2
    y.sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad.float(), (2 * values).sum(0).expand(3, 12), rtol=0.02, atol=0.1)


def test_rms_norm_equals_torch() -> None:
    norm = RMSNorm(10, 1e-3)
    torch.nn.init.normal_(norm.weight)
    x = drawn(4, 3, 10)
    y, expected = norm(x), F.rms_norm(x.double(), (10,), norm.weight.double(), 1e-3)
    assert torch.allclose(y.double(), expected, atol=1e-6)
    made = torch.autograd.grad(y.square().sum(), (x, norm.weight))
    right = torch.autograd.grad(expected.square().sum(), (x, norm.weight))
    for gradient, reference in zip(made, right, strict=True):
        assert (gradient - reference).abs().max().item() < 1e-5 * reference.abs().max().item()
    wide = norm.double()
    assert torch.autograd.gradcheck(wide, (drawn(3, 10, dtype=torch.float64),))


@pytest.mark.parametrize("norm", [RMSNorm(64, 1e-5), LayerNorm(64, 1e-5, True)], ids=["rms", "layer"])
def test_norms_compute_statistics_in_fp32(norm: torch.nn.Module) -> None:
    for p in norm.parameters():
        torch.nn.init.ones_(p)
    # A mean square of bf16 numbers taken in bf16 would be off by parts in a hundred, and overflow fp16.
    x = 300 * torch.randn(5, 64)
    for dtype, tolerance in ((torch.bfloat16, 0.02), (torch.float16, 0.003)):
        y = norm(x.to(dtype))
        assert y.dtype == dtype
        assert (y.float() - norm(x.to(dtype).float())).abs().max().item() < tolerance


def test_rotary_scores_depend_on_distance_alone() -> None:
    torch.manual_seed(0)
    table = RotaryTable(ModelConfig(head_width=16), 64)
    q, k = torch.randn(16), torch.randn(16)
    turned_q, turned_k = (turn(table, x.expand(1, 64, 1, 16))[0, :, 0] for x in (q, k))
    scores = turned_q @ turned_k.T
    for distance in (0, 3, 31):
        along = scores.diagonal(-distance)
        assert along.max() - along.min() < 1e-4
    assert scores[10, 10] == pytest.approx((q @ k).item(), abs=1e-4)
    assert (scores[0] - scores[0, 0]).abs().max() > 0.1


def test_rotary_gradients_positions_and_reach() -> None:
    table = RotaryTable(ModelConfig(head_width=8, rope_theta=100.0), 16)
    x = drawn(2, 16, 3, 8)
    turned = turn(table, x)
    # Linear, and its transpose turns back: gradient of ⟨turned, w⟩ is w turned the other way.
    (back,) = torch.autograd.grad(turned, x, turned.detach())
    assert torch.allclose(back, x, atol=1e-5)
    positions = torch.tensor([[3, 4], [9, 10]])
    picked = torch.stack((turn(table, x)[0, 3:5], turn(table, x)[1, 9:11]))
    assert torch.equal(turn(table, torch.stack((x[0, 3:5], x[1, 9:11])), positions), picked)
    with pytest.raises(ValueError, match="reserve"):
        turn(table, drawn(1, 17, 1, 8))
    table.reserve(17)
    assert turn(table, drawn(1, 17, 1, 8)).shape == (1, 17, 1, 8)
    assert torch.equal(turn(table, x), turned)


def test_a_rotary_table_made_while_generating_serves_training() -> None:
    table = RotaryTable(ModelConfig(head_width=8, rope_theta=100.0), 16)
    with torch.inference_mode():
        turn(table, torch.randn(1, 4, 1, 8))
    turn(table, drawn(1, 4, 1, 8)).sum().backward()


def test_gated_silu_gradients() -> None:
    inputs = (drawn(3, 4, dtype=torch.float64), drawn(3, 4, dtype=torch.float64))
    assert torch.autograd.gradcheck(_GatedSilu.apply, inputs)
