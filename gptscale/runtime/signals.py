"""A request to stop: TERM, INT and USR1 set a flag that the training loop reads; a second INT ends the process."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from types import FrameType, TracebackType
from typing import NoReturn

from gptscale.runtime.errors import EXIT_INTERRUPTED

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SAME_INTERRUPT_S = 0.5
"""Two INTs closer than this are one: on Ctrl-C a terminal and a launcher both deliver theirs."""
_FLUSH_LIMIT_S = 0.5


class SignalSocket:
    """A socket on which the numbers of arriving signals can be read, by any thread or selector.

    Python runs signal handlers in the main thread and between bytecodes only, so one that waits in a C call would see
    none; CPython writes to its wake-up socket at the very arrival. Made and closed in the main thread. `handler` is
    called with the number too, in Python's own time.
    """

    def __init__(self, numbers: Iterable[signal.Signals], handler: Callable[[int], None]) -> None:
        def handle(number: int, frame: FrameType | None) -> None:
            handler(number)

        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._previous_wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._previous_handlers = {number: signal.signal(number, handle) for number in numbers}
        _open_sockets.append(self)

    def fileno(self) -> int:
        return self._reader.fileno()

    def receive(self) -> list[int]:
        """Wait for signals and return their numbers, in order, those of other handlers too; none after `stop`."""
        return list(self._reader.recv(64))

    def stop(self) -> None:
        """Put the former handlers back and let a waiting `receive` return; once more does nothing."""
        if self in _open_sockets:
            self._restore(self._previous_wakeup)
            self._writer.shutdown(socket.SHUT_WR)  # closing alone is not seen while a forked child has it open
            self._writer.close()

    def close(self) -> None:
        """`stop`, and free the socket, which nobody may be receiving from any more."""
        self.stop()
        self._reader.close()

    def _restore(self, wakeup: int) -> None:
        _open_sockets.remove(self)
        for number, handler in self._previous_handlers.items():
            # None: the handler is C code's, which Python can only leave or drop.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(wakeup)


_open_sockets: list[SignalSocket] = []


def _leave_them_to_the_parent() -> None:
    """In a forked child: else the TERM that ends a data worker would reach its parent's socket, and stop training."""
    for shared in list(_open_sockets):
        shared._restore(wakeup=-1)


os.register_at_fork(after_in_child=_leave_them_to_the_parent)


class InterruptCounter:
    """Tells a second Ctrl-C from the echo of the first."""

    def __init__(self) -> None:
        self._last_s: float | None = None

    def is_second(self, now_s: float) -> bool:
        """Count one INT that came at `now_s`; True from the second real one on."""
        if self._last_s is None:
            self._last_s = now_s
            return False
        return now_s - self._last_s >= SAME_INTERRUPT_S


class StopRequest:
    """Listens from construction until `restore` (or the end of a `with`); made in the main thread only.

    The handlers set the flag and nothing else: saving is for the loop, between steps. A second INT ends the process
    with 130, even while the main thread waits in a collective.
    """

    def __init__(self) -> None:
        self._signal_name: str | None = None
        self._signals = SignalSocket(STOP_SIGNALS, self._set_flag)
        self._listener = threading.Thread(target=self._listen, name="stop-request", daemon=True)
        self._listener.start()

    @property
    def requested(self) -> bool:
        """Somebody asked this process to stop."""
        return self._signal_name is not None

    @property
    def signal_name(self) -> str | None:
        """The first signal that asked, "SIGTERM" for one; None while nobody has."""
        return self._signal_name

    def restore(self) -> None:
        """Put the former handlers back; the flag stays readable. Once more does nothing."""
        self._signals.stop()
        self._listener.join()
        self._signals.close()

    def __enter__(self) -> StopRequest:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()

    def _set_flag(self, number: int) -> None:
        if self._signal_name is None:
            self._signal_name = signal.Signals(number).name

    def _listen(self) -> None:
        interrupts = InterruptCounter()
        while numbers := self._signals.receive():
            for number in numbers:
                if number in STOP_SIGNALS:
                    self._set_flag(number)
                if number == signal.SIGINT and interrupts.is_second(time.monotonic()):
                    exit_at_once(EXIT_INTERRUPTED)


def exit_at_once(code: int) -> NoReturn:
    """End this process without clean-up, from any thread, after what is buffered for stdout and stderr is out.

    The flush is given half a second: the thread that we interrupt may hold the buffer's lock, or nobody may read.
    """
    flusher = threading.Thread(target=_flush_output, daemon=True)
    flusher.start()
    flusher.join(timeout=_FLUSH_LIMIT_S)
    os._exit(code)


def _flush_output() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not stream.closed:
            stream.flush()
