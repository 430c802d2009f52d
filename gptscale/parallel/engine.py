"""What the training loop sees of an engine. It never asks which one it has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from gptscale.config.schema import TrainRoot
from gptscale.flow import Batch, Piece, StepResult
from gptscale.parallel.ranks import Ranks
from gptscale.topology import BatchSplit


class Engine(Protocol):
    """A model, its optimizer state, and the way both are spread over ranks."""

    def train_step(self, microbatches: Sequence[Batch], learning_rate: float) -> StepResult:
        """One optimizer step over this rank's micro-batches of a global batch. A collective.

        The loss is the mean over the loss-bearing tokens of the global batch, whatever their spread over micro-batches
        and ranks. A step whose gradient is not finite changes nothing.
        """
        ...

    def eval_step(self, batch: Batch) -> torch.Tensor:
        """Sum of this rank's token losses, without dropout. Every rank must call it equally often."""
        ...

    def pieces(self) -> list[Piece]:
        """This rank's share of weights and optimizer state, as views of live storage."""
        ...

    def updates(self) -> int:
        """Optimizer updates applied so far; skipped steps do not count."""
        ...

    def loaded(self, updates: int) -> None:
        """Call after the pieces were filled from a checkpoint: sets Adam's count, refreshes what is derived."""
        ...


def build_engine(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, settings: TrainRoot, split: BatchSplit, ranks: Ranks
) -> Engine:
    """The engine that the settings ask for. `model` has its canonical parameter names and its initial weights."""
    model.to(ranks.device)
    if settings.parallel.engine == "plain":
        from gptscale.parallel.plain import PlainEngine

        return PlainEngine(model, optimizer, settings.optimizer.clip_norm)
    from gptscale.parallel.zero import ZeroEngine

    return ZeroEngine(model, optimizer, settings, split, ranks)
