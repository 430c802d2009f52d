"""What the engines over DeepSpeed have in common: the optimizer it wraps, the state in it, and the loss scale."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from torch import nn

from gptscale.config.schema import MIN_LOSS_SCALE, DeepSpeedConfig, PrecisionConfig, TrainRoot
from gptscale.flow import Piece
from gptscale.parallel.gradients import steps_in_kernel
from gptscale.parallel.held import Holdings
from gptscale.parallel.loss_scale import LossScaler
from gptscale.parallel.offload import host_for
from gptscale.parallel.optimizer_state import updates_of
from gptscale.parallel.ranks import Ranks
from gptscale.parallel.zero_state import sharded_state


class OnDeepSpeed:
    """The part of `gptscale.parallel.engine.Engine` that is about state."""

    def __init__(
        self, engine: Any, model: nn.Module, stage: int, settings: TrainRoot, ranks: Ranks, held: Holdings
    ) -> None:
        """`engine`: what `deepspeed.initialize` made of `model`, of whose parameters the rank has `held` those."""
        self._engine = engine
        self._ranks = ranks
        self._stage = stage
        self._optimizer: Any = engine.optimizer
        self._scaler: LossScaler | None = None
        if stage > 0 and ranks.model.size > 1:
            self._optimizer.peers = ranks.model
            self._optimizer.not_first = frozenset(key for key, one in held.items() if not one.first)
        if settings.precision.compute == "fp16":
            rule = deepspeed_scale(settings.precision)
            self._scaler = LossScaler(rule)
            if stage > 0:
                self._optimizer.loss_scaler = rule
                self._optimizer.dynamic_loss_scale = True
                self._optimizer.shares = ranks.replicas.size
        host = host_for(settings.parallel, ranks.device)
        if host is not None:
            assert steps_in_kernel(self._optimizer.optimizer), "checked by `check_optimizer`"
            self._optimizer.offload(host)
        self._state = sharded_state(stage, model, self._optimizer, held)

    def pieces(self) -> list[Piece]:
        return self._state.pieces()

    def updates(self) -> int:
        return updates_of(self._optimizer if self._stage == 0 else self._optimizer.optimizer)

    def loss_scaling(self) -> dict[str, Any] | None:
        return None if self._scaler is None else self._scaler.to_json()

    def loaded(self, updates: int, loss_scaling: Mapping[str, Any] | None = None) -> None:
        if self._scaler is not None and loss_scaling is not None:
            self._scaler.load(loss_scaling)
        self._state.refresh(updates)


def let_speak(raw: DeepSpeedConfig) -> None:
    """DeepSpeed is silent but for errors (`start_deepspeed`), unless it is asked for something that it logs."""
    if raw.dump_state or raw.comms_logger.enabled:
        logger = logging.getLogger("DeepSpeed")
        for speaks in (logger, *logger.handlers):
            speaks.setLevel(logging.INFO)


def deepspeed_scale(config: PrecisionConfig) -> DynamicLossScaler:
    """DeepSpeed's own scaler; at its smallest scale the guard decides what an overflow means."""
    return DynamicLossScaler(
        init_scale=config.loss_scale,
        scale_window=config.loss_scale_window,
        min_scale=MIN_LOSS_SCALE,
        delayed_shift=config.loss_scale_hysteresis,
        consecutive_hysteresis=False,
        raise_error_at_min_scale=False,
        dtype=torch.half,
    )
