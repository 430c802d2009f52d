"""Weights & Biases: one run there for one run here, however often it is stopped, killed and resumed.

Facts about wandb 0.31 that shape this (its source and tests of ours):
- Lines with one `step` are merged until a line with a later step comes; a line with an earlier step is dropped with a
  warning. Online, a resumed run has to log steps from `starting_step` on, which the server says.
- Offline, nothing continues: every start makes another folder with the run's id, and `wandb sync` uploads those of one
  id in order of time, as one run.
- Its process writes the record every 15 s, and not when the training is killed. So a resumed run logs again, from
  metrics.jsonl, what the record lacks, and passes over what the record has.
- Lost connections during a run are its own business: it retries, and what it could not send stays in the record.
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from gptscale.config.schema import LoggingConfig
from gptscale.runtime.errors import UserError
from gptscale.runtime.files import write_bytes_atomically
from gptscale.train.metrics import finite, read_metrics
from gptscale.train.wandb_record import last_recorded_step

LOG = logging.getLogger("gptscale.train")

FINISH_TIMEOUT_S = 120.0
"""How long the end of a run may wait for an upload (wandb's default is for ever, on machines that cost money)."""


class WandbTracker:
    """Without an account it records offline below the run folder.

    The run's id is kept in the run folder, so that a resumed run continues the same W&B run.
    """

    def __init__(self, config: LoggingConfig, run_dir: Path, settings: Mapping[str, Any]) -> None:
        id_file = run_dir / "wandb-id"
        if not id_file.exists():
            write_bytes_atomically(id_file, secrets.token_hex(4).encode())
        ident = id_file.read_text()
        self._silent = False
        self._run = start(config.project, ident, run_dir, settings)
        online = not self._run.offline
        self._recorded = self._run.starting_step - 1 if online else last_recorded_step(run_dir / "wandb", ident)
        for group in ("train", "eval", "throughput", "time", "memory"):
            self._run.define_metric(f"{group}/*", step_metric="tokens")
        for line in read_metrics(run_dir / "metrics.jsonl"):
            self.log(line["step"], line)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        if self._silent or step <= self._recorded:
            return
        known = {key: finite(value) for key, value in values.items() if key != "step" and finite(value) is not None}
        self._unless_it_died(lambda: self._run.log(known, step=step))

    def flush(self) -> None:
        """Nothing to do: what is lost is logged again."""

    def close(self) -> None:
        if not self._silent:
            self._unless_it_died(self._finish)

    def _finish(self) -> None:
        """`finish` may return before wandb's process has written the record; its end is what one can wait for."""
        import wandb

        self._run.finish()
        wandb.teardown(0)

    def _unless_it_died(self, action: Any) -> None:
        """wandb's own process may be killed, by the kernel where memory is short; a training need not end for that."""
        from wandb.errors import Error

        try:
            action()
        except (OSError, Error) as error:
            self._silent = True
            LOG.warning(
                f"W&B records no more: {error}; the training goes on. metrics.jsonl has everything, and when the run "
                "is started again W&B gets what it lacks"
            )


def start(project: str, ident: str, run_dir: Path, settings: Mapping[str, Any]) -> Any:
    """wandb's run. Offline without an account, and where its server does not answer; UserError for a wrong key."""
    import wandb
    from wandb.errors import AuthenticationError, CommError

    decided = "WANDB_MODE" in os.environ
    mode: Literal["offline"] | None = None if decided or wandb.login(prompt=False, verify=False) else "offline"

    def init(mode: Literal["offline"] | None) -> Any:
        own = wandb.Settings()
        if "WANDB_FINISH_TIMEOUT" not in os.environ:
            own.finish_timeout = FINISH_TIMEOUT_S
        return wandb.init(
            project=project,
            id=ident,
            name=run_dir.name,
            dir=str(run_dir),
            config=dict(settings),
            resume="allow",
            mode=mode,
            settings=own,
        )

    try:
        return init(mode)
    except AuthenticationError as error:
        raise UserError(
            f"W&B refuses the key: {' '.join(str(error).split())}\nrun `wandb login`, or use logging=local"
        ) from error
    except CommError as error:
        LOG.warning(
            f"W&B does not answer ({' '.join(str(error).split())}): this start is recorded offline; "
            f"`wandb sync {run_dir}/wandb/offline-run-*-{ident}` uploads it"
        )
        wandb.teardown(1)  # its process holds the id
        return init("offline")
