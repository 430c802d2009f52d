"""The parameters on paper are the real model's, and so are the rules about them."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from gptscale.config.schema import ModelConfig
from gptscale.model.gpt import GPT
from gptscale.parallel.stages import keep, parameter_weights
from gptscale.plan.parameters import held, parts, tensor_dim
from gptscale.plan.stages import balanced, cuts
from gptscale.train.optimizer import parameter_groups

MIXES = [
    ModelConfig(
        layers=3, width=32, heads=4, kv_heads=kv_heads, positions=positions, norm=norm, feedforward=feedforward,
        bias=bias, qkv_bias=qkv_bias, qk_norm=qk_norm, tied_embeddings=tied,
    )
    for positions, norm, feedforward, bias, (qkv_bias, qk_norm, kv_heads), tied in product(
        ("learned", "rope"), ("layernorm", "rmsnorm"), ("gelu", "swiglu"), (True, False),
        ((None, False, None), (True, True, 2)), (True, False),
    )
]  # fmt: skip


def meta(config: ModelConfig) -> GPT:
    with torch.device("meta"):
        return GPT(config, 130, 24, torch.float32)


def test_names_and_shapes_of_every_mix() -> None:
    for config in MIXES:
        model, (whole,) = meta(config), cuts([config.layers])
        on_paper = held(parts(config, 130, 24), whole, 1)
        assert [(p.name, p.shape) for p in on_paper] == [(name, tuple(p.shape)) for name, p in model.named_parameters()]
        decay, keep_whole = parameter_groups(model.named_parameters(), 0.1)
        for group, decays in ((decay, True), (keep_whole, False)):
            assert [p.shape for p in on_paper if p.decays is decays] == [tuple(p.shape) for p in group["params"]]
        slices = held(parts(config, 130, 24), whole, 2)
        for half, p in zip(slices, on_paper, strict=True):
            assert half.numel == (p.numel if tensor_dim(p.name) is None else p.numel // 2)


@pytest.mark.parametrize("tied", [True, False])
def test_stages_hold_what_the_model_keeps(tied: bool) -> None:
    config = ModelConfig(layers=5, width=32, heads=4, tied_embeddings=tied)
    on_paper = parts(config, 130, 24)
    weights = [sum(parameter.numel for parameter in part) for part in on_paper]
    assert weights == parameter_weights(meta(config))
    for cut in cuts(balanced(weights, 3)):
        model = meta(config)
        keep(model, cut)
        expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
        assert {p.name: p.shape for p in held(on_paper, cut, 1)} == expected
