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
    return config.width // config.heads


def kv_heads(config: ModelConfig) -> int:
    """Key/value heads: as many as query heads unless grouped-query attention is asked for."""
    return config.heads if config.kv_heads is None else config.kv_heads


def feedforward_width(config: ModelConfig) -> int:
    """Hidden features of a block's feed-forward.

    4 · width for GELU (GPT-2). SwiGLU has three matrices in place of two, so 8/3 · width keeps the parameters equal
    (Shazeer, arXiv 2002.05202), rounded up to a multiple of `FEEDFORWARD_MULTIPLE`.
    """
    if config.feedforward_width is not None:
        return config.feedforward_width
    if config.feedforward == "gelu":
        return 4 * config.width
    exact_thirds = 8 * config.width
    return -(-exact_thirds // (3 * FEEDFORWARD_MULTIPLE)) * FEEDFORWARD_MULTIPLE


def check_shape(config: ModelConfig) -> None:
    """Raises ValueError, naming the key and the fix, where the sizes do not fit together."""
    if config.width % config.heads:
        raise ValueError(
            f"model.width={config.width} is not divisible by model.heads={config.heads}\n"
            f"Fix: set model.width to a multiple of model.heads"
        )
    if config.heads % kv_heads(config):
        raise ValueError(
            f"model.heads={config.heads} is not divisible by model.kv_heads={kv_heads(config)}\n"
            f"Fix: set model.kv_heads to a divisor of model.heads"
        )
    if config.positions == "rope" and head_width(config) % 2:
        raise ValueError(
            f"model.positions=rope rotates pairs of features, but a head has {head_width(config)}\n"
            f"Fix: choose model.width and model.heads so that width / heads is even"
        )
