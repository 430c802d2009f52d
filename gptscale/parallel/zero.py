"""DeepSpeed ZeRO, stages 0 to 3, behind the engine interface."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import deepspeed
import torch
from deepspeed.moe.utils import is_moe_param
from deepspeed.utils import set_z3_leaf_module

from gptscale.config.schema import TrainRoot
from gptscale.flow import Batch, StepResult
from gptscale.model.compiling import is_compiled
from gptscale.parallel.clock import Clock
from gptscale.parallel.deepspeed_config import zero_config
from gptscale.parallel.expert import separate_experts
from gptscale.parallel.flat_optimizers import flat_optimizers
from gptscale.parallel.gradients import average_gradients, gradient_norm, prepare_update, release_kernel
from gptscale.parallel.held import holdings
from gptscale.parallel.noise import NoiseProbe, noise_estimates
from gptscale.parallel.on_deepspeed import OnDeepSpeed, let_speak
from gptscale.parallel.optimizer_state import KnowsParameters
from gptscale.parallel.plain import on_device
from gptscale.parallel.ranks import Ranks
from gptscale.topology import BatchSplit


class ZeroEngine(OnDeepSpeed):
    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        settings: TrainRoot,
        split: BatchSplit,
        ranks: Ranks,
    ) -> None:
        stage, raw = settings.parallel.zero_stage, settings.parallel.deepspeed
        self._clip_norm = settings.optimizer.clip_norm
        parameters = sum(parameter.numel() for parameter in model.parameters())
        held = holdings(model, ranks)
        self._experts = [parameter for parameter in model.parameters() if is_moe_param(parameter)]
        experts = {id(parameter) for parameter in self._experts}
        self._others = [parameter for parameter in model.parameters() if id(parameter) not in experts]
        self._counted = [parameter for parameter in self._others if held[id(parameter)].first]
        separate_experts(optimizer)
        let_speak(raw)
        if stage == 3:  # compiled code has no hooks to gather weights, so its block gathers all of its own
            for module in model.modules():
                set_z3_leaf_module(module, is_compiled(module))
        with flat_optimizers():
            engine, *_ = deepspeed.initialize(
                model=model,
                optimizer=optimizer,
                config=zero_config(stage, split, ranks.replicas.size, self._clip_norm, parameters, raw),
                mpu=ProcessGroups(ranks),
                dist_init_required=False,
            )
        if stage < 2:
            engine.enable_backward_allreduce = False  # after the last backward, by `_finish`
        self._model: torch.nn.Module = engine.module
        super().__init__(engine, self._model, stage, settings, ranks, held)
        if stage > 0 and isinstance(optimizer, KnowsParameters):
            optimizer.bind(self._state.flats())

    def train_step(
        self, microbatches: Sequence[Batch], learning_rate: float, measure_noise: bool = False
    ) -> StepResult:
        ranks, engine = self._ranks, self._engine
        if not self._model.training:  # it walks over all modules
            engine.train()
        sizes = [sum(batch.loss_tokens for batch in microbatches)]
        if measure_noise:
            sizes.append(sum(batch.loss_tokens**2 for batch in microbatches))
        loss_tokens, *tokens_squared = ranks.sum_fed(sizes) if ranks.size > 1 else sizes
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        loss_scale = 1.0 if self._scaler is None else self._scaler.scale()
        # DeepSpeed averages gradients over ranks; shares of a global mean have to be summed. In fp16 that is left to
        # the end, where gradients are fp32: in backward the scale alone decides what overflows, on any layout.
        factor = ranks.replicas.size if self._scaler is None else loss_scale
        clock = Clock(ranks.device)
        loss = torch.zeros((), device=ranks.device)
        with ExitStack() as stack:
            probe = stack.enter_context(NoiseProbe(self._counted, ranks.device)) if measure_noise else None
            for number, batch in enumerate(microbatches, start=1):
                engine.set_gradient_accumulation_boundary(number == len(microbatches))  # DeepSpeed cannot count a ramp
                # fp16: what backward will bring to the loss has to be known where its gradient is rounded, in forward.
                gain = {} if self._scaler is None else {"loss_gain": loss_scale / loss_tokens}
                share = engine(*on_device(batch, ranks.device), **gain) / loss_tokens
                loss += share.detach()
                if self._scaler is None or self._stage == 0:  # else DeepSpeed applies its scale itself
                    share = share * factor
                engine.backward(share, scale_wrt_gas=False)
                if number < len(microbatches):
                    engine.step()
        forward_backward = clock.lap()
        norm = self._finish(factor / ranks.replicas.size)
        if self._scaler is not None:
            self._scaler.stepped(norm)
        signal = trace = None
        if probe is not None:
            squares = ranks.sum_tensor(probe.squares)
            if ranks.tensor.size > 1:
                torch.distributed.all_reduce(squares, group=ranks.tensor.handle)
            squares = squares / factor**2
            signal, trace = noise_estimates(squares, norm, loss_tokens, tokens_squared[0])
        ranks.sum_tensor(loss)
        return StepResult(
            loss=loss,
            grad_norm=norm,
            loss_tokens=loss_tokens,
            forward_backward=forward_backward,
            update=clock.lap(),
            loss_scale=None if self._scaler is None else loss_scale,
            noise_signal=signal,
            noise_trace=trace,
        )

    def _finish(self, factor: float) -> torch.Tensor:
        """Reduction and optimizer step at the end of accumulation, of gradients whose mean over ranks is `factor` times
        the true one; returns the norm of that, before clipping.
        """
        if self._stage == 0:
            return self._finish_replicated(factor)
        if self._stage == 1:
            self._engine.allreduce_gradients()
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        return torch.as_tensor(norm, dtype=torch.float32, device=self._ranks.device)

    def _finish_replicated(self, factor: float) -> torch.Tensor:
        """Stage 0: DeepSpeed's own neither reports a norm nor skips a step whose gradient is not finite."""
        ranks = self._ranks
        average_gradients(self._others, ranks.replicas, ranks.replicas.size)
        norm = gradient_norm(self._counted, ranks.tensor) / factor
        if self._experts:
            average_gradients(self._experts, ranks.expert_replicas, ranks.replicas.size)
            norm = torch.hypot(norm, gradient_norm(self._experts, ranks.expert) / factor)
        if not prepare_update(self._optimizer, self._others + self._experts, norm, self._clip_norm, factor):
            self._engine.zero_grad()  # an optimizer passes over parameters without a gradient: nothing changes
        self._engine.step()
        release_kernel(self._optimizer)
        return norm

    @torch.no_grad()
    def eval_step(self, batch: Batch) -> torch.Tensor:
        self._engine.eval()
        # The module, not the engine: its hooks gather ZeRO-3 weights; the engine would count a forward.
        loss: torch.Tensor = self._model(*on_device(batch, self._ranks.device))
        return loss

    @torch.no_grad()
    def next_logits(self, inputs_BT: torch.Tensor, last_B: torch.Tensor) -> torch.Tensor:
        self._engine.eval()
        device = self._ranks.device
        logits_B1V: torch.Tensor = self._model(inputs_BT.to(device), last_B=last_B.to(device))
        return logits_B1V[:, 0]


class ProcessGroups:
    """Who works with whom, as DeepSpeed asks for it: it calls such an object `mpu`.

    What it knows as data parallelism is whatever holds the same weights.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks

    def get_data_parallel_group(self) -> Any:
        return self._ranks.replicas.process_group

    def get_data_parallel_world_size(self) -> int:
        return self._ranks.replicas.size

    def get_data_parallel_rank(self) -> int:
        return self._ranks.replicas.rank

    def get_model_parallel_group(self) -> Any:
        return self._ranks.tensor.process_group

    def get_model_parallel_world_size(self) -> int:
        return self._ranks.tensor.size

    def get_model_parallel_rank(self) -> int:
        return self._ranks.tensor.rank
