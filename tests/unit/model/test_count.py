"""Counts of parameters and operations are those of the real model."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch

from gptscale.config.schema import ModelConfig
from gptscale.config.shape import feedforward_width, head_width, padded_vocab
from gptscale.model.count import flops_per_token, matmul_parameter_count, parameter_count
from gptscale.model.gpt import GPT
from gptscale.model.init import initialise
from tests.helpers.matmul_count import count_matmuls
from tests.helpers.plain_gpt import VARIANTS


def test_parameters_of_every_mix() -> None:
    for positions, norm, feedforward, bias, tied, kv_heads, hidden, multiple in product(
        ("learned", "rope"), ("layernorm", "rmsnorm"), ("gelu", "swiglu"), (True, False), (True, False),
        (None, 2), (None, 56), (1, 128),
    ):  # fmt: skip
        config = ModelConfig(
            layers=3, width=32, heads=4, kv_heads=kv_heads, feedforward_width=hidden, positions=positions, norm=norm,
            feedforward=feedforward, bias=bias, tied_embeddings=tied, vocab_multiple=multiple,
        )  # fmt: skip
        with torch.device("meta"):
            model = GPT(config, 130, 24, torch.float32)
        assert parameter_count(config, 130, 24) == sum(p.numel() for p in model.parameters()), config


def test_known_sizes() -> None:
    # GPT-2 small with its own vocabulary and length; 124,439,808 is what its checkpoints hold.
    gpt2 = ModelConfig(layers=12, width=768, heads=12, vocab_multiple=1)
    assert parameter_count(gpt2, 50257, 1024) == 124_439_808
    assert matmul_parameter_count(gpt2, 50257) == 12 * 12 * 768 * 768 + 50257 * 768


@pytest.mark.parametrize("variant", VARIANTS)
def test_operations_are_those_that_run(variant: str) -> None:
    assert_operations(replace(VARIANTS[variant], loss_chunk=7))


@pytest.mark.parametrize("name", ["all", "every other"])
def test_operations_of_experts_are_those_that_run(name: str) -> None:
    base = replace(VARIANTS["rotary"], layers=4, loss_chunk=7, experts=6, expert_width=24)
    several = replace(base, experts_per_token=3, shared_experts=2, expert_layers=("dense", "experts"))
    assert_operations(base if name == "all" else several)


def assert_operations(config: ModelConfig) -> None:
    vocab, tokens, batch = 75, 16, 2
    model = GPT(config, vocab, tokens, torch.float32)
    initialise(model, 0)
    model.use_attention("blocked")
    ids = torch.randint(0, vocab, (batch, tokens + 1))
    ran = count_matmuls(lambda: model(ids[:, :-1], ids[:, 1:]).backward())
    assert ran.dense == 6 * matmul_parameter_count(config, vocab) * batch * tokens
    # Attention's own products are the batched ones, six a layer: of so few tokens no scores are made again.
    # A single block holds all queries here, so that T×T is computed, of which causality and windows use a part.
    width = config.heads * head_width(config)
    assert ran.batched == 6 * 2 * config.layers * width * tokens * tokens * batch
    seen = 0
    for layer in range(config.layers):
        windowed = config.attention_pattern[layer % len(config.attention_pattern)] == "window"
        reach = config.window if windowed and config.window else tokens
        seen += sum(1 for query in range(tokens) for key in range(query + 1) if query - key < reach)
    useful = ran.batched * seen / (config.layers * tokens * tokens)
    # A whole number of operations a token, where the mean over tokens may be a fraction.
    assert flops_per_token(config, vocab, tokens) == round((ran.dense + useful) / (batch * tokens))


def test_derived_sizes() -> None:
    assert padded_vocab(50257, 128) == 50304
    assert padded_vocab(256, 128) == 256
    assert feedforward_width(ModelConfig(width=768)) == 3072
    assert feedforward_width(ModelConfig(width=768, feedforward="swiglu")) == 2048
    assert feedforward_width(ModelConfig(width=100, feedforward="swiglu")) == 288
    assert feedforward_width(ModelConfig(width=100, feedforward="swiglu", feedforward_width=7)) == 7
