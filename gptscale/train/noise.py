"""The gradient noise scale of a run, from what single steps estimate.

The noise scale of one step is a quotient of two noisy estimates. McCandlish et al. (arXiv 1812.06162, appendix A.1)
average each of the two over steps before they divide, and so does this.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

from gptscale.train.metrics import finite

SIGNAL, TRACE, SCALE = "noise/signal", "noise/trace", "train/noise_scale_tokens"
WINDOW = 20
"""Measured steps that an average is over."""


class NoiseWindow:
    """The last measured steps. It holds what the metrics file holds, so that a resumed run goes on with the same."""

    def __init__(self, lines: Iterable[Mapping[str, Any]] = ()) -> None:
        """`lines` are those of the metrics file up to here."""
        self._measured: deque[tuple[float, float]] = deque(maxlen=WINDOW)
        for line in lines:
            self._add(line)

    def scale(self, values: Mapping[str, Any]) -> float | None:
        """tr(Σ) / |G|² in tokens, with this step's values; None while the average shows no signal above the noise."""
        self._add(values)
        signal = sum(signal for signal, _ in self._measured)
        trace = sum(trace for _, trace in self._measured)
        return trace / signal if signal > 0 and trace > 0 else None

    def _add(self, values: Mapping[str, Any]) -> None:
        signal, trace = finite(values.get(SIGNAL)), finite(values.get(TRACE))
        if signal is not None and trace is not None:  # a skipped step measures nothing
            self._measured.append((signal, trace))
