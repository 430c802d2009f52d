"""One rank as its launcher sees it: a process in its own session, with its output where it belongs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

_TAIL_BYTES = 64 * 1024
"""Of a rank's output, enough for any traceback; older bytes are in its log file or gone."""


class Rank:
    """A started rank. Rank 0 talks to the user; what the others say goes into a bounded buffer and, given one, a log.

    Its session of its own keeps the terminal's signals from it (the launcher passes them on, to all ranks at once) and
    makes it the leader of a process group, so that what it started can be ended with it.
    """

    def __init__(self, number: int, command: Sequence[str], environ: Mapping[str, str], log: Path | None) -> None:
        self.number = number
        self.log = log
        output = None if number == 0 else subprocess.PIPE
        self._process = subprocess.Popen(
            command,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=None if number == 0 else subprocess.STDOUT,
            start_new_session=True,
            bufsize=0,
        )
        self._tail = bytearray()
        if self._process.stdout is not None:
            os.set_blocking(self._process.stdout.fileno(), False)

    @property
    def running(self) -> bool:
        """Not yet seen to have ended, by `reap`."""
        return self._process.returncode is None

    @property
    def tail(self) -> str:
        """The last of what it said; empty for rank 0."""
        return self._tail.decode(errors="replace")

    def output(self) -> int | None:
        """The descriptor to wait for output on, while there can be more."""
        pipe = self._process.stdout
        return None if pipe is None or pipe.closed else pipe.fileno()

    def read_output(self) -> None:
        """Take what there is to read, without waiting."""
        pipe = self._process.stdout
        while pipe is not None and not pipe.closed:
            chunk = pipe.read(65536)
            if chunk is None:
                return
            if not chunk:
                pipe.close()
                return
            self._keep(chunk)

    def send(self, number: int) -> None:
        """Signal the rank alone: what it started is its own to stop."""
        if self.running:
            self._process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL the rank and all that it started. Only while it is not reaped, so that its group is still its own."""
        if self.running:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def reap(self) -> int | None:
        """Its exit code, negative for a signal, if it ended since the last call; None otherwise.

        What it started and left behind is killed first: until it is reaped no other process can have its group's id.
        """
        if not self.running:
            return None
        if os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            return None
        self.kill()
        code = self._process.wait()
        self.read_output()
        if self._process.stdout is not None:
            self._process.stdout.close()
        return code

    def _keep(self, chunk: bytes) -> None:
        self._tail += chunk
        del self._tail[:-_TAIL_BYTES]
        if self.log is None:
            return
        try:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with self.log.open("ab", buffering=0) as file:
                file.write(chunk)
        except OSError as error:
            # A full disk must not end a training that may go on; its own writes will say the same if it may not.
            print(f"rank {self.number}: no more log in {self.log}: {error}", file=sys.stderr, flush=True)
            self.log = None
