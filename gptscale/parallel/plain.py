"""One process and plain PyTorch: the reference that every layout is compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from gptscale.config.schema import TrainRoot
from gptscale.flow import IGNORED_TARGET, Batch, Piece, StepResult
from gptscale.model.documents import Documents
from gptscale.parallel.clock import Clock
from gptscale.parallel.gradients import gradient_norm, prepare_update, release_kernel
from gptscale.parallel.loss_scale import DynamicScale, LossScaler
from gptscale.parallel.noise import NoiseProbe, noise_estimates
from gptscale.parallel.optimizer_state import kinds_by_parameter, set_step, stored, updates_of


class PlainEngine:
    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, settings: TrainRoot) -> None:
        self._model = model
        self._optimizer = optimizer
        self._clip_norm = settings.optimizer.clip_norm
        fp16 = settings.precision.compute == "fp16"
        self._scaler = LossScaler(DynamicScale.of(settings.precision)) if fp16 else None
        self._parameters = dict(model.named_parameters())
        self._kinds = kinds_by_parameter(optimizer)
        self._device = next(iter(self._parameters.values())).device

    def train_step(
        self, microbatches: Sequence[Batch], learning_rate: float, measure_noise: bool = False
    ) -> StepResult:
        if not self._model.training:  # it walks over all modules
            self._model.train()
        parameters = list(self._parameters.values())
        loss_tokens = sum(batch.loss_tokens for batch in microbatches)
        loss_scale = 1.0 if self._scaler is None else self._scaler.scale()
        clock = Clock(self._device)
        loss = torch.zeros((), device=self._device)
        with ExitStack() as stack:
            probe = stack.enter_context(NoiseProbe(parameters, self._device)) if measure_noise else None
            for batch in microbatches:
                # fp16: what backward will bring to the loss has to be known where its gradient is rounded, in forward.
                gain = {} if self._scaler is None else {"loss_gain": loss_scale / loss_tokens}
                share = self._model(*on_device(batch, self._device), **gain) / loss_tokens
                (share if self._scaler is None else share * loss_scale).backward()
                loss += share.detach()
        forward_backward = clock.lap()
        norm = gradient_norm(parameters) / loss_scale
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        if prepare_update(self._optimizer, parameters, norm, self._clip_norm, loss_scale):
            self._optimizer.step()
            release_kernel(self._optimizer)
        self._optimizer.zero_grad(set_to_none=True)
        if self._scaler is not None:
            self._scaler.stepped(norm)
        signal = trace = None
        if probe is not None:
            tokens_squared = sum(batch.loss_tokens**2 for batch in microbatches)
            signal, trace = noise_estimates(probe.squares / loss_scale**2, norm, loss_tokens, tokens_squared)
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

    @torch.no_grad()
    def eval_step(self, batch: Batch) -> torch.Tensor:
        self._model.eval()
        loss: torch.Tensor = self._model(*on_device(batch, self._device))
        return loss

    @torch.no_grad()
    def next_logits(self, inputs_BT: torch.Tensor, last_B: torch.Tensor) -> torch.Tensor:
        self._model.eval()
        logits_B1V: torch.Tensor = self._model(inputs_BT.to(self._device), last_B=last_B.to(self._device))
        return logits_B1V[:, 0]

    def pieces(self) -> list[Piece]:
        found: list[Piece] = []
        for name, parameter in self._parameters.items():
            shape, kinds = tuple(parameter.shape), self._kinds[id(parameter)]
            found += [
                Piece(name, kind, shape, 0, values.view(-1))
                for kind, values in stored(self._optimizer, parameter, kinds)
            ]
        return found

    def updates(self) -> int:
        return updates_of(self._optimizer)

    def loss_scaling(self) -> dict[str, Any] | None:
        return None if self._scaler is None else self._scaler.to_json()

    def loaded(self, updates: int, loss_scaling: Mapping[str, Any] | None = None) -> None:
        if self._scaler is not None and loss_scaling is not None:
            self._scaler.load(loss_scaling)
        for parameter in self._parameters.values():
            set_step(self._optimizer, parameter, self._kinds[id(parameter)], updates)


def on_device(batch: Batch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, Documents | None]:
    """What the model is called with."""
    ids_BT1 = ids_on_device(batch, device)
    inputs_BT, targets_BT = ids_BT1[:, :-1], ids_BT1[:, 1:]
    if batch.silent_BT is not None:
        targets_BT = targets_BT.masked_fill(batch.silent_BT.to(device, non_blocking=True), IGNORED_TARGET)
    documents = None if batch.starts_BT is None else Documents(batch.starts_BT, device)
    return inputs_BT, targets_BT, documents


def ids_on_device(batch: Batch, device: torch.device) -> torch.Tensor:
    """int64 [B, T+1]. They cross to the device as they are stored, in a quarter of the bytes: 2 and not 8 for most
    vocabularies."""
    tokens_BT1 = batch.tokens_BT1
    if tokens_BT1.device != device:
        tokens_BT1 = tokens_BT1.to(device, non_blocking=True)
    return tokens_BT1.long() if tokens_BT1.dtype in (torch.uint16, torch.uint32) else tokens_BT1
