"""The parameters of our own block's GPT, by canonical name, and which of them a rank of a layout has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

from gptscale.config.schema import ModelConfig
from gptscale.config.shape import feedforward_width, head_width, kv_heads, padded_vocab, qkv_bias
from gptscale.plan.stages import Cut

_BY_OUTPUTS = ("attention.q", "attention.k", "attention.v", "feedforward.gate", "feedforward.up")
_BY_INPUTS = ("attention.o.weight", "feedforward.down.weight")


def tensor_dim(name: str) -> int | None:
    """The dim along which tensor parallelism cuts a parameter, by canonical name; None: every tensor rank has it whole.

    As in Megatron-LM (Shoeybi et al., arXiv 1909.08053, section 3): what widens is cut by outputs, its bias too; what
    narrows again by inputs, and its bias is added once; embedding and head by rows of the vocabulary.
    """
    if name in ("embedding.weight", "head.weight") or name.rpartition(".")[0].endswith(_BY_OUTPUTS):
        return 0
    return 1 if name.endswith(_BY_INPUTS) else None


def decays(name: str, dims: int) -> bool:
    """Whether weight decay is for a parameter: for matrices, not for norms, biases and position tables (GPT-3, appendix
    B, decays "weights" only).
    """
    return dims >= 2 and not name.endswith("positions")


@dataclass(frozen=True)
class Parameter:
    name: str
    """Canonical."""
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def decays(self) -> bool:
        """Which of the optimizer's two groups it is in."""
        return decays(self.name, len(self.shape))

    def sliced(self, ranks: int) -> Parameter:
        """What one of `ranks` tensor ranks has of it."""
        cut = tensor_dim(self.name)
        shape = (length // ranks if dim == cut else length for dim, length in enumerate(self.shape))
        return replace(self, shape=tuple(shape))


def parts(model: ModelConfig, vocab_size: int, positions: int) -> list[list[Parameter]]:
    """Parameters of embedding, blocks and head, in the order of `GPT.sequence()`. A tied weight is in both ends.

    `positions`: rows of a learned position table.
    """
    assert model.block == "gpt"
    assert model.experts == 0
    width, table = model.width, (padded_vocab(vocab_size, model.vocab_multiple), model.width)
    embedding = [Parameter("embedding.weight", table)]
    tied = embedding if model.tied_embeddings else [Parameter("head.weight", table)]
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
        *_linear(f"{name}.attention.q", (q, width), qkv_bias(model)),
        *_linear(f"{name}.attention.k", (kv, width), qkv_bias(model)),
        *_linear(f"{name}.attention.v", (kv, width), qkv_bias(model)),
        *_linear(f"{name}.attention.o", (width, q), model.bias),
        *(Parameter(f"{name}.attention.{norm}.weight", (head,)) for norm in ("q_norm", "k_norm") if model.qk_norm),
        *_norm(model, f"{name}.feedforward_norm"),
        *(p for wide in widening for p in _linear(f"{name}.feedforward.{wide}", (hidden, width), model.bias)),
        *_linear(f"{name}.feedforward.down", (width, hidden), model.bias),
    ]


def _linear(name: str, shape: tuple[int, int], bias: bool) -> list[Parameter]:
    biases = [Parameter(f"{name}.bias", shape[:1])] if bias else []
    return [Parameter(f"{name}.weight", shape), *biases]


def _norm(model: ModelConfig, name: str) -> list[Parameter]:
    shape = (model.width,)
    bias = [Parameter(f"{name}.bias", shape)] if model.norm == "layernorm" and model.bias else []
    return [Parameter(f"{name}.weight", shape), *bias]
