"""Learning rate as a pure function of tokens: nothing to save, nothing to restore."""

from __future__ import annotations

import math
from collections.abc import Callable

from gptscale.config.schema import ScheduleConfig
from gptscale.runtime.errors import UserError
from gptscale.runtime.registry import Registry

Schedule = Callable[[int, int, ScheduleConfig], float]
"""(tokens, tokens at the end, settings) → share of the peak rate. Asked after warm-up and up to the end only."""

SCHEDULES: Registry[Schedule] = Registry("schedule.name", "gptscale.schedules")


def learning_rate(tokens: int, config: ScheduleConfig, peak: float, total_tokens: int) -> float:
    """Rate of the update that brings the run to `tokens` tokens.

    Linear warm-up over `warmup_tokens`, then the named schedule up to `total_tokens`; past the end it stays as it is.
    """
    if tokens < config.warmup_tokens:
        return peak * tokens / config.warmup_tokens
    return peak * SCHEDULES.get(config.name)(min(tokens, max(total_tokens, config.warmup_tokens)), total_tokens, config)


def check_schedule(config: ScheduleConfig) -> None:
    """Raises UserError for a schedule that is not known, or whose settings it cannot follow."""
    SCHEDULES.get(config.name)
    if config.name == "inverse_sqrt" and config.warmup_tokens == 0:
        raise UserError("schedule=inverse_sqrt falls from the end of warm-up on\nset schedule.warmup_tokens above 0")


@SCHEDULES.register("constant")
def constant(tokens: int, total_tokens: int, config: ScheduleConfig) -> float:
    """The peak, to the end."""
    return 1.0


@SCHEDULES.register("cosine")
def cosine(tokens: int, total_tokens: int, config: ScheduleConfig) -> float:
    """Half a cosine down to `final_ratio` (GPT-3, appendix B, has 10 % at 260B tokens)."""
    return _between(config.final_ratio, 0.5 * (1.0 + math.cos(math.pi * _done(tokens, total_tokens, config))))


@SCHEDULES.register("linear")
def linear(tokens: int, total_tokens: int, config: ScheduleConfig) -> float:
    """A straight line down to `final_ratio`; to 0 it beats the cosine (Bergsma et al., arXiv 2502.15938)."""
    return _between(config.final_ratio, 1.0 - _done(tokens, total_tokens, config))


@SCHEDULES.register("wsd")
def warmup_stable_decay(tokens: int, total_tokens: int, config: ScheduleConfig) -> float:
    """The peak, then over the last `cooldown_ratio` of the tokens down to `final_ratio` as 1 − √share.

    Warm-up, stable, decay: Hu et al., arXiv 2404.06395, section 4; the shape of the decay: Hägele et al., arXiv
    2405.18392, section 3. A run stopped before the decay can go on for any length.
    """
    started = max((1.0 - config.cooldown_ratio) * total_tokens, config.warmup_tokens)
    if tokens <= started:
        return 1.0
    return _between(config.final_ratio, 1.0 - math.sqrt((tokens - started) / (total_tokens - started)))


@SCHEDULES.register("inverse_sqrt")
def inverse_sqrt(tokens: int, total_tokens: int, config: ScheduleConfig) -> float:
    """√(warm-up ÷ tokens), which needs no end, but at least `final_ratio` (Vaswani et al. 2017, section 5.3)."""
    return max(config.final_ratio, math.sqrt(config.warmup_tokens / tokens))


def _done(tokens: int, total_tokens: int, config: ScheduleConfig) -> float:
    """Share of the way from the end of warm-up to the end."""
    span = total_tokens - config.warmup_tokens
    return (tokens - config.warmup_tokens) / span if span > 0 else 1.0


def _between(low: float, share: float) -> float:
    return low + (1.0 - low) * share
