"""Keys and values of the tokens a model has seen, so that each new token costs one token's work.

A token's slot is its position. Rows of different lengths therefore need no padding arithmetic: a row's slots beyond its
own length hold nothing that counts, they are masked, and its next tokens overwrite them.

Shape legend: B rows, T new tokens, S slots, K key/value heads, W features of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gptscale.config.schema import ModelConfig
from gptscale.config.shape import head_width, kv_heads


class KVCache:
    """Room for `slots` tokens of `rows` rows in every layer, allocated once."""

    def __init__(self, config: ModelConfig, rows: int, slots: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (config.layers, rows, slots, kv_heads(config), head_width(config))
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        self.lengths = [0] * rows
        """Tokens each row holds."""
        self.seen = 0
        """Slots that the tokens now going through the model may see, themselves included."""
        self._lengths_B = torch.zeros(rows, dtype=torch.int64, device=device)
        self.positions_BT = self._lengths_B.unsqueeze(1)
        """Positions of the tokens that are going through the model now."""
        self.visible_BTS: Tensor | None = None

    def begin(self, tokens: int) -> None:
        """Announces that `tokens` more of each row go through the model."""
        device = self._lengths_B.device
        longest = max(self.lengths)
        self.seen = longest + tokens
        if self.seen > self.keys.shape[2]:
            raise ValueError(f"a cache of {self.keys.shape[2]} slots cannot hold {self.seen} tokens")
        self.positions_BT = self._lengths_B.unsqueeze(1) + torch.arange(tokens, device=device)
        # Into an empty cache the tokens are all there is, and causality alone says what they see.
        slots_S = torch.arange(self.seen, device=device)
        self.visible_BTS = slots_S <= self.positions_BT.unsqueeze(2) if longest else None

    def layer(self, index: int) -> CachedLayer:
        """The part of layer `index`."""
        return CachedLayer(self.keys[index], self.values[index], self.positions_BT, self.visible_BTS, self.seen)

    def end(self) -> None:
        """All layers have stored the tokens announced."""
        self._set_lengths([length + self.positions_BT.shape[1] for length in self.lengths])

    def truncate(self, lengths: list[int]) -> None:
        """Keeps the first `lengths[b]` tokens of row b: what was beyond them was padding."""
        self._set_lengths(lengths)

    def keep(self, rows: list[int]) -> None:
        """Drops all rows but these."""
        index = torch.tensor(rows, device=self._lengths_B.device)
        self.keys, self.values = self.keys[:, index], self.values[:, index]
        self._set_lengths([self.lengths[row] for row in rows])

    def _set_lengths(self, lengths: list[int]) -> None:
        self.lengths = lengths
        self._lengths_B = torch.tensor(lengths, device=self._lengths_B.device)


@dataclass
class CachedLayer:
    """What attention sees of the cache (`gptscale.model.attention.LayerCache`)."""

    keys_BSKW: Tensor
    values_BSKW: Tensor
    positions_BT: Tensor
    visible_BTS: Tensor | None
    seen: int

    def extend(self, k_BTKW: Tensor, v_BTKW: Tensor) -> tuple[Tensor, Tensor]:
        """Stores keys and values at their positions; returns all that may be seen, [B, S, K, W] each."""
        rows_B1 = torch.arange(len(k_BTKW), device=k_BTKW.device).unsqueeze(1)
        self.keys_BSKW[rows_B1, self.positions_BT] = k_BTKW
        self.values_BSKW[rows_B1, self.positions_BT] = v_BTKW
        return self.keys_BSKW[:, : self.seen], self.values_BSKW[:, : self.seen]
