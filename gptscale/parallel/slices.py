"""Which slice of each parameter a rank holds, and how it takes it.

Tensor peers cut every large matrix, as in Megatron-LM (Shoeybi et al., arXiv 1909.08053, section 3): what widens
(queries, keys, values, gate, up) by outputs, what narrows again (o, down) by inputs, embedding and head by rows of the
vocabulary. Expert peers share out the experts.
"""

from __future__ import annotations

import torch
from torch import nn

from gptscale.flow import TensorShard
from gptscale.model.gpt import GPT
from gptscale.model.init import initial_value
from gptscale.parallel.ranks import Group

_BY_OUTPUTS = ("attention.q", "attention.k", "attention.v", "feedforward.gate", "feedforward.up")
_BY_INPUTS = ("attention.o.weight", "feedforward.down.weight")


def is_of_experts(name: str) -> bool:
    """Whether a parameter is a stack of every expert's: all else is used by all tokens."""
    return ".experts." in name


def cut_of(name: str, tensor: Group, expert: Group) -> tuple[int, Group] | None:
    """Along which dim a parameter is cut, by canonical name, and by whom; None where every rank holds it whole."""
    if is_of_experts(name):
        dim, group = 0, expert
    elif name in ("embedding.weight", "head.weight") or name.rpartition(".")[0].endswith(_BY_OUTPUTS):
        dim, group = 0, tensor
    elif name.endswith(_BY_INPUTS):
        dim, group = 1, tensor
    else:
        return None
    return (dim, group) if group.size > 1 else None


def shard_of(name: str, held: torch.Size, tensor: Group, expert: Group) -> tuple[tuple[int, ...], TensorShard | None]:
    """The whole shape of a parameter of which a rank holds `held`, and which slice of it that is."""
    cut = cut_of(name, tensor, expert)
    if cut is None:
        return tuple(held), None
    dim, group = cut
    whole = tuple(length * group.size if number == dim else length for number, length in enumerate(held))
    return whole, TensorShard(dim, group.rank * held[dim], held[dim])


def take_slices(model: GPT, tensor: Group, expert: Group, seed: int) -> None:
    """Keep this rank's slices of what the model holds. Parameters on the meta device get their initial values.

    A whole one is made at a time, so that a rank needs room for its part of the model, and no more.
    """
    for name, parameter in list(model.named_parameters()):
        cut = cut_of(name, tensor, expert)
        if cut is None and not parameter.is_meta:
            continue
        kept = initial_value(name, parameter.shape, model.config, seed) if parameter.is_meta else parameter.detach()
        if cut is not None:
            dim, group = cut
            kept = kept.chunk(group.size, dim)[group.rank].clone()
        owner, _, own = name.rpartition(".")
        setattr(model.get_submodule(owner), own, nn.Parameter(kept))
    if model.config.tied_embeddings:
        model.head.weight = model.embedding.weight
