"""A whole model → this rank's part of it."""

from __future__ import annotations

from gptscale.model.gpt import GPT
from gptscale.parallel.ranks import Ranks
from gptscale.parallel.sequence import split_sequences
from gptscale.parallel.tensor import shard_model


def spread(model: GPT, ranks: Ranks) -> None:
    """Apply what the ranks' coordinates ask for, before an optimizer is made of what is left of the model."""
    shard_model(model, ranks.tensor)
    split_sequences(model, ranks.sequence)
