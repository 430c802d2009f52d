"""What our optimizers of all ZeRO stages have in common."""

from __future__ import annotations

from typing import Any

from gptscale.parallel.gradients import release_kernel
from gptscale.parallel.ranks import Group


class FlatOptimizer:
    """Comes before one of DeepSpeed's classes, whose methods it goes on with."""

    optimizer: Any
    """Torch's, of the flat masters."""
    loss_scaler: Any
    offloaded = False
    """Whether masters and their state are on the host."""

    shares = 1
    """Ranks over which gradients are averaged that ought to be summed: set by the engine, for fp16."""
    peers: Group | None = None
    """Ranks that hold other slices of the model: set by the engine, where there are any."""
    not_first: frozenset[int] = frozenset()
    """Parameters, by `id`, that one of the peers counts for all of them: set by the engine."""

    @property
    def loss_scale(self) -> float:
        """What averaged gradients have to be divided by."""
        return float(self.loss_scaler.cur_scale) / self.shares

    def _optimizer_step(self, number: int) -> None:
        super()._optimizer_step(number)  # type: ignore[misc]  # DeepSpeed's
        release_kernel(self.optimizer)

    def _update_scale(self, has_overflow: bool = False) -> None:
        """Left to the engine, which asks a step later."""
