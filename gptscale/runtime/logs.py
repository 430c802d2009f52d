"""What a rank says: a log each, rank 0 also to stderr; and how to tell a failure so that its cause stays on top."""

from __future__ import annotations

import logging
import os
import re
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path

from gptscale.runtime.errors import (
    EXIT_DIVERGED,
    EXIT_FAILED,
    EXIT_LOST_PEER,
    EXIT_STOPPED,
    EXIT_USER,
    DivergedError,
    PeerCrashedError,
    PeerFailedError,
    StoppedError,
    UserError,
)
from gptscale.runtime.process import Launcher

LOGGER_NAME = "gptscale"
"""Parent of all of the package's loggers (`logging.getLogger(__name__)`)."""

DEBUG_VARIABLE = "GPTSCALE_DEBUG"

_LOST_PEER = re.compile(
    r"Connection closed by peer"
    r"|Connection reset by peer"
    r"|Broken pipe"
    r"|Connection refused"
    r"|Timed out waiting \d+ms for (?:recv|send) operation"
    r"|Timed out after \d+ seconds waiting for clients"
    r"|failed to pass monitoredBarrier"
    r"|wait timeout after \d+ms"
    r"|Socket Timeout"
    r"|NCCL communicator (?:was|has been) aborted"
    r"|ncclRemoteError"
    r"|collective operation timeout"
)
"""From gloo, torch's store and NCCL. All but NCCL's were seen with torch 2.13, ranks killed or held in collectives."""


def open_logs(folder: Path | None, rank: int, level: int = logging.INFO) -> logging.Logger:
    """Send the package's log records to `folder/rank-N.log` (appended) and, on rank 0, to stderr.

    Without a folder only rank 0 is heard. May be called again, with the folder once the run's is known: it replaces
    what an earlier call set. stdout stays free for results.
    """
    logger = logging.getLogger(LOGGER_NAME)
    logger.setLevel(level)
    logger.propagate = False
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        file = _RunLog(folder / f"rank-{rank}.log", encoding="utf-8")
        file.setFormatter(logging.Formatter(f"%(asctime)s rank {rank} %(levelname)s %(message)s"))
        logger.addHandler(file)
    if rank == 0:
        screen = logging.StreamHandler(sys.stderr)
        screen.setFormatter(_Short())
        logger.addHandler(screen)
    if not logger.handlers:
        logger.addHandler(logging.NullHandler())
    return logger


class _RunLog(logging.FileHandler):
    """Ends at the first line that the disk refuses, and says so once; Python's own prints a traceback at every line.

    A full disk must not end a training that may go on; its own writes will say the same if it may not.
    """

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        error = sys.exc_info()[1]
        if not isinstance(error, OSError) or self.stream is None:
            super().handleError(record)
            return
        with open(os.devnull, "wb") as nowhere:  # takes what is buffered too, which would fail again at exit
            os.dup2(nowhere.fileno(), self.stream.fileno())
        print(f"no more log in {self.baseFilename}: {error.strerror}", file=sys.stderr, flush=True)


class _Short(logging.Formatter):
    """For a person at a terminal: the message, and the level where it is more than information."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno <= logging.INFO else f"{record.levelname.lower()}: {text}"


def lost_a_peer(error: BaseException) -> bool:
    """This rank is fine and another is not: a collective's connection broke or its time ran out.

    torch raises RuntimeError (or a subclass) for these; a broken pipe of the rank's own is an OSError and no peer.
    """
    if isinstance(error, PeerCrashedError):
        return True
    return isinstance(error, RuntimeError) and _LOST_PEER.search(str(error)) is not None


def describe_failure(error: BaseException, rank: int, environ: Mapping[str, str] = os.environ) -> str:
    """What to print for an error that ends a rank, without a newline at the end.

    For a user's mistake, divergence or a requested stop: the message, and the traceback only with GPTSCALE_DEBUG=1. For
    a rank that lost a peer: one line, so that the traceback of the one that failed stays on top. Else the traceback.
    """
    debug = environ.get(DEBUG_VARIABLE) == "1"
    if isinstance(error, (UserError, DivergedError, StoppedError)) and not debug:
        return str(error)
    if lost_a_peer(error) and not debug:
        return f"rank {rank}: lost a peer: {_first_line(str(error))}"
    lines = "".join(traceback.format_exception(error)).rstrip("\n").splitlines()
    return "\n".join(f"rank {rank}: {line}" for line in lines)


def exit_code_of(error: BaseException, launcher: Launcher) -> int:
    """The exit code that goes with an error. Our own launcher alone is told of a lost peer, to find the one lost."""
    if launcher == "gptscale" and (isinstance(error, PeerFailedError) or lost_a_peer(error)):
        return EXIT_LOST_PEER
    if isinstance(error, UserError):
        return EXIT_USER
    if isinstance(error, DivergedError):
        return EXIT_DIVERGED
    if isinstance(error, StoppedError):
        return EXIT_STOPPED
    return EXIT_FAILED


def report_failure(error: BaseException, rank: int) -> None:
    """Tell stderr, and the rank's log if one is open. The log has the traceback in every case."""
    print(describe_failure(error, rank), file=sys.stderr, flush=True)
    for handler in logging.getLogger(LOGGER_NAME).handlers:
        if isinstance(handler, logging.FileHandler):
            record = logging.LogRecord(
                LOGGER_NAME, logging.ERROR, __file__, 0, str(error), None, (type(error), error, error.__traceback__)
            )
            handler.handle(record)


def _first_line(text: str) -> str:
    """The line that names the loss, less gloo's source path before it and its advice behind it."""
    lines = [line for line in text.splitlines() if _LOST_PEER.search(line)] or [text]
    return re.sub(r"^\[\S+?:\d+\] |\. This is typically caused by .*", "", lines[0])
