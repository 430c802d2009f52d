"""Norms cut along the sequence: what layers keep is shared out."""

from __future__ import annotations

from pathlib import Path

import torch

from gptscale.config.schema import Checkpointing, ModelConfig, ParallelConfig
from gptscale.model.gpt import GPT
from gptscale.model.init import initialise
from gptscale.parallel.spread import spread
from tests.helpers import ranks
from tests.helpers.memory import saved_for_backward, storage_bytes
from tests.parity.cells import Layout, join

TOKENS = 512


def test_layers_keep_less(tmp_path: Path) -> None:
    """By the stream, of which each of two peers keeps half: in widths of it a layer keeps 2 there, of 10 in all, and of
    6 with selective checkpointing, which does without the inputs of products.
    """
    ranks.run(measure, [], 2, tmp_path)
    for rank in range(2):
        whole, cut, selective, selective_cut = map(int, (tmp_path / f"{rank}.txt").read_text().split())
        assert cut < 0.95 * whole
        assert selective < 0.75 * whole
        assert selective_cut < 0.9 * selective


def measure() -> None:
    joined = join(Layout("deepspeed", 0, tensor=2))
    found = [kept(joined, shard_norms, mode) for mode in ("none", "selective") for shard_norms in (False, True)]
    Path(f"{joined.rank}.txt").write_text(" ".join(map(str, found)))
    joined.close()


def kept(joined, shard_norms: bool, mode: Checkpointing) -> int:  # type: ignore[no-untyped-def]
    """Bytes that forward keeps for backward, weights among them."""
    model = GPT(ModelConfig(layers=8, width=64, heads=4, loss_chunk=64), 100, TOKENS, torch.float32)
    initialise(model, 0)
    model.activation_checkpointing = mode
    spread(model, joined, ParallelConfig(tensor=2, shard_norms=shard_norms), 0)
    ids_BT = torch.randint(0, 100, (4, TOKENS), generator=torch.Generator().manual_seed(0))

    return storage_bytes(saved_for_backward(lambda: model(ids_BT, ids_BT)))
