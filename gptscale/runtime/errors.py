"""How a program says that it cannot go on, and the exit code that goes with it."""

from __future__ import annotations

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USER = 2
EXIT_DIVERGED = 3
EXIT_STOPPED = 75
EXIT_LOST_PEER = 76
"""Between a rank and our own launcher only: it ended because another rank had. To anybody else that is a plain 1."""
EXIT_INTERRUPTED = 130


class UserError(ValueError):
    """The user's configuration or data is wrong: at most two lines that name the key or file, what is wrong, the fix.

    Entry points print the message alone and exit with `EXIT_USER`; with GPTSCALE_DEBUG=1 they print the traceback too.
    """


class OutOfMemoryError(UserError):
    """The settings do not fit into the memory of a device or process; the second line says which to change, how."""


class PeerFailedError(UserError):
    """Another rank met a mistake of the user's and says which; this one only stops with it, and says nothing."""


class PeerCrashedError(RuntimeError):
    """Another rank met a bug and shows its traceback; this one only stops with it."""


class DivergedError(RuntimeError):
    """Training went past the guard's limits; entry points exit with `EXIT_DIVERGED`."""


class StoppedError(Exception):
    """Somebody asked the run to stop and it has saved; entry points exit with `EXIT_STOPPED`."""
