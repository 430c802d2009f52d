"""Initial weights: a pure function of the seed and each parameter's canonical name.

So they are the same on every layout, in whatever order parameters are made, and a rank can make its own part alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gptscale.config.schema import ModelConfig
from gptscale.model.gpt import GPT
from gptscale.runtime.seeds import derive_seed

RESIDUAL_PROJECTIONS = ("attention.o.weight", "feedforward.down.weight", "shared.down.weight", "experts.down")
"""Projections that add into the residual stream: two a block, so their sum over depth is held by 1/√(2·layers)."""


@torch.no_grad()
def initialise(model: GPT, seed: int) -> None:
    """Fills every parameter in place with its `initial_value`. The parameters must hold storage (not meta)."""
    for name, parameter in model.named_parameters():
        parameter.copy_(initial_value(name, parameter.shape, model.config, seed))


def initial_value(name: str, shape: Sequence[int], config: ModelConfig, seed: int) -> Tensor:
    """fp32 CPU tensor of a whole parameter, by canonical name: slice it to fill a shard.

    Biases 0; other vectors, which scale, 1: norms, those of queries and keys too. All else Normal(0, init_std),
    projections into the residual stream scaled by 1/√(2·layers) (GPT-2, section 2.3).
    """
    if name.endswith(".bias"):
        return torch.zeros(*shape)
    if len(shape) == 1:
        return torch.ones(*shape)
    std = config.init_std
    if name.endswith(RESIDUAL_PROJECTIONS):
        std /= math.sqrt(2 * config.layers)
    generator = torch.Generator("cpu").manual_seed(derive_seed(seed, "init", name))
    return torch.empty(*shape).normal_(0.0, std, generator=generator)
