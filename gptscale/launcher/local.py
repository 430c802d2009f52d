"""Start the ranks of one host and stay with them: pass signals on, end all when one fails, leave nobody behind."""

from __future__ import annotations

import math
import os
import selectors
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from gptscale.launcher.outcome import Exit, describe, find_culprit, total_exit_code
from gptscale.launcher.ports import reserved_port
from gptscale.launcher.rank import Rank
from gptscale.runtime.errors import EXIT_INTERRUPTED, EXIT_STOPPED
from gptscale.runtime.process import LAUNCHER_VARIABLE
from gptscale.runtime.signals import STOP_SIGNALS, InterruptCounter, SignalSocket
from gptscale.runtime.watch import LAUNCHER_PID_VARIABLE

_SETTLE_S = 1.0
"""After the first failure: time for the others to fail by themselves, and to say that they lost a peer."""
_TERMINATE_S = 4.0
"""After SIGTERM to the ranks that a failure leaves: time to end before SIGKILL."""


def launch_local(
    module: str, arguments: Sequence[str], ranks: int, threads: int, logs: Path | None, stop_timeout_s: float
) -> int:
    """Run `python -m module arguments…` once per rank on this host; returns the exit code for the whole.

    The user sees rank 0's output as it comes. What another rank says goes to `logs/rank-N.log`, and to stderr if that
    rank is why the run ended. TERM, INT and USR1 go to every rank at once, which then have `stop_timeout_s` to save and
    end; a second INT kills them (130). A rank that fails takes the others with it within seconds, and its exit code is
    returned: 2, 3 and 75 as they are, 1 for one that a signal killed. To be called in the main thread.
    """
    numbers = (*STOP_SIGNALS, signal.SIGCHLD)
    signals = SignalSocket(numbers, handler=lambda number: None)
    supervisor = _Supervisor(signals, stop_timeout_s)
    try:
        with reserved_port() as port:
            for number in range(ranks):
                environ = rank_environ(os.environ, number, ranks, threads, port)
                log = None if logs is None else logs / f"rank-{number}.log"
                supervisor.add(Rank(number, [sys.executable, "-m", module, *arguments], environ, log))
            return supervisor.run()
    finally:
        supervisor.close()
        signals.close()


def rank_environ(base: Mapping[str, str], rank: int, ranks: int, threads: int, port: int) -> dict[str, str]:
    """A rank's environment: what torch.distributed reads, and an OpenMP that sleeps where it would spin.

    With more runnable threads than cores, spinning costs half of the speed and more (585 against 1373 tokens a
    CPU-second). What the user set about waiting stays; what an outer torchrun set about its own ranks goes.
    """
    environ = {name: value for name, value in base.items() if not name.startswith("TORCHELASTIC_")}
    environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    environ.setdefault("GOMP_SPINCOUNT", "0")
    environ |= {
        LAUNCHER_VARIABLE: "gptscale",
        LAUNCHER_PID_VARIABLE: str(os.getpid()),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": str(threads),
    }
    return environ


class _Supervisor:
    """The ranks, who of them has ended, and what is to happen when. One thread, one wait."""

    def __init__(self, signals: SignalSocket, stop_timeout_s: float) -> None:
        self._signals = signals
        self._stop_timeout_s = stop_timeout_s
        self._ranks: list[Rank] = []
        self._exits: list[Exit] = []
        self._asked: set[int] = set()
        """Signals passed on."""
        self._interrupts = InterruptCounter()
        self._deadlines_s: dict[Callable[[], None], float] = {}
        """What to do, once, and when on the monotonic clock."""
        self._told_to_end = False
        self._selector = selectors.DefaultSelector()
        self._selector.register(signals, selectors.EVENT_READ)

    def add(self, rank: Rank) -> None:
        self._ranks.append(rank)
        if (output := rank.output()) is not None:
            self._selector.register(output, selectors.EVENT_READ, rank)

    def run(self) -> int:
        """Until every rank has ended; returns the exit code for the whole and has said why on stderr."""
        while self._running():
            for key, _ in self._selector.select(self._wait_s()):
                if isinstance(key.data, Rank):
                    self._read(key.data)
                elif not self._pass_on(self._signals.receive()):
                    self.kill_all()
                    return EXIT_INTERRUPTED
            self._reap()
            for action in [action for action, at_s in self._deadlines_s.items() if at_s <= time.monotonic()]:
                self._deadlines_s[action] = math.inf
                action()
        return self._conclude()

    def close(self) -> None:
        """Leave nobody behind, whatever happened."""
        self.kill_all()
        self._selector.close()

    def kill_all(self) -> None:
        """SIGKILL whoever runs, with all that they started, and wait for it."""
        for rank in self._running():
            rank.kill()
        while self._running():
            self._reap()
            time.sleep(0.005)

    def _running(self) -> list[Rank]:
        return [rank for rank in self._ranks if rank.running]

    def _wait_s(self) -> float | None:
        next_s = min(self._deadlines_s.values(), default=math.inf)
        return None if next_s == math.inf else max(0.0, next_s - time.monotonic())

    def _read(self, rank: Rank) -> None:
        output = rank.output()
        rank.read_output()
        if output is not None and rank.output() is None:
            self._selector.unregister(output)

    def _pass_on(self, numbers: Sequence[int]) -> bool:
        """Signals to all ranks at once; False when that is a second Ctrl-C."""
        for number in numbers:
            if number not in STOP_SIGNALS:
                continue
            if number == signal.SIGINT and self._interrupts.is_second(time.monotonic()):
                return False
            if not self._asked:
                again = "; Ctrl-C again ends it at once" if number == signal.SIGINT else ""
                self._say(f"{signal.Signals(number).name}: the run stops after a save{again}")
            self._asked.add(number)
            for rank in self._ranks:
                rank.send(number)
            self._deadlines_s.setdefault(self._give_up_on_the_save, time.monotonic() + self._stop_timeout_s)
        return True

    def _reap(self) -> None:
        for rank in self._running():
            output = rank.output()
            code = rank.reap()
            if code is None:
                continue
            if output is not None:
                self._selector.unregister(output)
            # One that died of our signal before it could handle it had nothing to save yet: it stopped as asked.
            ended = Exit(rank.number, EXIT_STOPPED if -code in self._asked else code, told=self._told_to_end)
            self._exits.append(ended)
            if ended.failed:
                self._deadlines_s.setdefault(self._tell_to_end, time.monotonic() + _SETTLE_S)
            elif ended.code == EXIT_STOPPED:
                self._deadlines_s.setdefault(self._give_up_on_the_save, time.monotonic() + self._stop_timeout_s)

    def _tell_to_end(self) -> None:
        self._told_to_end = True
        for rank in self._ranks:
            rank.send(signal.SIGTERM)
        self._deadlines_s[self._kill_the_rest] = time.monotonic() + _TERMINATE_S

    def _kill_the_rest(self) -> None:
        for rank in self._running():
            rank.kill()

    def _give_up_on_the_save(self) -> None:
        late = self._running()
        if late and not self._told_to_end:
            numbers = ", ".join(str(rank.number) for rank in late)
            self._say(f"rank {numbers} did not save and end within {self._stop_timeout_s:g} s; killed")
            self._told_to_end = True
        self._kill_the_rest()

    def _conclude(self) -> int:
        culprit = find_culprit(self._exits)
        if culprit is not None:
            rank = self._ranks[culprit.rank]
            sys.stderr.write(rank.tail)
            if not (culprit.explains_itself and (culprit.rank == 0 or rank.tail)):
                log = f"; its log is {rank.log}" if rank.log is not None and rank.log.exists() else ""
                self._say(describe(culprit) + log)
        return total_exit_code(self._exits)

    def _say(self, line: str) -> None:
        print(f"gptscale: {line}", file=sys.stderr, flush=True)
