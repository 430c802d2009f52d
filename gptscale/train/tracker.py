"""Where metrics go besides metrics.jsonl."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from gptscale.config.schema import LoggingConfig
from gptscale.runtime.errors import UserError


class Tracker(Protocol):
    """Takes the lines of metrics.jsonl, in their order; a line of an evaluation has the step of the one before it."""

    def log(self, step: int, values: Mapping[str, Any]) -> None: ...

    def flush(self) -> None:
        """Before a save: what is not on the disk by then, a resumed run has to be able to log again."""
        ...

    def close(self) -> None: ...


class NoTracker:
    def log(self, step: int, values: Mapping[str, Any]) -> None:
        pass

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


def check_tracker(config: LoggingConfig) -> None:
    """Raises UserError where the tracker's package is not installed."""
    if config.name != "local" and importlib.util.find_spec(config.name) is None:
        raise UserError(
            f"logging={config.name} needs the package {config.name}, which is not installed\n"
            f"install it (pip install {config.name}), or use logging=local"
        )


def build_tracker(config: LoggingConfig, run_dir: Path, settings: Mapping[str, Any], step: int) -> Tracker:
    """The tracker of a run that goes on from `step`; metrics.jsonl is cut back to it.

    `settings` is sent and stored: those with secrets as references (`Composed.public`).
    """
    if config.name == "wandb":
        from gptscale.train.wandb_tracker import WandbTracker

        return WandbTracker(config, run_dir, settings)
    if config.name == "tensorboard":
        from gptscale.train.tensorboard_tracker import TensorboardTracker

        return TensorboardTracker(run_dir, step)
    return NoTracker()
