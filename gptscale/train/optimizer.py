"""Optimizers, registered by name, over parameter groups that cover each parameter exactly once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from gptscale.config.schema import OptimizerConfig
from gptscale.plan.parameters import decays
from gptscale.runtime.registry import Registry

if TYPE_CHECKING:  # names are checked before torch is imported
    import torch
    from torch import nn

Group = dict[str, object]

BuildOptimizer = Callable[["nn.Module", OptimizerConfig], "torch.optim.Optimizer"]
"""Model and settings → optimizer over every parameter, each once.

A group's `state_kinds` names what the optimizer keeps of each of its parameters beside `step`: tensors of the
parameter's shape that begin at zero. Checkpoints hold these. Adam and its kin need not say."""

OPTIMIZERS: Registry[BuildOptimizer] = Registry("optimizer.name", "gptscale.optimizers")


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[Group]:
    """What decays, and what does not.

    Each group carries its `name`, by which a checkpoint or engine finds it again. Empty groups are left out: DeepSpeed
    drops them silently, and then indices no longer match.
    """
    decay: list[nn.Parameter] = []
    keep: list[nn.Parameter] = []
    for name, parameter in named:
        (decay if decays(name, parameter.dim()) else keep).append(parameter)
    groups: list[Group] = [
        {"name": "decay", "params": decay, "weight_decay": weight_decay},
        {"name": "no_decay", "params": keep, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


@OPTIMIZERS.register("adamw")
def adamw(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019), the fused kernel: one pass over memory a step."""
    import torch

    return torch.optim.AdamW(
        parameter_groups(model.named_parameters(), config.weight_decay),
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=True,
    )


@OPTIMIZERS.register("muon")
def muon(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Muon for the matrices of the blocks, AdamW for embedding, head, norms and biases (`gptscale.parallel.muon`)."""
    from gptscale.parallel.muon import Muon

    named = list(model.named_parameters())
    matrices = [(name, p) for name, p in named if name.startswith("blocks.") and p.dim() == 2]
    chosen = {name for name, _ in matrices}
    group: Group = {
        "name": "matrices",
        "params": [parameter for _, parameter in matrices],
        "parameters": [name for name, _ in matrices],
        "weight_decay": config.weight_decay,
        "orthogonal": True,
        "state_kinds": ("momentum_buffer",),
    }
    others = parameter_groups(((name, p) for name, p in named if name not in chosen), config.weight_decay)
    return Muon(
        [*([group] if matrices else []), *({**other, "orthogonal": False} for other in others)],
        lr=config.learning_rate,
        momentum=config.momentum,
        newton_schulz_steps=config.newton_schulz_steps,
        update_rms=config.update_rms,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
    )


def check_optimizer(config: OptimizerConfig) -> None:
    """Raises UserError, with the near name, for one that is not registered."""
    OPTIMIZERS.get(config.name)


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The registered optimizer of this name over all parameters of `model`."""
    return OPTIMIZERS.get(config.name)(model, config)
