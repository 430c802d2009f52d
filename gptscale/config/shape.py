"""Sizes that follow from a model's settings. Pure, no torch."""

from __future__ import annotations

from gptscale.config.schema import ModelConfig

FEEDFORWARD_MULTIPLE = 32
"""A derived SwiGLU width is rounded up to this, so that its matrices fall on whole vector registers and tiles."""


def padded_vocab(vocab_size: int, multiple: int) -> int:
    """Rows of the embedding: `vocab_size` rounded up to `multiple`."""
    return -(-vocab_size // multiple) * multiple


def head_width(config: ModelConfig) -> int:
    """Features of one attention head."""
    return config.width // config.heads if config.head_width is None else config.head_width


def qkv_bias(config: ModelConfig) -> bool:
    """Whether queries, keys and values have biases."""
    return config.bias if config.qkv_bias is None else config.qkv_bias


def window_of_layer(config: ModelConfig, layer: int) -> int | None:
    """Tokens that a layer's attention sees, the current one included; None for all before it."""
    kind = config.attention_pattern[layer % len(config.attention_pattern)]
    return config.window if kind == "window" else None


def kv_heads(config: ModelConfig) -> int:
    """Key/value heads: as many as query heads unless grouped-query attention is asked for."""
    return config.heads if config.kv_heads is None else config.kv_heads


def feedforward_width(config: ModelConfig) -> int:
    """Hidden features of a block's feed-forward.

    4 · width for GELU (GPT-2) and ReLU² (So et al., arXiv 2109.08668). SwiGLU has three matrices in place of
    two, so 8/3 · width keeps the parameters equal (Shazeer, arXiv 2002.05202), up to a multiple of
    `FEEDFORWARD_MULTIPLE`.
    """
    if config.feedforward_width is not None:
        return config.feedforward_width
    if config.feedforward != "swiglu":
        return 4 * config.width
    exact_thirds = 8 * config.width
    return -(-exact_thirds // (3 * FEEDFORWARD_MULTIPLE)) * FEEDFORWARD_MULTIPLE


def has_experts(config: ModelConfig, layer: int) -> bool:
    """Whether a layer's feed-forward is a mixture of experts."""
    return config.experts > 0 and config.expert_layers[layer % len(config.expert_layers)] == "experts"


def expert_width(config: ModelConfig) -> int:
    """Hidden features of one expert."""
    return feedforward_width(config) if config.expert_width is None else config.expert_width
