"""Where metrics go besides metrics.jsonl."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from gptscale.config.schema import LoggingConfig
from gptscale.runtime.files import write_bytes_atomically


class Tracker(Protocol):
    def log(self, step: int, values: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class NoTracker:
    def log(self, step: int, values: Mapping[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass


class WandbTracker:
    """Weights & Biases. Without an account it records offline below the run folder.

    The run's id is kept in the run folder, so that a resumed run continues the same W&B run.
    """

    def __init__(self, config: LoggingConfig, run_dir: Path, settings: Mapping[str, Any]) -> None:
        """`settings` is sent and stored: those with secrets as references (`Composed.public`)."""
        import wandb

        id_file = run_dir / "wandb-id"
        if not id_file.exists():
            write_bytes_atomically(id_file, secrets.token_hex(4).encode())
        signed_in = bool(os.environ.get("WANDB_API_KEY")) or wandb.api.api_key is not None
        self._run = wandb.init(
            project=config.project,
            id=id_file.read_text(),
            name=run_dir.name,
            dir=str(run_dir),
            config=dict(settings),
            resume="allow",
            mode=None if signed_in or "WANDB_MODE" in os.environ else "offline",
        )

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


def build_tracker(config: LoggingConfig, run_dir: Path, settings: Mapping[str, Any]) -> Tracker:
    return WandbTracker(config, run_dir, settings) if config.name == "wandb" else NoTracker()
