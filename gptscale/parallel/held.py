"""What a rank holds of each parameter."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from gptscale.flow import TensorShard
from gptscale.parallel.ranks import Group, Ranks
from gptscale.parallel.slices import is_of_experts, shard_of


@dataclass(frozen=True)
class Held:
    """A parameter as a rank and its replicas hold it between them."""

    name: str
    """Canonical."""
    shape: tuple[int, ...]
    """Of the whole parameter."""
    shard: TensorShard | None
    """Which slice of it; None: all."""
    first: bool
    """False where tensor peers, or another stage, hold the same, and one of them is who counts and writes it."""
    replicas: Group
    """The ranks that hold the same slice."""


Holdings = dict[int, Held]
"""By `id` of the parameter, which DeepSpeed keeps."""


def holdings(model: nn.Module, ranks: Ranks) -> Holdings:
    """Asked before an engine takes the parameters, while they have their shapes."""
    found: Holdings = {}
    for name, parameter in model.named_parameters():
        shape, shard = shard_of(name, parameter.shape, ranks.tensor, ranks.expert)
        copied = shard is None and ranks.tensor.rank > 0
        tied_again = name == "embedding.weight" and ranks.at.pipeline > 0
        replicas = ranks.expert_replicas if is_of_experts(name) else ranks.replicas
        found[id(parameter)] = Held(name, shape, shard, not copied and not tied_again, replicas)
    return found
