"""Start trees of processes, look at them, and never leave one behind, whatever a test does."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
_MARK = "GPTSCALE_TEST_TREE"


class Tree:
    """A started command and all that comes from it, known by a mark in the environment that children inherit."""

    def __init__(self, command: Sequence[str], environ: dict[str, str] | None = None) -> None:
        self._mark = f"{_MARK}={secrets.token_hex(8)}"
        name, _, value = self._mark.partition("=")
        # A test that runs within some launcher's rank must not hand that rank's place on.
        clean = {key: text for key, text in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        self.process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env={**clean, **(environ or {}), name: value},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def alive(self) -> list[int]:
        """Every living process of the tree (a zombie has no environment and does not count)."""
        return processes_with(self._mark)

    def wait_until_gone(self, timeout_s: float, but: Collection[int] = ()) -> None:
        """Wait until nobody of the tree lives, `but` for these pids; fails, saying who does, after `timeout_s`."""
        deadline_s = time.monotonic() + timeout_s
        while alive := [pid for pid in self.alive() if pid not in but]:
            if time.monotonic() > deadline_s:
                lines = subprocess.run(
                    ["ps", "-o", "pid,ppid,stat,args", "-p", ",".join(map(str, alive))], capture_output=True, text=True
                )
                raise AssertionError(f"alive after {timeout_s} s:\n{lines.stdout}")
            time.sleep(0.02)

    def end(self, timeout_s: float = 30) -> tuple[int, str, str]:
        """Wait for the command; its exit code, stdout and stderr."""
        out, err = self.process.communicate(timeout=timeout_s)
        return self.process.returncode, out, err

    def kill(self) -> None:
        deadline_s = time.monotonic() + 60
        while alive := self.alive():
            assert time.monotonic() < deadline_s, f"processes {alive} of {self.process.args} do not die"
            for pid in alive:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
        self.process.communicate(timeout=60)


@contextmanager
def tree(*command: str, environ: dict[str, str] | None = None) -> Iterator[Tree]:
    """Start a command; at the end kill what is left of it."""
    started = Tree(command, environ)
    try:
        yield started
    finally:
        started.kill()


def wait_for_ranks(folder: Path, count: int, of: Tree, timeout_s: float = 60) -> list[dict[str, Any]]:
    """What each `tests.helpers.worker` wrote about itself, by rank, once all of them are ready."""

    def ready() -> bool:
        assert of.process.poll() is None, f"the launcher ended early: {of.process.communicate()}"
        return all((folder / f"rank-{rank}.json").exists() for rank in range(count))

    wait_until(ready, f"{count} ranks", timeout_s)
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(count)]


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"{what}: not after {timeout_s} s"
        time.sleep(0.02)


def processes_with(variable: str) -> list[int]:
    """Living processes that have `NAME=value` in their environment."""
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    return [pid for pid in pids if variable.encode() in _environ_of(pid)]


def _environ_of(pid: int) -> list[bytes]:
    """Empty for a process that is gone, a zombie, another user's or the kernel's."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return []
