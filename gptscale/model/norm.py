"""LayerNorm and RMSNorm: statistics in fp32 whatever the type of the activations, weights kept in fp32.

Shape legend: N rows, D features.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptscale.config.schema import ModelConfig


class LayerNorm(nn.Module):
    """(x − mean) / √(variance + ε) · weight + bias (Ba et al., arXiv 1607.06450)."""

    def __init__(self, width: int, epsilon: float, bias: bool) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        # Torch's fused kernels take one type and compute in fp32 inside; a [D] cast is the price of staying fused.
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.layer_norm(x, self.weight.shape, self.weight.to(x.dtype), bias, self.epsilon)


class RMSNorm(nn.Module):
    """x / √(mean x² + ε) · weight (Zhang & Sennrich, arXiv 1910.07467)."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cuda":
            return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.epsilon)
        y: Tensor = _HostRMSNorm.apply(x, self.weight, self.epsilon)  # type: ignore[no-untyped-call]
        return y


def build_norm(config: ModelConfig) -> LayerNorm | RMSNorm:
    """The norm the settings ask for."""
    if config.norm == "rmsnorm":
        return RMSNorm(config.width, config.norm_epsilon)
    return LayerNorm(config.width, config.norm_epsilon, config.bias)


class _HostRMSNorm(torch.autograd.Function):
    """RMSNorm where torch has no fused kernel: off CUDA its `rms_norm` is nine operations and four saved tensors.

    Saves the input and one number a row. Both reductions of backward are matrix-vector products of one elementwise
    product, s = dy · x: over features with the weight, over rows with 1/rms.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
        x_ND = x.reshape(-1, x.shape[-1]).to(torch.promote_types(x.dtype, torch.float32))
        mean_square_N1 = torch.linalg.vector_norm(x_ND, dim=-1, keepdim=True).square_().div_(x_ND.shape[-1])
        inverse_N1 = mean_square_N1.add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight_D, inverse_N1)
        y: Tensor = (x_ND * inverse_N1).mul_(weight_D).view(x.shape).to(x.dtype)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad_y,) = grads
        x, weight_D, inverse_N1 = ctx.saved_tensors
        x_ND = x.reshape(-1, x.shape[-1]).to(inverse_N1.dtype)
        grad_y_ND = grad_y.reshape(x_ND.shape).to(inverse_N1.dtype)
        s_ND = grad_y_ND * x_ND
        grad_weight_D = torch.mv(s_ND.t(), inverse_N1.squeeze(1))
        # dx = inverse · (dy·w) − inverse³ · mean(dy·w·x) · x
        pull_N1 = torch.mv(s_ND, weight_D).unsqueeze(1).mul_(inverse_N1.pow(3)).div_(x_ND.shape[-1])
        grad_x_ND = torch.mul(grad_y_ND, weight_D, out=s_ND).mul_(inverse_N1).addcmul_(x_ND, pull_N1, value=-1)
        return grad_x_ND.view(x.shape).to(x.dtype), grad_weight_D, None
