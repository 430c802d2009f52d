"""The feed-forward of a block: tanh-GELU (GPT-2), ReLU² or SwiGLU.

Shape legend: B batch, T tokens, D width, F hidden width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptscale.config.schema import Activation, ModelConfig
from gptscale.config.shape import feedforward_width
from gptscale.model.linear import Again, Linear


class FeedForward(nn.Module):
    """down(gelu(up(x))), down(relu(up(x))²) (So et al., arXiv 2109.08668), or down(silu(gate(x)) · up(x)) for SwiGLU
    (Shazeer, arXiv 2002.05202).
    """

    def __init__(self, config: ModelConfig, hidden: int | None = None) -> None:
        """`hidden`: features within, where they are not what the settings say."""
        super().__init__()
        hidden = feedforward_width(config) if hidden is None else hidden
        self.activation = config.feedforward
        self.gate = Linear(config.width, hidden, config.bias) if config.feedforward == "swiglu" else None
        self.up = Linear(config.width, hidden, config.bias)
        self.down = Linear(hidden, config.width, config.bias)

    def forward(self, x_BTD: Tensor, again: Again | None = None) -> Tensor:
        """`again` makes x in backward, and has what lies between the products made again as well."""
        widened = [self.up(x_BTD, again)] if self.gate is None else [self.up(x_BTD, again), self.gate(x_BTD, again)]
        hidden_BTF, hidden_again = activate(self.activation, *widened, selective=again is not None)
        y_BTD: Tensor = self.down(hidden_BTF, hidden_again)
        return y_BTD

    @property
    def products(self) -> int:
        """How many read x."""
        return 1 if self.gate is None else 2


def activate(name: Activation, *widened: Tensor, selective: bool = False) -> tuple[Tensor, Again | None]:
    """What lies between the products of a feed-forward: of `up`, or for SwiGLU of `up` and `gate`.

    With `selective`, how backward makes it again: those are kept for the activation's own.
    """
    functions: dict[Activation, Callable[..., Tensor]] = {"swiglu": _swiglu, "gelu": gelu, "relu2": _relu2}
    function = functions[name]
    return function(*widened), Again(function, *widened) if selective else None


def _swiglu(up: Tensor, gate: Tensor) -> Tensor:
    y: Tensor = _GatedSilu.apply(gate, up)  # type: ignore[no-untyped-call]
    return y


def _relu2(up: Tensor) -> Tensor:
    y: Tensor = _SquaredRelu.apply(up)  # type: ignore[no-untyped-call]
    return y


def gelu(x: Tensor) -> Tensor:
    """x/2 · (1 + tanh u) with u = √(2/π) · (x + 0.044715 x³) (Hendrycks & Gimpel, arXiv 1606.08415)."""
    if torch.compiler.is_compiling():
        # The same as x · sigmoid(2u): a CPU took half as long for what a compiler made of it as for its tanh.
        wide = x.to(torch.promote_types(x.dtype, torch.float32))  # within, as torch's own kernel is
        return (wide * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3))).to(x.dtype)
    return F.gelu(x, approximate="tanh")


class _SquaredRelu(torch.autograd.Function):
    """relu(x)², saving its input only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.relu(x).square_()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (x,) = ctx.saved_tensors
        return F.relu(x).mul_(2).mul_(grads[0])


class _GatedSilu(torch.autograd.Function):
    """silu(gate) · up, saving its two inputs only: silu(gate), as wide as either, is computed again in backward."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad_y,) = grads
        gate, up = ctx.saved_tensors
        grad_gate = torch.ops.aten.silu_backward(grad_y * up, gate)
        return grad_gate, F.silu(gate).mul_(grad_y)
