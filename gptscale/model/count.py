"""How many parameters a model has and how many operations a token costs. Pure, no torch."""

from __future__ import annotations

from gptscale.config.schema import ModelConfig
from gptscale.config.shape import (
    expert_width,
    feedforward_width,
    has_experts,
    head_width,
    kv_heads,
    padded_vocab,
    qkv_bias,
    window_of_layer,
)


def parameter_count(config: ModelConfig, vocab_size: int, sequence_length: int) -> int:
    """Trainable numbers of `GPT(config, vocab_size, sequence_length, …)`: vocabulary padding counts, ties once.

    Of our own block: what one of a user's holds, only it knows (`model.block`).
    """
    assert config.block == "gpt"
    table = padded_vocab(vocab_size, config.vocab_multiple) * config.width
    tables = table if config.tied_embeddings else 2 * table
    positions = sequence_length * config.width if config.positions == "learned" else 0
    norm = config.width * (2 if config.norm == "layernorm" and config.bias else 1)
    biases = 0
    if qkv_bias(config):
        biases += (config.heads + 2 * kv_heads(config)) * head_width(config)
    if config.bias:
        into_feedforward = 2 if config.feedforward == "swiglu" else 1
        biases += 2 * config.width + into_feedforward * feedforward_width(config)
    head_norms = 2 * head_width(config) if config.qk_norm else 0
    matrices = sum(_block_matrices(config, layer, config.experts) for layer in range(config.layers))
    return tables + positions + matrices + config.layers * (biases + 2 * norm + head_norms) + norm


def matmul_parameter_count(config: ModelConfig, vocab_size: int) -> int:
    """Parameters that multiply a token: the matrices of the blocks, and the head (tied or not) with its padding. Of
    experts those that it passes.

    Embedding look-ups, position tables, norms and biases are left out.
    """
    head = padded_vocab(vocab_size, config.vocab_multiple) * config.width
    return sum(_block_matrices(config, layer, config.experts_per_token) for layer in range(config.layers)) + head


def flops_per_token(config: ModelConfig, vocab_size: int, sequence_length: int) -> int:
    """Floating-point operations of forward and backward a token, a multiply-add being two.

        6 · N_matmul  +  12 · heads · head_width · Σ over layers of the keys that a token sees on average

    PaLM (arXiv 2204.02311, appendix B) has 6 · N + 12 · layers · heads · head_width · T. Two things differ. N here is
    what multiplies a token (`matmul_parameter_count`): PaLM's counts every parameter, look-ups and norms too. And
    attention is counted causally: token t sees t of the T keys, or the last of them within a window, so the mean is
    (T + 1) / 2 or less in place of T. With document masks this is an upper bound: how much less a token sees depends on
    where documents end. Recomputed activations are not counted: this measures useful work.
    """
    assert config.block == "gpt"
    seen = sum(_keys_seen(window_of_layer(config, layer), sequence_length) for layer in range(config.layers))
    attention = round(12 * config.heads * head_width(config) * seen / sequence_length)
    return 6 * matmul_parameter_count(config, vocab_size) + attention


def _keys_seen(window: int | None, tokens: int) -> int:
    """By all tokens of a sequence together."""
    reach = tokens if window is None else min(window, tokens)
    return reach * (reach + 1) // 2 + (tokens - reach) * reach


def _block_matrices(config: ModelConfig, layer: int, experts: int) -> int:
    """With so many of the experts, where the layer has any."""
    attention = 2 * config.width * (config.heads + kv_heads(config)) * head_width(config)
    of_feature = (3 if config.feedforward == "swiglu" else 2) * config.width
    if not has_experts(config, layer):
        return attention + of_feature * feedforward_width(config)
    router = config.width * config.experts
    return attention + router + of_feature * (experts + config.shared_experts) * expert_width(config)
