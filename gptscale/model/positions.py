"""Rotary positions (Su et al., arXiv 2104.09864), in the half-split layout that Llama checkpoints use.

Shape legend: B batch, T tokens, H heads, D features of a head, P positions of the table, E = D/2 pairs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class RotaryTable:
    """Cosines and sines of every position × pair, made once a device and shared by all blocks. Holds no parameter."""

    def __init__(self, head_width: int, theta: float, positions: int) -> None:
        self.head_width = head_width
        self.theta = theta
        self.positions = positions
        self._by_device: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def rotate(self, x_BTHD: Tensor, positions_BT: Tensor | None = None) -> Tensor:
        """Turns pair e of position p by p · theta^(−2e/D); positions are 0…T−1 where none are given."""
        if x_BTHD.shape[1] > self.positions:
            raise ValueError(f"{x_BTHD.shape[1]} tokens, but rotary positions reach {self.positions}: reserve more")
        cos_PE, sin_PE = self._tables(x_BTHD.device)
        if positions_BT is None:
            tokens = x_BTHD.shape[1]
            cos, sin = cos_PE[:tokens].unsqueeze(1), sin_PE[:tokens].unsqueeze(1)
        else:
            cos, sin = cos_PE[positions_BT].unsqueeze(2), sin_PE[positions_BT].unsqueeze(2)
        y: Tensor = _Rotate.apply(x_BTHD, cos, sin)  # type: ignore[no-untyped-call]
        return y

    def reserve(self, positions: int) -> None:
        """Makes room for at least this many positions."""
        if positions > self.positions:
            self.positions = positions
            self._by_device.clear()

    def _tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._by_device:
            # A table first made while generating must still serve training: no inference tensor may get in here.
            with torch.inference_mode(False), torch.no_grad():
                pairs = torch.arange(0, self.head_width, 2, dtype=torch.float64, device="cpu")
                angles = torch.arange(self.positions, dtype=torch.float64, device="cpu")[:, None] * self.theta ** (
                    -pairs / self.head_width
                )
                tables = (angles.cos().float().to(device), angles.sin().float().to(device))
            self._by_device[device] = tables
        return self._by_device[device]


class _Rotate(torch.autograd.Function):
    """A rotation's gradient is the rotation back: nothing of x is saved. Computed in fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        cos, sin = ctx.saved_tensors
        return _turned(grads[0], cos, sin, -1), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    left, right = x.to(wide).chunk(2, dim=-1)
    y = torch.empty_like(x, dtype=wide, memory_format=torch.contiguous_format)
    y_left, y_right = y.chunk(2, dim=-1)
    torch.mul(left, cos, out=y_left).addcmul_(right, sin, value=-direction)
    torch.mul(right, cos, out=y_right).addcmul_(left, sin, value=direction)
    return y.to(x.dtype)
