"""The folder of a run: who may write in it, and what lies where."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gptscale.checkpoint.folder import CHECKPOINTS, list_checkpoints
from gptscale.config.schema import RunConfig
from gptscale.runtime.errors import UserError
from gptscale.runtime.files import write_bytes_atomically
from gptscale.runtime.locks import FileLock
from gptscale.runtime.logs import open_logs


class RunFolder:
    """Paths of a run, and the kernel lock that lets one process at a time go on with it."""

    def __init__(self, config: RunConfig) -> None:
        assert config.dir is not None
        self.path = Path(config.dir)
        self.checkpoints = self.path / CHECKPOINTS
        self.metrics = self.path / "metrics.jsonl"
        self.samples = self.path / "samples.jsonl"
        self.report = self.path / "report.html"
        self._resume = config.resume
        self._lock = FileLock(self.path / "lock")

    def open(self) -> None:
        """Take the lock; raises UserError where the run is in use, or holds a run that must not be gone on with."""
        with self.explained():
            self.path.mkdir(parents=True, exist_ok=True)
            free = self._lock.acquire(blocking=False)
        if not free:
            raise UserError(f"{self.path} is in use by {self._lock.owner()}\nwait for it, or choose another run.name")
        if self._resume == "never" and (list_checkpoints(self.checkpoints) or self.metrics.exists()):
            self._lock.release()
            raise UserError(f"{self.path} holds a run, and run.resume=never\nuse run.resume=auto, or another run.name")

    def write_identity(self, config_yaml: str, tokenizer: Path) -> None:
        """Record the settings that the run goes on with (some may have changed on resume), and its tokenizer."""
        content = tokenizer.read_bytes()
        with self.explained():
            write_bytes_atomically(self.path / "config.yaml", config_yaml.encode())
            write_bytes_atomically(self.path / tokenizer.name, content)

    def write_kernels(self, content: str) -> None:
        """Record which attention kernels the run computes with, and what timing them gave."""
        with self.explained():
            write_bytes_atomically(self.path / "attention.json", content.encode())

    def open_logs(self, rank: int) -> None:
        """From now on what a rank says is in `logs/rank-N.log` too."""
        with self.explained():
            open_logs(self.path / "logs", rank)

    def close(self) -> None:
        self._lock.release()

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Turn an OSError of the block into a UserError that says what to do about it."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be written: {error.strerror}\nfree the disk, or choose another run.dir"
            ) from error
