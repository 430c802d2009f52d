"""Optimizers, registered by name, over parameter groups that cover each parameter exactly once."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from gptscale.config.schema import OptimizerConfig
from gptscale.runtime.errors import UserError

if TYPE_CHECKING:  # names are checked before torch is imported
    import torch
    from torch import nn

Group = dict[str, object]


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[Group]:
    """Matrices decay; norms, biases and position tables do not (GPT-3, appendix B, decays "weights" only).

    Each group carries its `name`, by which a checkpoint or engine finds it again. Empty groups are left out: DeepSpeed
    drops them silently, and then indices no longer match.
    """
    decay: list[nn.Parameter] = []
    keep: list[nn.Parameter] = []
    for name, parameter in named:
        matrix = parameter.dim() >= 2 and not name.endswith("positions")
        (decay if matrix else keep).append(parameter)
    groups: list[Group] = [
        {"name": "decay", "params": decay, "weight_decay": weight_decay},
        {"name": "no_decay", "params": keep, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


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


OPTIMIZERS: dict[str, Callable[[nn.Module, OptimizerConfig], torch.optim.Optimizer]] = {"adamw": adamw}


def check_optimizer(config: OptimizerConfig) -> None:
    """Raises UserError, with the near name, for one that is not registered."""
    if config.name not in OPTIMIZERS:
        near = difflib.get_close_matches(config.name, OPTIMIZERS, n=1)
        fix = f"did you mean {near[0]}?" if near else f"there are: {', '.join(OPTIMIZERS)}"
        raise UserError(f"optimizer.name={config.name} is not known\n{fix}")


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The registered optimizer of this name over all parameters of `model`."""
    check_optimizer(config)
    return OPTIMIZERS[config.name](model, config)
