"""DeepSpeed ZeRO, stages 0 to 3, behind the engine interface."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import deepspeed
import torch

from gptscale.config.schema import TrainRoot
from gptscale.flow import Batch, Piece, StepResult
from gptscale.parallel.deepspeed_config import zero_config
from gptscale.parallel.flat_zero import flat_optimizers
from gptscale.parallel.gradients import average_gradients, clip_in_kernel, gradient_norm
from gptscale.parallel.optimizer_state import KnowsParameters, updates_of
from gptscale.parallel.plain import on_device
from gptscale.parallel.ranks import Ranks
from gptscale.parallel.zero_state import sharded_state
from gptscale.topology import BatchSplit


class ZeroEngine:
    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        settings: TrainRoot,
        split: BatchSplit,
        ranks: Ranks,
    ) -> None:
        self._ranks = ranks
        self._stage = settings.parallel.zero_stage
        self._clip_norm = settings.optimizer.clip_norm
        parameters = sum(parameter.numel() for parameter in model.parameters())
        with flat_optimizers():
            self._engine, *_ = deepspeed.initialize(
                model=model,
                optimizer=optimizer,
                config=zero_config(self._stage, split, self._clip_norm, parameters),
                dist_init_required=False,
            )
        if self._stage == 0:
            self._engine.enable_backward_allreduce = False  # `average_gradients` does it in fewer passes
        self._optimizer: Any = self._engine.optimizer
        self._model: torch.nn.Module = self._engine.module
        self._state = sharded_state(self._stage, self._model, self._optimizer, ranks.rank, ranks.size)
        if self._stage > 0 and isinstance(optimizer, KnowsParameters):
            optimizer.bind(self._state.flats())

    def train_step(self, microbatches: Sequence[Batch], learning_rate: float) -> StepResult:
        ranks, engine = self._ranks, self._engine
        if not self._model.training:  # it walks over all modules
            engine.train()
        mine = sum(batch.loss_tokens for batch in microbatches)
        loss_tokens = ranks.sum([mine])[0] if ranks.size > 1 else mine
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        loss = torch.zeros((), device=ranks.device)
        for number, batch in enumerate(microbatches, start=1):
            last = number == len(microbatches)
            engine.set_gradient_accumulation_boundary(last)  # the batch may grow: DeepSpeed cannot count it
            share = engine(*on_device(batch, ranks.device)) / loss_tokens
            loss += share.detach()
            # DeepSpeed averages gradients over ranks; shares of a global mean have to be summed.
            engine.backward(share * ranks.size, scale_wrt_gas=False)
            if last:
                norm = self._finish()
            else:
                engine.step()
        return StepResult(loss=ranks.sum_tensor(loss), grad_norm=norm, loss_tokens=loss_tokens)

    def _finish(self) -> torch.Tensor:
        """The optimizer step at the end of accumulation; returns the norm before clipping."""
        if self._stage == 0:
            return self._finish_replicated()
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        return torch.as_tensor(norm, dtype=torch.float32, device=self._ranks.device)

    def _finish_replicated(self) -> torch.Tensor:
        """Stage 0: DeepSpeed's own neither reports a norm nor skips a step whose gradient is not finite."""
        parameters = list(self._model.parameters())
        average_gradients(parameters)
        norm = gradient_norm(parameters)
        if not torch.isfinite(norm):
            self._engine.zero_grad()  # AdamW passes over parameters without a gradient: nothing changes
        elif not clip_in_kernel(self._optimizer, norm, self._clip_norm):
            torch.nn.utils.clip_grads_with_norm_(parameters, self._clip_norm, norm)
        self._engine.step()
        self._optimizer.grad_scale = None
        return norm

    @torch.no_grad()
    def eval_step(self, batch: Batch) -> torch.Tensor:
        self._engine.eval()
        # The module, not the engine: its hooks gather ZeRO-3 weights; the engine would count a forward.
        loss: torch.Tensor = self._model(*on_device(batch, self._ranks.device))
        return loss

    def pieces(self) -> list[Piece]:
        return self._state.pieces()

    def updates(self) -> int:
        return updates_of(self._optimizer if self._stage == 0 else self._optimizer.optimizer)

    def loaded(self, updates: int) -> None:
        self._state.refresh(updates)
