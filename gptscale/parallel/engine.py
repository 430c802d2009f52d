"""What the training loop sees of an engine. It never asks which one it has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from gptscale.config.schema import TrainRoot
from gptscale.flow import Batch, Piece, StepResult
from gptscale.model.gpt import GPT
from gptscale.parallel.gradients import steps_in_kernel
from gptscale.parallel.optimizer_state import KnowsParameters, names_its_state
from gptscale.parallel.ranks import Ranks
from gptscale.plan.stages import Cut
from gptscale.runtime.errors import UserError
from gptscale.topology import BatchSplit


class Engine(Protocol):
    """A model, its optimizer state, and the way both are spread over ranks."""

    def train_step(
        self, microbatches: Sequence[Batch], learning_rate: float, measure_noise: bool = False
    ) -> StepResult:
        """One optimizer step over this rank's micro-batches of a global batch. A collective.

        The loss is the mean over the loss-bearing tokens of the global batch, whatever their spread over micro-batches
        and ranks. A step whose gradient is not finite changes nothing. The host does not wait for the device, but for:
        an optimizer without a fused kernel, or on the host; fp16, whose scale depends on the norm of the step before;
        experts on other ranks, or of limited capacity, in every layer; and DeepSpeed's limits on how far ahead ZeRO-3
        may gather and reduce.

        `measure_noise` adds the gradient noise of this step, which needs at least two micro-batches over all ranks.
        """
        ...

    def eval_step(self, batch: Batch) -> torch.Tensor:
        """Sum of this rank's token losses, without dropout. Every rank must call it equally often."""
        ...

    def next_logits(self, inputs_BT: torch.Tensor, last_B: torch.Tensor) -> torch.Tensor:
        """fp32 logits [B, V] of what follows token `last_B` of each row, without dropout, on every rank. A collective.

        All ranks give the same rows.
        """
        ...

    def pieces(self) -> list[Piece]:
        """This rank's share of weights and optimizer state, as views of live storage."""
        ...

    def updates(self) -> int:
        """Optimizer updates applied so far; skipped steps do not count."""
        ...

    def loss_scaling(self) -> dict[str, Any] | None:
        """The loss scale and its counters, for a checkpoint: the same on every layout. None but with fp16."""
        ...

    def loaded(self, updates: int, loss_scaling: Mapping[str, Any] | None = None) -> None:
        """Call after the pieces were filled from a checkpoint: sets Adam's count, refreshes what is derived."""
        ...


def check_optimizer(optimizer: torch.optim.Optimizer, settings: TrainRoot, ranks: Ranks) -> None:
    """Raises UserError where an optimizer wants what a rank does not have."""
    name = settings.optimizer.name
    if not names_its_state(optimizer):
        raise UserError(
            f"optimizer.name={name} does not say what it keeps of a parameter, so that a resumed run would lose it\n"
            "give each of its parameter groups state_kinds, e.g. ('momentum_buffer',), or () where it keeps nothing"
        )
    if settings.parallel.offload != "none" and not steps_in_kernel(optimizer):
        raise UserError(
            f"optimizer.name={name} has no fused kernel for the host, which has to clip and to skip\n"
            "use optimizer=adamw, or parallel.offload=none"
        )
    if ranks.has_parts and isinstance(optimizer, KnowsParameters):
        raise UserError(
            f"optimizer.name={name} works on whole matrices, and all of them, of which a rank has parts here\n"
            "set parallel.tensor, parallel.pipeline and parallel.expert to 1, or use optimizer=adamw"
        )


def build_engine(
    model: GPT, cut: Cut, optimizer: torch.optim.Optimizer, settings: TrainRoot, split: BatchSplit, ranks: Ranks
) -> Engine:
    """The engine that the settings ask for.

    `model` and `cut` are what `spread` left and returned: parameters have their canonical names and initial weights.
    """
    assert not ranks.has_parts or not isinstance(optimizer, KnowsParameters), "checked by `check_optimizer`"
    model.to(ranks.device)
    if settings.parallel.engine == "plain":
        from gptscale.parallel.plain import PlainEngine

        return PlainEngine(model, optimizer, settings)
    if ranks.pipeline.size > 1:
        from gptscale.parallel.pipeline import PipelineEngine

        return PipelineEngine(model, cut, optimizer, settings, split, ranks)
    from gptscale.parallel.zero import ZeroEngine

    return ZeroEngine(model, optimizer, settings, split, ranks)
