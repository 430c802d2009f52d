"""Which slice of each parameter a rank holds, and how it takes it.

Tensor peers cut every large matrix (`gptscale.plan.parameters.tensor_dim`), expert peers share out the experts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from gptscale.config.schema import ModelConfig
from gptscale.flow import TensorShard
from gptscale.model.gpt import GPT
from gptscale.model.init import initial_value
from gptscale.parallel.ranks import Group
from gptscale.plan.parameters import tensor_dim


def is_of_experts(name: str) -> bool:
    """Whether a parameter is a stack of every expert's: all else is used by all tokens."""
    return ".experts." in name


def cut_of(name: str, tensor: Group, expert: Group) -> tuple[int, Group] | None:
    """Along which dim a parameter is cut, by canonical name, and by whom; None where every rank holds it whole."""
    dim, group = (0, expert) if is_of_experts(name) else (tensor_dim(name), tensor)
    return None if dim is None or group.size == 1 else (dim, group)


def shard_of(name: str, held: torch.Size, tensor: Group, expert: Group) -> tuple[tuple[int, ...], TensorShard | None]:
    """The whole shape of a parameter of which a rank holds `held`, and which slice of it that is."""
    cut = cut_of(name, tensor, expert)
    if cut is None:
        return tuple(held), None
    dim, group = cut
    whole = tuple(length * group.size if number == dim else length for number, length in enumerate(held))
    return whole, TensorShard(dim, group.rank * held[dim], held[dim])


def take_slices(model: GPT, tensor: Group, expert: Group, seed: int, stand_ins_on: torch.device | None = None) -> None:
    """Keep this rank's slices of what the model holds. Parameters on the meta device get their initial values.

    A whole one is made at a time, so that a rank needs room for its part of the model, and no more. `stand_ins_on` a
    device they wait for `make`: whoever partitions them further makes them, one at a time.
    """
    for name, parameter in list(model.named_parameters()):
        cut = cut_of(name, tensor, expert)
        if cut is None and not parameter.is_meta:
            continue
        kept: nn.Parameter
        if parameter.is_meta:
            value = partial(_initial_slice, name, parameter.shape, model.config, seed, cut)
            kept = nn.Parameter(value()) if stand_ins_on is None else _stand_in(value, parameter, cut, stand_ins_on)
        else:
            kept = nn.Parameter(_slice(parameter.detach(), cut).clone())
        owner, _, own = name.rpartition(".")
        setattr(model.get_submodule(owner), own, kept)
    if model.config.tied_embeddings:
        model.head.weight = model.embedding.weight


def make(parameter: nn.Parameter, device: torch.device) -> bool:
    """Give a stand-in its initial values; False where it is none."""
    value: Callable[[], Tensor] | None = parameter.__dict__.pop("initial", None)
    if value is None:
        return False
    parameter.data = value().to(device)
    return True


def _stand_in(
    value: Callable[[], Tensor], parameter: nn.Parameter, cut: tuple[int, Group] | None, device: torch.device
) -> nn.Parameter:
    """Of the shape of the slice, for whoever makes groups of parameters, over a single number."""
    shape = _slice(parameter, cut).shape
    held = nn.Parameter(torch.zeros((), device=device).expand(shape))
    held.initial = value  # type: ignore[attr-defined]
    return held


def _initial_slice(
    name: str, shape: torch.Size, config: ModelConfig, seed: int, cut: tuple[int, Group] | None
) -> Tensor:
    value = _slice(initial_value(name, shape, config, seed), cut)
    return value if cut is None else value.clone()  # or the whole would stay


def _slice(whole: Tensor, cut: tuple[int, Group] | None) -> Tensor:
    return whole if cut is None else whole.chunk(cut[1].size, cut[0])[cut[1].rank]
