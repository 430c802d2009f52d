"""From logits to the next token.

Shape legend: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Sampler:
    """Draws tokens for rows that never disturb each other: each has a generator of its own.

    `temperature` 0 takes the most likely token. `top_k` (0: all) keeps the k most likely; `top_p` then keeps the fewest
    whose probabilities, at that temperature, reach p together.
    """

    def __init__(self, seeds: Sequence[int], temperature: float, top_k: int = 0, top_p: float = 1.0) -> None:
        self.temperature = temperature
        self.top_k = top_k
        self.top_p = top_p
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def sample(self, logits_BV: Tensor, rows: Sequence[int]) -> list[int]:
        """One token for each row of `logits_BV`; `rows` says which generator (by place in `seeds`) each row uses."""
        if self.temperature == 0:
            greedy: list[int] = logits_BV.argmax(-1).tolist()
            return greedy
        mass_BV = probabilities(logits_BV, self.temperature, self.top_k, self.top_p).double().cumsum(-1)
        drawn = [torch.rand(1, dtype=torch.float64, generator=self._generators[row]) for row in rows]
        target_B1 = torch.stack(drawn).to(mass_BV.device) * mass_BV[:, -1:]
        tokens: list[int] = torch.searchsorted(mass_BV, target_B1, right=True).squeeze(1).tolist()
        return tokens


def probabilities(logits_BV: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Probabilities [B, V] to draw from, fp32; tokens shut out by `top_k` or `top_p` have exactly 0."""
    logits_BV = logits_BV.float() / temperature
    if 0 < top_k < logits_BV.shape[-1]:
        weakest_B1 = logits_BV.topk(top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < weakest_B1, -torch.inf)
    p_BV = torch.softmax(logits_BV, dim=-1)
    if top_p < 1:
        sorted_BV, order_BV = p_BV.sort(dim=-1, descending=True, stable=True)
        mass_before_BV = sorted_BV.cumsum(-1) - sorted_BV
        # The most likely token always stays, however small p is.
        mass_before_BV[:, 0] = -1.0
        p_BV = torch.zeros_like(p_BV).scatter_(-1, order_BV, sorted_BV.masked_fill(mass_before_BV >= top_p, 0.0))
        p_BV /= p_BV.sum(-1, keepdim=True)
    return p_BV
