"""A linear layer whose weight stays fp32 while the product runs in the type of its input.

Shape legend: N rows, I input features, O output features, E weights side by side.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Again:
    """An input that backward makes once more, from what is kept anyway, instead of keeping it too."""

    def __init__(self, make: Callable[..., Tensor], *of: Tensor, uses: int = 1) -> None:
        self._make, self._of, self._uses = make, [tensor.detach() for tensor in of], uses
        self._made: Tensor | None = None

    def __call__(self) -> Tensor:
        """To be called `uses` times in all."""
        if self._made is None:
            with torch.no_grad():
                self._made = self._make(*self._of)
        made, self._uses = self._made, self._uses - 1
        if not self._uses:
            self._made = None
        return made


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

    def forward(self, x: Tensor, again: Again | None = None) -> Tensor:
        """x [..., I] → [..., O], in the type of x; `again` makes x in backward."""
        return linear(x, self.weight, self.bias, again)

    def extra_repr(self) -> str:
        return f"{self.in_features} → {self.out_features}, bias={self.bias is not None}"


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None, again: Again | None = None) -> Tensor:
    """`F.linear` in the type of x, whatever the type of the weight; gradients come in the weight's own type."""
    y: Tensor = _Linear.apply(x, weight_OI, bias_O, again)  # type: ignore[no-untyped-call]
    return y


class _Linear(torch.autograd.Function):
    """Saves the parameter itself for backward: no copy of it and no view of it.

    Autocast keeps its cast copies for backward, half as much again as the weights; here the weight is cast again. Even
    in fp32 torch's own linear saves a transposed view, which holds the storage that ZeRO-3 means to free after forward.
    `save_for_backward` keeps the parameter object, so backward takes the `.data` that DeepSpeed has filled by then.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, again: Again | None) -> Tensor:
        ctx.again = again
        ctx.save_for_backward(x if again is None else None, weight_OI)
        ctx.bias_dtype = None if bias_O is None else bias_O.dtype
        return F.linear(x, weight_OI.to(x.dtype), None if bias_O is None else bias_O.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad_y,) = grads
        x, weight_OI = ctx.saved_tensors
        x = x if ctx.again is None else ctx.again()
        grad_y_NO = grad_y.reshape(-1, grad_y.shape[-1])
        grad_x = grad_weight_OI = grad_bias_O = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_y_NO @ weight_OI.to(grad_y.dtype)).view(x.shape)
        if ctx.needs_input_grad[1]:
            grad_weight_OI = (grad_y_NO.t() @ x.reshape(-1, x.shape[-1])).to(weight_OI.dtype)
        if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
            grad_bias_O = grad_y_NO.sum(0, dtype=ctx.bias_dtype)
        return grad_x, grad_weight_OI, grad_bias_O, None


def grouped_linear(x_NI: Tensor, weight_EOI: Tensor, ends_E: Tensor, again: Again | None = None) -> Tensor:
    """`linear` by several weights, each of its own rows: weight e of those from `ends_E[e − 1]` up to `ends_E[e]`."""
    y: Tensor = _GroupedLinear.apply(x_NI, weight_EOI, ends_E, again)  # type: ignore[no-untyped-call]
    return y


class _GroupedLinear(torch.autograd.Function):
    """As `_Linear`."""

    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, weight_EOI: Tensor, ends_E: Tensor, again: Again | None) -> Tensor:
        ctx.again = again
        ctx.save_for_backward(x_NI if again is None else None, weight_EOI, ends_E)
        return grouped_product(x_NI, weight_EOI.to(x_NI.dtype).transpose(1, 2), ends_E)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x_NI, weight_EOI, ends_E = ctx.saved_tensors
        x_NI = x_NI if ctx.again is None else ctx.again()
        grad_y_NO = grads[0].contiguous()
        grad_x_NI = grad_weight_EOI = None
        if ctx.needs_input_grad[0]:
            grad_x_NI = grouped_product(grad_y_NO, weight_EOI.to(grad_y_NO.dtype), ends_E)
        if ctx.needs_input_grad[1]:
            grad_weight_EOI = grouped_outer_product(grad_y_NO, x_NI, ends_E).to(weight_EOI.dtype)
        return grad_x_NI, grad_weight_EOI, None, None


def grouped_product(x_NI: Tensor, weight_EIO: Tensor, ends_E: Tensor, kernel: bool | None = None) -> Tensor:
    """Each row times the matrix of its group: [N, O].

    A GPU's `kernel` reads there where groups end, so that nobody waits for it. The CPU's was 1.4 times as slow as one
    product after the other.
    """
    if x_NI.is_cuda if kernel is None else kernel:
        # Of no rows at all torch says that their strides are wrong.
        return F.grouped_mm(x_NI, weight_EIO, offs=ends_E) if len(x_NI) else x_NI.new_empty(0, weight_EIO.shape[2])
    return torch.cat([rows @ weight for rows, weight in zip(_groups(x_NI, ends_E), weight_EIO, strict=True)])


def grouped_outer_product(y_NO: Tensor, x_NI: Tensor, ends_E: Tensor, kernel: bool | None = None) -> Tensor:
    """yᵀ x of each group: [E, O, I]; zeros for one without rows."""
    if y_NO.is_cuda if kernel is None else kernel:
        if not len(y_NO):
            return y_NO.new_zeros(len(ends_E), y_NO.shape[1], x_NI.shape[1])
        return F.grouped_mm(y_NO.t(), x_NI, offs=ends_E)
    return torch.stack([y.t() @ x for y, x in zip(_groups(y_NO, ends_E), _groups(x_NI, ends_E), strict=True)])


def _groups(rows: Tensor, ends_E: Tensor) -> tuple[Tensor, ...]:
    return rows.tensor_split(ends_E[:-1].long().cpu())
