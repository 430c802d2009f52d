"""The parameters of our own block's GPT, by canonical name, and which of them a rank of a layout has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

from gptscale.config.schema import ModelConfig
from gptscale.config.shape import feedforward_width, head_width, kv_heads, padded_vocab, qkv_bias
from gptscale.plan.stages import Cut


@dataclass(frozen=True)
class Parameter:
    name: str
    """Canonical."""
    shape: tuple[int, ...]
    cut_dim: int | None = None
    """The dim along which tensor parallelism cuts it; None: every tensor rank has it whole."""

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def decays(self) -> bool:
        """Which of the optimizer's two groups it is in: matrices decay."""
        return len(self.shape) >= 2 and not self.name.endswith("positions")

    def sliced(self, ranks: int) -> Parameter:
        """What one of `ranks` tensor ranks has of it."""
        shape = (length // ranks if dim == self.cut_dim else length for dim, length in enumerate(self.shape))
        return replace(self, shape=tuple(shape))


def parts(model: ModelConfig, vocab_size: int, positions: int) -> list[list[Parameter]]:
    """Parameters of embedding, blocks and head, in the order of `GPT.sequence()`. A tied weight is in both ends.

    `positions`: rows of a learned position table.
    """
    assert model.block == "gpt"
    assert model.experts == 0
    width, table = model.width, (padded_vocab(vocab_size, model.vocab_multiple), model.width)
    embedding = [Parameter("embedding.weight", table, 0)]
    tied = embedding if model.tied_embeddings else [Parameter("head.weight", table, 0)]
    if model.positions == "learned":
        embedding = [*embedding, Parameter("embedding.positions", (positions, width))]
    blocks = [_block(model, f"blocks.{layer}") for layer in range(model.layers)]
    return [embedding, *blocks, [*tied, *_norm(model, "head.norm")]]


def held(parts: Sequence[Sequence[Parameter]], cut: Cut, tensor: int) -> list[Parameter]:
    """What a rank of a pipeline's stage has, in slices of one of `tensor` ranks: each parameter once."""
    chosen = [
        part
        for number, part in enumerate(parts)
        if (cut.first if number == 0 else cut.last if number == len(parts) - 1 else number - 1 in cut.blocks)
    ]
    return list({parameter.name: parameter.sliced(tensor) for part in chosen for parameter in part}.values())


def _block(model: ModelConfig, name: str) -> list[Parameter]:
    width, hidden, head = model.width, feedforward_width(model), head_width(model)
    q, kv = model.heads * head, kv_heads(model) * head
    widening = ["gate", "up"] if model.feedforward == "swiglu" else ["up"]
    return [
        *_norm(model, f"{name}.attention_norm"),
        *_linear(f"{name}.attention.q", (q, width), 0, qkv_bias(model)),
        *_linear(f"{name}.attention.k", (kv, width), 0, qkv_bias(model)),
        *_linear(f"{name}.attention.v", (kv, width), 0, qkv_bias(model)),
        *_linear(f"{name}.attention.o", (width, q), 1, model.bias),
        *(Parameter(f"{name}.attention.{norm}.weight", (head,)) for norm in ("q_norm", "k_norm") if model.qk_norm),
        *_norm(model, f"{name}.feedforward_norm"),
        *(p for wide in widening for p in _linear(f"{name}.feedforward.{wide}", (hidden, width), 0, model.bias)),
        *_linear(f"{name}.feedforward.down", (width, hidden), 1, model.bias),
    ]


def _linear(name: str, shape: tuple[int, int], cut_dim: int, bias: bool) -> list[Parameter]:
    """A layer that is cut by outputs has its bias cut too; one cut by inputs adds it once."""
    biases = [Parameter(f"{name}.bias", shape[:1], 0 if cut_dim == 0 else None)] if bias else []
    return [Parameter(f"{name}.weight", shape, cut_dim), *biases]


def _norm(model: ModelConfig, name: str) -> list[Parameter]:
    shape = (model.width,)
    bias = [Parameter(f"{name}.bias", shape)] if model.norm == "layernorm" and model.bias else []
    return [Parameter(f"{name}.weight", shape), *bias]
