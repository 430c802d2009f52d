"""Our models against transformers' own, with the same large random weights: logits and every gradient."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from gptscale.config.schema import ModelConfig
from gptscale.model.gpt import GPT
from tests.helpers.plain_gpt import large_weights, random_batch
from tests.helpers.references import GPT2, GPT_NEO, LLAMA, MIXTRAL, QWEN3, QWEN3_MOE, Reference

VOCAB, TOKENS = 75, 40

GPT3 = ModelConfig(layers=4, width=48, heads=3, vocab_multiple=1)
MODERN = ModelConfig(
    layers=4,
    width=48,
    heads=4,
    kv_heads=2,
    positions="rope",
    norm="rmsnorm",
    norm_epsilon=1e-6,
    feedforward="swiglu",
    feedforward_width=96,
    bias=False,
    vocab_multiple=1,
)
QWEN = replace(MODERN, qk_norm=True, head_width=16)
EXPERTS = {"experts": 5, "experts_per_token": 2, "expert_width": 40, "balance_loss": 0.0, "router_z_loss": 0.0}


@dataclass(frozen=True)
class Case:
    reference: Reference
    config: ModelConfig
    wrong: ModelConfig
    """The same parameters, another function: a comparison that passes it would prove nothing."""


CASES = {
    "GPT2": Case(GPT2, GPT3, replace(GPT3, norm_epsilon=1e-2)),
    "GPTNeo, banded": Case(
        GPT_NEO,
        replace(GPT3, qkv_bias=False, attention_pattern=("full", "window"), window=7),
        replace(GPT3, qkv_bias=False, attention_pattern=("full", "window"), window=8),
    ),
    "Llama": Case(LLAMA, MODERN, replace(MODERN, rope_theta=5_000.0)),
    "Llama, untied, one key head": Case(
        LLAMA,
        replace(MODERN, tied_embeddings=False, kv_heads=1),
        replace(MODERN, tied_embeddings=False, kv_heads=1, norm_epsilon=1e-2),
    ),
    "Llama, linear positions": Case(LLAMA, replace(MODERN, rope_scaling="linear", rope_factor=2.0), MODERN),
    "Llama, llama3 positions": Case(
        LLAMA,
        replace(MODERN, rope_scaling="llama3", rope_factor=8.0, rope_original_length=32),
        replace(MODERN, rope_scaling="llama3", rope_factor=8.0, rope_original_length=64),
    ),
    "Llama, YaRN": Case(
        LLAMA,
        replace(MODERN, rope_scaling="yarn", rope_factor=4.0, rope_original_length=16),
        replace(MODERN, rope_scaling="linear", rope_factor=4.0),
    ),
    "Qwen3": Case(QWEN3, QWEN, replace(QWEN, rope_theta=5_000.0)),
    "Qwen3, sliding": Case(
        QWEN3,
        replace(QWEN, attention_pattern=("full", "window"), window=7),
        replace(QWEN, attention_pattern=("window", "full"), window=7),
    ),
    "Mixtral": Case(
        MIXTRAL,
        replace(MODERN, tied_embeddings=False, **EXPERTS),
        replace(MODERN, tied_embeddings=False, **EXPERTS | {"experts_per_token": 1}),
    ),
    "Qwen3-MoE, every other layer": Case(
        QWEN3_MOE,
        replace(QWEN, expert_layers=("dense", "experts"), **EXPERTS | {"experts_per_token": 3}),
        replace(QWEN, expert_layers=("dense", "experts"), **EXPERTS),
    ),
}

# Measured: logits differ by up to 3e-6 of the largest, gradients by up to 8e-6 of their tensor's largest value: both
# sides compute in fp32 and round in another order. The wrong models are off by 0.1 and more.
LOGITS, GRADIENTS = 1e-4, 1e-4


@pytest.mark.parametrize("kernel", ["blocked", "sdpa"])
@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients(name: str, kernel: str) -> None:
    case = CASES[name]
    inputs_BT, targets_BT = random_batch(VOCAB, 3, TOKENS)
    model = large_weights(GPT(case.config, VOCAB, TOKENS, torch.float32), std=0.2)
    model.use_attention(kernel)  # type: ignore[arg-type]
    weights = dict(model.named_parameters())
    logits_BTV, gradients = case.reference.evaluate(weights, case.config, VOCAB, TOKENS, inputs_BT, targets_BT)
    differences = compare(model, inputs_BT, targets_BT, logits_BTV, gradients)
    assert differences[0] < LOGITS, differences
    assert differences[1] < GRADIENTS, differences

    wrong = GPT(case.wrong, VOCAB, TOKENS, torch.float32)
    wrong.load_state_dict(model.state_dict())
    differences = compare(wrong, inputs_BT, targets_BT, logits_BTV, gradients)
    assert differences[0] > 100 * LOGITS, differences
    assert differences[1] > 100 * GRADIENTS, differences


def compare(
    model: GPT, inputs_BT: Tensor, targets_BT: Tensor, logits_BTV: Tensor, gradients: dict[str, Tensor]
) -> tuple[float, float]:
    """Largest difference of logits, and of any gradient, each as a share of the largest value."""
    with torch.no_grad():
        ours_BTV = model.logits(inputs_BT)
    model(inputs_BT, targets_BT).backward()
    worst = 0.0
    assert gradients.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        # The true gradient of a key's bias is zero: it is compared absolutely.
        scale = 1.0 if name.endswith("k.bias") else gradients[name].abs().max().item()
        worst = max(worst, (parameter.grad - gradients[name]).abs().max().item() / scale)
    return ((ours_BTV - logits_BTV).abs().max() / logits_BTV.abs().max()).item(), worst
