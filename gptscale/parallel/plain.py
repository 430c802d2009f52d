"""One process and plain PyTorch: the reference that every layout is compared with."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gptscale.flow import Batch, Piece, StepResult
from gptscale.model.documents import Documents
from gptscale.parallel.gradients import clipped_step, gradient_norm
from gptscale.parallel.optimizer_state import kinds_by_parameter, set_step, stored, updates_of


class PlainEngine:
    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, clip_norm: float) -> None:
        self._model = model
        self._optimizer = optimizer
        self._clip_norm = clip_norm
        self._parameters = dict(model.named_parameters())
        self._kinds = kinds_by_parameter(optimizer)
        self._device = next(iter(self._parameters.values())).device

    def train_step(self, microbatches: Sequence[Batch], learning_rate: float) -> StepResult:
        if not self._model.training:  # it walks over all modules
            self._model.train()
        loss_tokens = sum(batch.loss_tokens for batch in microbatches)
        loss = torch.zeros((), device=self._device)
        for batch in microbatches:
            share = self._model(*on_device(batch, self._device)) / loss_tokens
            share.backward()
            loss += share.detach()
        parameters = list(self._parameters.values())
        norm = gradient_norm(parameters)
        if torch.isfinite(norm):
            for group in self._optimizer.param_groups:
                group["lr"] = learning_rate
            clipped_step(self._optimizer, parameters, norm, self._clip_norm)
        self._optimizer.zero_grad(set_to_none=True)
        return StepResult(loss=loss, grad_norm=norm, loss_tokens=loss_tokens)

    @torch.no_grad()
    def eval_step(self, batch: Batch) -> torch.Tensor:
        self._model.eval()
        loss: torch.Tensor = self._model(*on_device(batch, self._device))
        return loss

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

    def loaded(self, updates: int) -> None:
        for parameter in self._parameters.values():
            set_step(self._optimizer, parameter, self._kinds[id(parameter)], updates)


def on_device(batch: Batch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, Documents | None]:
    """What the model is called with."""
    documents = None if batch.starts_BT is None else Documents(batch.starts_BT, device)
    return batch.inputs_BT.to(device, non_blocking=True), batch.targets_BT.to(device, non_blocking=True), documents
