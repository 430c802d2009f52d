"""A linear layer whose weight stays fp32 while the product runs in the type of its input.

Shape legend: N rows, I input features, O output features, E weights side by side.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Module):
    """y = x Wᵀ + b with `weight` [O, I] and `bias` [O] in fp32, computed in the type of x.

    Values are left unset here: `gptscale.model.init` gives them.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] → [..., O], in the type of x."""
        return linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features} → {self.out_features}, bias={self.bias is not None}"


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """`F.linear` in the type of x, whatever the type of the weight; gradients come in the weight's own type."""
    y: Tensor = _Linear.apply(x, weight_OI, bias_O)  # type: ignore[no-untyped-call]
    return y


class _Linear(torch.autograd.Function):
    """Saves the parameter itself for backward: no copy of it and no view of it.

    Autocast keeps its cast copies for backward, half as much again as the weights; here the weight is cast again. Even
    in fp32 torch's own linear saves a transposed view, which holds the storage that ZeRO-3 means to free after forward.
    `save_for_backward` keeps the parameter object, so backward takes the `.data` that DeepSpeed has filled by then.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight_OI)
        ctx.bias_dtype = None if bias_O is None else bias_O.dtype
        return F.linear(x, weight_OI.to(x.dtype), None if bias_O is None else bias_O.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad_y,) = grads
        x, weight_OI = ctx.saved_tensors
        grad_y_NO = grad_y.reshape(-1, grad_y.shape[-1])
        grad_x = grad_weight_OI = grad_bias_O = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_y_NO @ weight_OI.to(grad_y.dtype)).view(x.shape)
        if ctx.needs_input_grad[1]:
            grad_weight_OI = (grad_y_NO.t() @ x.reshape(-1, x.shape[-1])).to(weight_OI.dtype)
        if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
            grad_bias_O = grad_y_NO.sum(0, dtype=ctx.bias_dtype)
        return grad_x, grad_weight_OI, grad_bias_O


def grouped_linear(x_NI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """`linear` by several weights, each of its own rows: weight e of those from `ends_E[e − 1]` up to `ends_E[e]`."""
    y: Tensor = _GroupedLinear.apply(x_NI, weight_EOI, ends_E)  # type: ignore[no-untyped-call]
    return y


class _GroupedLinear(torch.autograd.Function):
    """As `_Linear`. Where weights have their rows is known to the device alone: nobody waits for it."""

    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
        ctx.save_for_backward(x_NI, weight_EOI, ends_E)
        if not len(x_NI):  # which torch refuses
            return x_NI.new_empty(0, weight_EOI.shape[1])
        return F.grouped_mm(x_NI, weight_EOI.to(x_NI.dtype).transpose(-2, -1), offs=ends_E)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x_NI, weight_EOI, ends_E = ctx.saved_tensors
        grad_y_NO = grads[0].contiguous()
        grad_x_NI = grad_weight_EOI = None
        if not len(x_NI):
            return torch.empty_like(x_NI), torch.zeros_like(weight_EOI), None
        if ctx.needs_input_grad[0]:
            grad_x_NI = F.grouped_mm(grad_y_NO, weight_EOI.to(grad_y_NO.dtype), offs=ends_E)
        if ctx.needs_input_grad[1]:
            grad_weight_EOI = F.grouped_mm(grad_y_NO.t(), x_NI, offs=ends_E).to(weight_EOI.dtype)
        return grad_x_NI, grad_weight_EOI, None
