"""TensorBoard: event files below the run folder, for `tensorboard --logdir runs`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

FOLDER = "tensorboard"


class TensorboardTracker:
    """Scalars under the keys of metrics.jsonl.

    A resumed run writes a file of its own, whose first event takes back all that was logged after `step`. What lies
    before is on the disk: a run resumes from a save, and before a save comes a flush.
    """

    def __init__(self, run_dir: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run_dir / FOLDER), purge_step=step + 1)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Numbers alone: TensorBoard draws nothing else, and a value that is not known is no point of a curve."""
        for key, value in values.items():
            if key != "step" and isinstance(value, (int, float)):
                self._writer.add_scalar(key, value, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
