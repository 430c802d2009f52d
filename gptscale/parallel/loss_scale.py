"""Dynamic loss scaling for fp16 (Micikevicius et al., arXiv 1710.03740, section 3.2), by DeepSpeed's rule.

The smallest number of fp16 is 6e-8; gradients of a mean over many tokens are below it. So the loss is multiplied by a
scale before backward, and gradients are divided by it afterwards, in fp32. When one overflows, the update is skipped
and the scale halved; after a number of updates without an overflow it is doubled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from gptscale.config.schema import MIN_LOSS_SCALE, PrecisionConfig

FACTOR = 2.0


class ScaleRule(Protocol):
    """A scale and what it depends on, by DeepSpeed's names: its `DynamicLossScaler` is one."""

    cur_scale: float
    cur_iter: int
    last_overflow_iter: int
    cur_hysteresis: int

    def update_scale(self, overflow: bool) -> None:
        """After a step."""
        ...


@dataclass
class DynamicScale:
    """DeepSpeed's rule where DeepSpeed is not imported."""

    cur_scale: float
    window: int
    hysteresis: int
    cur_hysteresis: int
    cur_iter: int = 0
    last_overflow_iter: int = -1

    @classmethod
    def of(cls, config: PrecisionConfig) -> DynamicScale:
        hysteresis = config.loss_scale_hysteresis
        return cls(config.loss_scale, config.loss_scale_window, hysteresis, cur_hysteresis=hysteresis)

    def update_scale(self, overflow: bool) -> None:
        """Halve at the `hysteresis`-th overflow and every later one, until a doubling gives the patience back."""
        if overflow:
            if self.cur_hysteresis == 1:
                self.cur_scale = max(self.cur_scale / FACTOR, MIN_LOSS_SCALE)
            else:
                self.cur_hysteresis -= 1
            self.last_overflow_iter = self.cur_iter
        else:
            good = self.cur_iter - self.last_overflow_iter - 1
            if good > 0 and good % self.window == 0:
                self.cur_hysteresis = self.hysteresis
                self.cur_scale *= FACTOR
        self.cur_iter += 1


class LossScaler:
    """The scale of a run's steps. Whether a step overflowed is asked when the next one needs to know, not before."""

    def __init__(self, rule: ScaleRule) -> None:
        self._rule = rule
        self._norm: Tensor | None = None

    def scale(self) -> float:
        """Of the next step. Waits for the norm of the last one: the rule is the host's."""
        if self._norm is not None:
            norm, self._norm = self._norm, None
            self._rule.update_scale(not math.isfinite(float(norm)))
        return self._rule.cur_scale

    def stepped(self, norm: Tensor) -> None:
        """The step was taken, or skipped where this norm of its gradient is not finite."""
        assert self._norm is None, "the last step's norm has not been asked for"
        self._norm = norm

    def to_json(self) -> dict[str, Any]:
        """For a checkpoint; the same on every rank and layout."""
        return {
            "scale": self.scale(),
            "steps": self._rule.cur_iter,
            "last_overflow": self._rule.last_overflow_iter,
            "hysteresis": self._rule.cur_hysteresis,
        }

    def load(self, values: Mapping[str, Any]) -> None:
        self._norm = None
        self._rule.cur_scale = values["scale"]
        self._rule.cur_iter = values["steps"]
        self._rule.last_overflow_iter = values["last_overflow"]
        self._rule.cur_hysteresis = values["hysteresis"]
