"""The gradient noise scale (McCandlish et al., arXiv 1812.06162, appendix A.1): how large a batch is worth its tokens.

A gradient over n tokens is the true one G plus noise of covariance Σ/n. The simple noise scale tr(Σ)/|G|² is the batch,
in tokens, at which both are of one size: far below it a larger batch saves steps, far above it only costs tokens. Both
parts are estimated from the gradients of the micro-batches and of the whole batch, which a step computes anyway.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType

import torch
from torch import Tensor


class NoiseProbe:
    """Within, adds up the squared norm of every backward's gradient, on the device, in hooks of the parameters.

    A parameter's hook sees the gradient of one backward before it is accumulated, and whole on every ZeRO stage.
    """

    def __init__(self, parameters: Iterable[Tensor], device: torch.device) -> None:
        """`parameters`: those that this rank counts."""
        self._parameters = list(parameters)
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self.squares = torch.zeros((), device=device)

    def __enter__(self) -> NoiseProbe:
        for parameter in self._parameters:
            self._handles.append(parameter.register_hook(self._add))  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def _add(self, gradient: Tensor) -> None:
        self.squares += torch.linalg.vector_norm(gradient, dtype=torch.float32).square()


def noise_estimates(squares: Tensor, norm: Tensor, tokens: int, tokens_squared: int) -> tuple[Tensor, Tensor]:
    """Unbiased estimates of |G|² and of tr(Σ) of a token; fp32 scalars.

    Micro-batch i of nᵢ tokens contributes gᵢ, its part of the mean over all N `tokens`: `squares` is Σ|gᵢ|², `norm` is
    |Σgᵢ|, `tokens_squared` is Σnᵢ². Then E Σ|gᵢ|² = |G|² Σnᵢ²/N² + tr(Σ)/N and E |Σgᵢ|² = |G|² + tr(Σ)/N, whose
    difference is equations A.1 and A.2 for micro-batches of any sizes.
    """
    assert tokens_squared < tokens**2, "one micro-batch says nothing about noise"
    whole = norm.square()
    signal = (whole - squares) / (1 - tokens_squared / tokens**2)
    return signal, tokens * (whole - signal)
