"""Slots are positions: rows of different lengths, what they see, and the end of the room."""

from __future__ import annotations

import pytest
import torch

from gptscale.config.schema import ModelConfig
from gptscale.generate.cache import KVCache


def build(rows: int, slots: int) -> KVCache:
    config = ModelConfig(layers=2, width=8, heads=4, kv_heads=2)
    return KVCache(config, rows, slots, torch.float32, torch.device("cpu"))


def store(cache: KVCache, tokens: int, value: float) -> torch.Tensor:
    cache.begin(tokens)
    new = torch.full((len(cache.lengths), tokens, 2, 2), value)
    keys, values = cache.layer(1).extend(new, new + 0.5)
    assert torch.equal(values[keys > 0], keys[keys > 0] + 0.5)
    cache.end()
    return keys


def test_rows_of_different_lengths() -> None:
    cache = build(3, 6)
    assert store(cache, 4, 1.0).shape == (3, 4, 2, 2)
    assert cache.visible_BTS is None
    cache.truncate([4, 2, 1])
    keys = store(cache, 1, 2.0)
    assert keys[:, :, 0, 0].tolist() == [[1, 1, 1, 1, 2], [1, 1, 2, 1, 0], [1, 2, 1, 1, 0]]
    assert cache.positions_BT.tolist() == [[4], [2], [1]]
    assert cache.visible_BTS is not None
    assert cache.visible_BTS.sum((1, 2)).tolist() == [5, 3, 2]
    cache.keep([2, 0])
    assert store(cache, 1, 3.0)[:, :, 0, 0].tolist() == [[1, 2, 3, 1, 0, 0], [1, 1, 1, 1, 2, 3]]
    assert cache.lengths == [3, 6]


def test_the_room_ends() -> None:
    cache = build(1, 3)
    store(cache, 3, 1.0)
    with pytest.raises(ValueError, match="cannot hold 4 tokens"):
        cache.begin(1)
