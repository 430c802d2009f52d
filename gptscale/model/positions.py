"""Rotary positions (Su et al., arXiv 2104.09864), in the half-split layout that Llama checkpoints use.

Contexts longer than those a model was trained with change its frequencies: all alike (Chen et al., arXiv 2306.15595),
or slow ones more than fast ones, as Llama 3.1 and YaRN (Peng et al., arXiv 2309.00071) do, each in its own way.

Shape legend: B batch, T tokens, H heads, D features of a head, P positions of the table, E = D/2 pairs.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gptscale.config.schema import ModelConfig
from gptscale.config.shape import head_width

LLAMA3_SLOW_TURNS, LLAMA3_FAST_TURNS = 1.0, 4.0
"""Turns within the original length below which a pair is slow, above which it is fast (Llama 3.1's settings)."""
YARN_SLOW_TURNS, YARN_FAST_TURNS = 1.0, 32.0
"""The same of YaRN (section 3.2: α and β)."""


Turns = tuple[Tensor, Tensor]
"""Cosine and sine of each position × pair, with one dim for all heads: [T, 1, E], or [B, T, 1, E]."""


class RotaryTable:
    """Cosines and sines of every position × pair, made once a device and shared by all blocks. Holds no parameter."""

    def __init__(self, config: ModelConfig, positions: int) -> None:
        self.config = config
        self.positions = positions
        self._by_device: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def turns(self, tokens: int, device: torch.device, positions_BT: Tensor | None = None) -> Turns:
        """Of `tokens` positions, which are 0…T−1 where none are given. Raises ValueError past the table's end."""
        if tokens > self.positions:
            raise ValueError(f"{tokens} tokens, but rotary positions reach {self.positions}: reserve more")
        cos_PE, sin_PE = self._tables(device)
        if positions_BT is None:
            return cos_PE[:tokens].unsqueeze(1), sin_PE[:tokens].unsqueeze(1)
        return cos_PE[positions_BT].unsqueeze(2), sin_PE[positions_BT].unsqueeze(2)

    def reserve(self, positions: int) -> None:
        """Makes room for at least this many positions."""
        if positions > self.positions:
            self.positions = positions
            self._by_device.clear()

    def _tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._by_device:
            # A table first made while generating must still serve training: no inference tensor may get in here.
            with torch.inference_mode(False), torch.no_grad():
                positions_P1 = torch.arange(self.positions, dtype=torch.float64, device="cpu")[:, None]
                angles_PE = positions_P1 * frequencies(self.config).cpu()
                scale = yarn_scale(self.config)
                cos_PE, sin_PE = angles_PE.cos().mul_(scale), angles_PE.sin().mul_(scale)
                tables = (cos_PE.float().to(device), sin_PE.float().to(device))
            self._by_device[device] = tables
        return self._by_device[device]


def rotate(x_BTHD: Tensor, turns: Turns) -> Tensor:
    """Turns pair e of position p by p · frequency e."""
    y: Tensor = _Rotate.apply(x_BTHD, *turns)  # type: ignore[no-untyped-call]
    return y


def frequencies(config: ModelConfig) -> Tensor:
    """Radians a position that each pair turns, float64 [E]: theta^(−2e/W), changed as `rope_scaling` says.

    `linear`: all divided by `rope_factor`. `llama3` and `yarn`: slow pairs, which do not turn once within
    `rope_original_length`, are divided, fast ones are not, and those between are blended; `llama3` blends linearly in
    turns, `yarn` linearly in the number of the pair.
    """
    width = head_width(config)
    pairs_E = torch.arange(0, width, 2, dtype=torch.float64, device="cpu") / width
    fast_E = config.rope_theta**-pairs_E
    if config.rope_scaling == "none":
        return fast_E
    slow_E = fast_E / config.rope_factor
    if config.rope_scaling == "linear":
        return slow_E
    assert config.rope_original_length is not None
    if config.rope_scaling == "llama3":
        turns_E = config.rope_original_length * fast_E / (2 * math.pi)
        kept_E = (turns_E - LLAMA3_SLOW_TURNS) / (LLAMA3_FAST_TURNS - LLAMA3_SLOW_TURNS)
    else:
        first = math.floor(_pair_of_turns(config, YARN_FAST_TURNS))
        last = math.ceil(_pair_of_turns(config, YARN_SLOW_TURNS))
        first, last = max(first, 0), min(last, width - 1)
        kept_E = 1 - (torch.arange(width // 2, dtype=torch.float64) - first) / max(last - first, 0.001)
    return slow_E + (fast_E - slow_E) * kept_E.clamp(0, 1)


def yarn_scale(config: ModelConfig) -> float:
    """What YaRN multiplies queries and keys by: √(1/t) = 0.1 ln(factor) + 1 (section 3.4)."""
    return 0.1 * math.log(config.rope_factor) + 1 if config.rope_scaling == "yarn" else 1.0


def _pair_of_turns(config: ModelConfig, turns: float) -> float:
    """Number of the pair (a fraction) that turns this often within the original length."""
    assert config.rope_original_length is not None
    length_of_turn = config.rope_original_length / (2 * math.pi * turns)
    return head_width(config) * math.log(length_of_turn) / (2 * math.log(config.rope_theta))


class _Rotate(torch.autograd.Function):
    """A rotation's gradient is the rotation back, scaled alike: nothing of x is saved. Computed in fp32."""

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
    if torch.compiler.is_compiling():  # which fuses, and knows no `out=` that is a part of a tensor
        turned = left * cos - direction * right * sin, right * cos + direction * left * sin
        return torch.cat(turned, dim=-1).to(x.dtype)
    y = torch.empty_like(x, dtype=wide, memory_format=torch.contiguous_format)
    y_left, y_right = y.chunk(2, dim=-1)
    torch.mul(left, cos, out=y_left).addcmul_(right, sin, value=-direction)
    torch.mul(right, cos, out=y_right).addcmul_(left, sin, value=direction)
    return y.to(x.dtype)
