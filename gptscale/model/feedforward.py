"""The feed-forward of a block: tanh-GELU (GPT-2), ReLU² or SwiGLU.

Shape legend: B batch, T tokens, D width, F hidden width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptscale.config.schema import Activation, ModelConfig
from gptscale.config.shape import feedforward_width
from gptscale.model.linear import Linear


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

    def forward(self, x_BTD: Tensor) -> Tensor:
        up_BTF = self.up(x_BTD)
        y_BTD: Tensor = self.down(activate(self.activation, up_BTF, None if self.gate is None else self.gate(x_BTD)))
        return y_BTD


def activate(name: Activation, up: Tensor, gate: Tensor | None) -> Tensor:
    """What lies between the products of a feed-forward. SwiGLU alone has a `gate`."""
    if gate is not None:
        y: Tensor = _GatedSilu.apply(gate, up)  # type: ignore[no-untyped-call]
        return y
    return gelu(up) if name == "gelu" else F.relu(up).square()


def gelu(x: Tensor) -> Tensor:
    """x/2 · (1 + tanh u) with u = √(2/π) · (x + 0.044715 x³) (Hendrycks & Gimpel, arXiv 1606.08415)."""
    if torch.compiler.is_compiling():
        # The same as x · sigmoid(2u): a CPU took half as long for what a compiler made of it as for its tanh.
        wide = x.to(torch.promote_types(x.dtype, torch.float32))  # within, as torch's own kernel is
        return (wide * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3))).to(x.dtype)
    return F.gelu(x, approximate="tanh")


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
