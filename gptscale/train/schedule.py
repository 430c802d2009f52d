"""Learning rate as a pure function of tokens: nothing to save, nothing to restore."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable

from gptscale.config.schema import ScheduleConfig
from gptscale.runtime.errors import UserError

Shape = Callable[[float], float]
"""Share of the run after warm-up (0 to 1) → share of the way from the final to the peak rate (1 to 0)."""

SHAPES: dict[str, Shape] = {
    "cosine": lambda share: 0.5 * (1.0 + math.cos(math.pi * share)),
    "constant": lambda share: 1.0,
}


def learning_rate(tokens: int, config: ScheduleConfig, peak: float, total_tokens: int) -> float:
    """Rate of the update that brings the run to `tokens` tokens.

    Linear warm-up over `warmup_tokens`, then the named shape down to `final_ratio · peak` at `total_tokens`
    (GPT-3, appendix B: warm-up over 375M tokens, cosine to 10 %). Past the end it stays at the final rate.
    """
    if tokens < config.warmup_tokens:
        return peak * tokens / config.warmup_tokens
    span = total_tokens - config.warmup_tokens
    share = min(1.0, (tokens - config.warmup_tokens) / span) if span > 0 else 1.0
    return peak * (config.final_ratio + (1.0 - config.final_ratio) * SHAPES[config.name](share))


def check_schedule(config: ScheduleConfig) -> None:
    """Raises UserError, with the near name, for one that is not registered."""
    if config.name not in SHAPES:
        near = difflib.get_close_matches(config.name, SHAPES, n=1)
        fix = f"did you mean {near[0]}?" if near else f"there are: {', '.join(SHAPES)}"
        raise UserError(f"schedule.name={config.name} is not known\n{fix}")
