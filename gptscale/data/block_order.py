"""Block order, for object stores: neighbours are read at nearly the same time, so that what is fetched is used at once.

In an epoch the *blocks* of a corpus, so many neighbouring samples each, are permuted; and then the samples of each
*window*, so many consecutive blocks of that permutation. Both by the same Feistel network as the full order, so that
again a position leads to its sample without any array. The text that has to be at hand is that of one window.

A corpus of N samples has a last, shorter block. It may come anywhere in an epoch, and its window is shorter by as much;
where it comes is found by inverting the permutation of blocks, so every sample is read exactly once an epoch:

    draw d ──(window's beginning)──▶ window w, offset ──(permuted within w)──▶ place of a block, offset in it ──▶ sample
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from gptscale.config.schema import DataConfig
from gptscale.data.order import FULL, Ints, Shuffle, Words, keys_of_epochs, permute, splitmix64, unpermute

BLOCK_ALGORITHM = "block-feistel6-splitmix64-stride65536-v1"
_BLOCKS, _WINDOWS = 1, 2
"""What keys are for; those of the full order have no such number."""
_GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)
"""The step of splitmix64's counter (Steele, Lea, Flood, OOPSLA 2014)."""


def shuffle_of(data: DataConfig) -> Shuffle:
    """The one that `data.order` names."""
    return BlockShuffle(data.block_sequences, data.window_blocks) if data.order == "block" else FULL


@dataclass(frozen=True)
class BlockShuffle:
    """Blocks of `block` samples over the whole corpus, samples within windows of `window` blocks."""

    block: int
    window: int

    def __post_init__(self) -> None:
        assert self.block > 0
        assert self.window > 0

    @property
    def identity(self) -> dict[str, Any]:
        return {"algorithm": BLOCK_ALGORITHM, "block_sequences": self.block, "window_blocks": self.window}

    def permute(self, draws: Ints, epochs: Ints, size: int, seed: int, corpus: int) -> Ints:
        blocks = -(-size // self.block)
        missing = blocks * self.block - size  # samples that the last block is short of
        different, which = np.unique(epochs, return_inverse=True)
        block_keys = keys_of_epochs(different, seed, corpus, _BLOCKS)
        short_at = unpermute(np.full_like(different, blocks - 1), blocks, block_keys)
        # An epoch has `block` places for every block; behind the last block, wherever it comes, `missing` are empty.
        gap = (short_at * self.block + self.block - missing)[which]
        window_keys = keys_of_epochs(different, seed, corpus, _WINDOWS)[:, which]
        place = self._within_windows(draws, gap, missing, size, window_keys)
        number, offset = np.divmod(place + np.where(place >= gap, missing, 0), self.block)
        return permute(number, blocks, block_keys[:, which]) * self.block + offset

    def _within_windows(self, draws: Ints, gap: Ints, missing: int, size: int, keys: Words) -> Ints:
        """Permute an epoch's draws, those of each window among themselves. `gap` is where the empty places begin."""
        whole = self.block * self.window
        short = gap // whole  # the window whose last place, and every later one's, comes `missing` draws earlier
        window = (draws + np.where(draws >= (short + 1) * whole - missing, missing, 0)) // whole
        first = window * whole - np.where(window > short, missing, 0)
        sizes = np.minimum(whole - np.where(window == short, missing, 0), size - first)
        # Keys of a window: as the splitmix64 generator counts on from the epoch's key.
        window_keys = splitmix64(keys + (window.astype(np.uint64) + np.uint64(1)) * _GOLDEN_GAMMA)
        places = np.empty_like(draws)
        for in_window in np.unique(sizes).tolist():  # of a whole window, the one with the last block, the last one
            alike = sizes == in_window
            places[alike] = first[alike] + permute(draws[alike] - first[alike], in_window, window_keys[:, alike])
        return places
