"""When training has diverged: the engines skip an update whose gradient is not finite; the guard counts."""

from __future__ import annotations

import math

from gptscale.config.schema import MIN_LOSS_SCALE, GuardConfig
from gptscale.runtime.errors import DivergedError


class Guard:
    """Counts skipped updates in a row. The count is saved with the run, so that a restart does not forget it."""

    def __init__(self, config: GuardConfig, skipped_in_a_row: int = 0) -> None:
        self._limit = config.max_skipped_steps
        self.skipped_in_a_row = skipped_in_a_row

    def watch(self, step: int, grad_norm: float, loss_scale: float | None = None) -> None:
        """Raises DivergedError once the limit is reached.

        An overflow at a loss scale that can still fall is how the scale finds its value, and is not counted. It falls
        with every further one, so that a gradient which is not finite at any scale is counted soon.
        """
        if math.isfinite(grad_norm):
            self.skipped_in_a_row = 0
            return
        if loss_scale is not None and loss_scale > MIN_LOSS_SCALE:
            return
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= self._limit:
            raise DivergedError(
                f"training diverged: the gradient was not finite in {self.skipped_in_a_row} updates in a row, "
                f"up to step {step} (guard.max_skipped_steps={self._limit})\n"
                "lower optimizer.learning_rate, lengthen schedule.warmup_tokens, or resume from an older checkpoint"
            )
