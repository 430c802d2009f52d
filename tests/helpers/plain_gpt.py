"""A GPT written plainly, in float64 and from the papers, to compare the real one with. Shares no code with it.

Shape legend: B batch, T tokens, D width, V vocabulary, H query heads, K key/value heads, W features of a head.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from gptscale.config.schema import ModelConfig
from gptscale.flow import IGNORED_TARGET
from gptscale.model.gpt import GPT

GPT3 = ModelConfig(layers=2, width=48, heads=3, vocab_multiple=16, loss_chunk=24)
ROTARY = replace(
    GPT3, positions="rope", norm="rmsnorm", feedforward="swiglu", bias=False, tied_embeddings=False, heads=4, kv_heads=2
)
VARIANTS = {
    "gpt3": GPT3,
    "gpt3_untied": replace(GPT3, tied_embeddings=False),
    "gpt3_no_bias": replace(GPT3, bias=False),
    "rotary": ROTARY,
    "rotary_tied": replace(ROTARY, tied_embeddings=True),
    "rotary_bias_mqa": replace(ROTARY, bias=True, kv_heads=1),
    "gpt3_banded": replace(GPT3, layers=3, attention_pattern=("full", "window"), window=7, qkv_bias=False),
    "wide_heads": replace(GPT3, head_width=24, feedforward="relu2"),
    "modern": replace(
        ROTARY,
        qk_norm=True,
        head_width=16,
        attention_pattern=("window", "full"),
        window=5,
        logit_softcap=6.0,
        embedding_scale=3.0,
        rope_scaling="yarn",
        rope_factor=4.0,
        rope_original_length=16,
    ),
    "llama3_scaling": replace(ROTARY, rope_scaling="llama3", rope_factor=8.0, rope_original_length=32),
    "linear_scaling": replace(ROTARY, rope_scaling="linear", rope_factor=2.0),
    "learned_swiglu_rmsnorm": replace(GPT3, feedforward="swiglu", norm="rmsnorm"),
}


def large_weights(model: GPT, seed: int = 0, std: float = 0.25) -> GPT:
    """Fills every parameter with noise that a wrong mask or a missing scale cannot hide behind; norms around 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, std, generator=generator)
            if name.endswith("norm.weight"):
                parameter += 1.0
    return model


def random_batch(vocab_size: int, batch: int, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs and targets [B, T]; about one target in eight is ignored."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocab_size, (batch, tokens + 1), generator=generator)
    ignored = torch.rand(batch, tokens, generator=generator) < 0.125
    return ids[:, :-1].contiguous(), ids[:, 1:].masked_fill(ignored, IGNORED_TARGET).contiguous()


def plain_parameters(model: GPT) -> dict[str, Tensor]:
    """float64 copies under the canonical names, ready for gradients."""
    return {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}


def plain_logits(
    p: dict[str, Tensor],
    config: ModelConfig,
    vocab_size: int,
    inputs_BT: Tensor,
    causal: bool = True,
    scaled: bool = True,
) -> Tensor:
    """float64 logits [B, T, V]. `causal=False` and `scaled=False` are the errors that a comparison must notice."""
    tokens = inputs_BT.shape[1]
    x_BTD = p["embedding.weight"][inputs_BT] * config.embedding_scale
    if config.positions == "learned":
        x_BTD = x_BTD + p["embedding.positions"][:tokens]
    for i in range(config.layers):
        block = {
            name.removeprefix(f"blocks.{i}."): value for name, value in p.items() if name.startswith(f"blocks.{i}.")
        }
        normed_BTD = _norm(block, "attention_norm", config, x_BTD)
        x_BTD = x_BTD + _attention(block, config, i, normed_BTD, causal, scaled)
        normed_BTD = _norm(block, "feedforward_norm", config, x_BTD)
        up = _linear(block, "feedforward.up", normed_BTD)
        if config.feedforward == "swiglu":
            gate = _linear(block, "feedforward.gate", normed_BTD)
            hidden = gate / (1 + torch.exp(-gate)) * up
        elif config.feedforward == "relu2":
            hidden = up.clamp(min=0) ** 2
        else:
            hidden = 0.5 * up * (1 + torch.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)))
        x_BTD = x_BTD + _linear(block, "feedforward.down", hidden)
    head = p["embedding.weight" if config.tied_embeddings else "head.weight"]
    logits_BTV = _norm(p, "head.norm", config, x_BTD) @ head[:vocab_size].T
    cap = config.logit_softcap
    return cap * torch.tanh(logits_BTV / cap) if cap else logits_BTV


def plain_loss(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Sum of −log probability over the targets that count."""
    used = targets_BT != IGNORED_TARGET
    return -torch.log_softmax(logits_BTV, -1)[used].gather(1, targets_BT[used].unsqueeze(1)).sum()


def _linear(p: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    y = x @ p[f"{name}.weight"].T
    return y + p[f"{name}.bias"] if f"{name}.bias" in p else y


def _norm(p: dict[str, Tensor], name: str, config: ModelConfig, x: Tensor) -> Tensor:
    if config.norm == "rmsnorm":
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + config.norm_epsilon) * p[f"{name}.weight"]
    centred = x - x.mean(-1, keepdim=True)
    y = centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + config.norm_epsilon) * p[f"{name}.weight"]
    return y + p[f"{name}.bias"] if f"{name}.bias" in p else y


def _attention(
    p: dict[str, Tensor], config: ModelConfig, layer: int, x_BTD: Tensor, causal: bool, scaled: bool
) -> Tensor:
    batch, tokens, _ = x_BTD.shape
    width = config.head_width or config.width // config.heads
    kv_heads = config.kv_heads or config.heads
    q_BHTW, k_BKTW, v_BKTW = (
        _linear(p, f"attention.{name}", x_BTD).view(batch, tokens, heads, width).transpose(1, 2)
        for name, heads in (("q", config.heads), ("k", kv_heads), ("v", kv_heads))
    )
    if config.qk_norm:
        q_BHTW, k_BKTW = (
            x / torch.sqrt((x * x).mean(-1, keepdim=True) + config.norm_epsilon) * p[f"attention.{name}_norm.weight"]
            for name, x in (("q", q_BHTW), ("k", k_BKTW))
        )
    if config.positions == "rope":
        q_BHTW, k_BKTW = _rotated(q_BHTW, config), _rotated(k_BKTW, config)
    outputs = []
    for head in range(config.heads):
        shared = head // (config.heads // kv_heads)
        scores_BTT = q_BHTW[:, head] @ k_BKTW[:, shared].transpose(1, 2)
        if scaled:
            scores_BTT = scores_BTT / math.sqrt(width)
        if causal:
            future = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
            scores_BTT = scores_BTT.masked_fill(future, -math.inf)
        if config.attention_pattern[layer % len(config.attention_pattern)] == "window":
            assert config.window is not None
            past = torch.ones(tokens, tokens, dtype=torch.bool).tril(-config.window)
            scores_BTT = scores_BTT.masked_fill(past, -math.inf)
        outputs.append(torch.softmax(scores_BTT, -1) @ v_BKTW[:, shared])
    return _linear(p, "attention.o", torch.cat(outputs, -1))


def _rotated(x_BHTW: Tensor, config: ModelConfig) -> Tensor:
    """As complex numbers: pair e of position t turns by t · theta^(−2e/W), or slower where positions are scaled."""
    tokens, width = x_BHTW.shape[-2:]
    left, right = x_BHTW.chunk(2, -1)
    frequency = torch.tensor([_frequency(e, width, config) for e in range(width // 2)], dtype=torch.float64)
    angle = torch.arange(tokens, dtype=torch.float64)[:, None] * frequency
    radius = 0.1 * math.log(config.rope_factor) + 1 if config.rope_scaling == "yarn" else 1.0
    turned = torch.complex(left, right) * torch.polar(torch.full_like(angle, radius), angle)
    return torch.cat((turned.real, turned.imag), -1)


def _frequency(e: int, width: int, config: ModelConfig) -> float:
    """One at a time, in the words of the papers."""
    theta, factor, original = config.rope_theta, config.rope_factor, config.rope_original_length or 0
    frequency = theta ** (-2 * e / width)
    wavelength = 2 * math.pi / frequency
    if config.rope_scaling == "linear":
        return frequency / factor
    if config.rope_scaling == "llama3":
        if wavelength < original / 4:
            return frequency
        if wavelength > original / 1:
            return frequency / factor
        smooth = (original / wavelength - 1) / (4 - 1)
        return (1 - smooth) * frequency / factor + smooth * frequency
    if config.rope_scaling == "yarn":
        # YaRN's γ over pair numbers, its ends rounded outwards as in the authors' code.
        low, high = (width * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta)) for turns in (32, 1))
        low, high = max(math.floor(low), 0), min(math.ceil(high), width - 1)
        ramp = min(max((e - low) / max(high - low, 1e-3), 0), 1)
        return frequency / factor * ramp + frequency * (1 - ramp)
    return frequency
