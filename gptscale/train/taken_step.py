"""A step that the device was given, until its numbers are here.

Reading a number of a step that the device still works on would hold the host up, and then the device in turn, which is
given the next step late. So the numbers are sent to the host when the step is given out, and read one step later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gptscale.flow import Duration, StepResult
from gptscale.train.progress import Progress


@dataclass(frozen=True)
class StepNumbers:
    """What is known of a step once the device has passed it."""

    progress: Progress
    """Where the run stands after it."""
    loss: float
    grad_norm: float
    """Before clipping."""
    learning_rate: float
    step_time_s: float
    """From the end of the step before, or of the evaluation or save in between, to its own end."""
    data_s: float
    """Of these, waiting for data."""
    forward_backward_s: float | None
    """Of these, in forward and backward of all micro-batches."""
    update_s: float | None
    """Of these, in reducing gradients, clipping and the optimizer."""
    save_s: float
    """Spent in saving since the step before; not part of `step_time_s`."""
    loss_scale: float | None
    noise_signal: float | None
    noise_trace: float | None


class Readback:
    """fp32 scalars on their way from the device: sent now, read later without waiting for work that was given since."""

    def __init__(self, scalars: Sequence[torch.Tensor]) -> None:
        values = torch.stack([scalar.detach().float() for scalar in scalars])
        self._arrived: torch.cuda.Event | None = None
        self._host = values
        if values.device.type == "cuda":
            # `item()` would wait for the whole stream, the next step included; this event comes before it.
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def read(self) -> list[float]:
        """In the order they were given."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return [float(value) for value in self._host.numpy()]


class TakenStep:
    """A step that has been given to the device."""

    def __init__(
        self,
        result: StepResult,
        progress: Progress,
        learning_rate: float,
        step_time: Duration,
        data_s: float,
        save_s: float,
    ) -> None:
        self._result = result
        self._progress = progress
        self._learning_rate = learning_rate
        self._step_time = step_time
        self._data_s = data_s
        self._save_s = save_s
        noise = [part for part in (result.noise_signal, result.noise_trace) if part is not None]
        self._readback = Readback([result.loss, result.grad_norm, *noise])

    def read(self) -> StepNumbers:
        """Waits until the device has passed the step, but for nothing that it was given since."""
        loss, grad_norm, *noise = self._readback.read()
        signal, trace = noise or (None, None)
        return StepNumbers(
            progress=self._progress,
            loss=loss,
            grad_norm=grad_norm,
            learning_rate=self._learning_rate,
            step_time_s=self._step_time.seconds(),
            data_s=self._data_s,
            forward_backward_s=self._result.forward_backward_s,
            update_s=self._result.update_s,
            save_s=self._save_s,
            loss_scale=self._result.loss_scale,
            noise_signal=signal,
            noise_trace=trace,
        )
