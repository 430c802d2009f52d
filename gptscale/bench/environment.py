"""Where a measurement was taken, and whether other work was in its way."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec

from gptscale import __version__
from gptscale.runtime.hardware import describe_host

QUIET_LOAD = 0.5
"""Load average of other work from which on elapsed times are doubtful."""


@dataclass(frozen=True)
class Environment:
    date: str
    command: str
    gptscale: str
    python: str
    torch: str
    deepspeed: str
    transformers: str | None
    cpu: str
    usable_cores: int
    device: str
    threads: int
    ranks: int
    malloc: str
    load_at_start: float
    """Load average over one minute, before any process of ours computed."""
    load_at_end: float
    """The same at the end, our own computing included."""

    @property
    def other_load(self) -> float:
        """What others put on the machine, at the larger of both ends."""
        return max(self.load_at_start, self.load_at_end - self.ranks * self.threads)

    def doubt(self) -> str | None:
        """Why elapsed times may not be trusted; None where they may."""
        if self.ranks * self.threads > self.usable_cores:
            return f"{self.ranks} ranks of {self.threads} threads share {self.usable_cores} cores"
        if self.other_load > QUIET_LOAD:
            return f"other work kept the machine busy (load {self.load_at_start:.1f} at the start)"
        return None


def describe_environment(
    command: str, ranks: int, threads: int, device: str, keeps_freed_memory: bool, load_at_start: float
) -> Environment:
    host = describe_host()
    return Environment(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command,
        gptscale=__version__,
        python=platform.python_version(),
        torch=version("torch"),
        deepspeed=version("deepspeed"),
        transformers=version("transformers") if find_spec("transformers") else None,
        cpu=host.cpu,
        usable_cores=host.cores,
        device=device,
        threads=threads,
        ranks=ranks,
        malloc=f"{' '.join(platform.libc_ver())}, {'keeps' if keeps_freed_memory else 'may return'} freed memory",
        load_at_start=load_at_start,
        load_at_end=load_average(),
    )


def load_average() -> float:
    """Over the last minute."""
    return os.getloadavg()[0]
