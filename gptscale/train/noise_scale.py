"""The gradient noise scale of a run, from what single steps estimate."""

from __future__ import annotations

import math
from collections import deque
from pathlib import Path

from gptscale.train.metrics import read_metrics

NOISE_STEPS = 50
"""Measured steps that it is taken over."""


class NoiseScale:
    """The gradient noise scale over the last measured steps: means first, then their ratio, as single steps say little.

    McCandlish et al., arXiv 1812.06162, appendix A.1. It begins with what the metrics file holds, and so a resumed run
    gives what one that was never stopped would.
    """

    def __init__(self, metrics: Path) -> None:
        measured = [line for line in read_metrics(metrics) if line.get("noise/signal") is not None]
        pairs = ((line["noise/signal"], line["noise/trace"]) for line in measured)
        self._window: deque[tuple[float, float]] = deque(pairs, maxlen=NOISE_STEPS)

    def add(self, signal: float, trace: float) -> dict[str, float]:
        """Values for a line of metrics; the scale is not finite while noise hides the gradient altogether."""
        if math.isfinite(signal) and math.isfinite(trace):
            self._window.append((signal, trace))
        signals, traces = (sum(column) for column in zip(*self._window, strict=True)) if self._window else (0.0, 0.0)
        scale = traces / signals if signals > 0 else math.inf
        return {"noise/signal": signal, "noise/trace": trace, "train/noise_scale_tokens": scale}
