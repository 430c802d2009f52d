"""Real ranks that start in a moment: processes forked from one that has imported torch and DeepSpeed already.

Importing both costs a core some five seconds, so a test that starts them afresh for every layout spends its time there.
The forked processes are real: they have pids, can be killed, talk over gloo, and share nothing.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from gptscale.launcher.ports import reserved_port

# Read when OpenMP loads, in the fork server: two ranks that spin on two cores take ten times as long.
QUIET = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
os.environ.update(QUIET)

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.helpers.preloaded"])

LIMIT_S = 120.0


@dataclass
class Started:
    """Ranks under way and where their output goes."""

    processes: list[BaseProcess]
    outputs: list[Path]
    port: ExitStack
    """Holds the port where they meet, as long as they may come to it."""

    def wait(self, limit_s: float = LIMIT_S) -> list[int]:
        """Exit codes, once all have ended; past the limit they are killed and the test fails."""
        deadline_s = time.monotonic() + limit_s
        for process in self.processes:
            process.join(max(0.0, deadline_s - time.monotonic()))
        late = [process for process in self.processes if process.is_alive()]
        self.kill()
        assert not late, f"ranks did not end within {limit_s:.0f} s\n{self.text()}"
        return [process.exitcode if process.exitcode is not None else -1 for process in self.processes]

    def kill(self) -> None:
        """SIGKILL, now."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        self.port.close()

    def text(self) -> str:
        return "\n".join(path.read_text(errors="replace") for path in self.outputs if path.exists())


def start(
    function: Callable[..., Any],
    arguments: Sequence[Any],
    ranks: int,
    folder: Path,
    environ: Mapping[str, str] | None = None,
) -> Started:
    """Run `function(*arguments)` in each of `ranks` processes, with a rank's environment and `folder` as its cwd.

    `function` lies in an importable module. Its return value, where it is an int, is the exit code.
    """
    folder.mkdir(parents=True, exist_ok=True)
    started = Started([], [], ExitStack())
    port = started.port.enter_context(reserved_port())
    for rank in range(ranks):
        output = folder / f"rank-{rank}-{port}.txt"
        variables = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            **(environ or {}),
        }
        process = CONTEXT.Process(target=_run, args=(function, tuple(arguments), variables, str(folder), str(output)))
        process.start()
        started.processes.append(process)
        started.outputs.append(output)
    return started


def run(
    function: Callable[..., Any], arguments: Sequence[Any], ranks: int, folder: Path, limit_s: float = LIMIT_S
) -> Started:
    """Start, wait, and require that every rank ended well."""
    started = start(function, arguments, ranks, folder)
    codes = started.wait(limit_s)
    assert codes == [0] * ranks, f"exit codes {codes}\n{started.text()}"
    return started


def _run(
    function: Callable[..., Any], arguments: tuple[Any, ...], variables: dict[str, str], folder: str, output: str
) -> None:
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(variables)
    os.chdir(folder)
    try:
        code = function(*arguments)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0)  # without waiting for whatever libraries do at exit
