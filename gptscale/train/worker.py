"""A rank, from its command line to its exit code. What can be refused is refused before torch is imported."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from gptscale.config.compose import Composed, compose
from gptscale.config.parallel_rules import topology_of
from gptscale.config.schema import TrainRoot
from gptscale.runtime.errors import (
    EXIT_DIVERGED,
    EXIT_DONE,
    EXIT_STOPPED,
    DivergedError,
    PeerFailedError,
    StoppedError,
    UserError,
)
from gptscale.runtime.hardware import usable_cores
from gptscale.runtime.logs import exit_code_of, open_logs, report_failure
from gptscale.runtime.malloc import keep_freed_memory
from gptscale.runtime.process import ProcessInfo, export_process, find_process, strip_local_rank
from gptscale.runtime.signals import StopRequest
from gptscale.runtime.watch import die_with_launcher
from gptscale.train.check import check_run

if TYPE_CHECKING:
    from gptscale.data.prepare import ProgressEvent
    from gptscale.parallel.ranks import Ranks

LOG = logging.getLogger("gptscale.train")


def main(arguments: Sequence[str]) -> int:
    try:
        process = find_process(os.environ)
    except UserError as error:
        report_failure(error, rank=0)
        return exit_code_of(error, "none")
    die_with_launcher()
    with StopRequest() as stop:
        try:
            try:
                composed = prepare(strip_local_rank(list(arguments)), process, stop)
                ranks = connect(composed.settings, process)
            except (UserError, StoppedError) as error:
                return end_alike(error, process)
            return run(composed, ranks, stop)
        except Exception as error:
            leave(error, process)


def prepare(arguments: Sequence[str], process: ProcessInfo, stop: StopRequest) -> Composed[TrainRoot]:
    """Compose and check the settings, make sure the text is prepared, set up the process. No torch."""
    composed = compose("train", TrainRoot, arguments)
    settings = composed.settings
    check_run(settings, process.world_size)
    open_logs(None, process.rank)
    if settings.launch.ranks not in (1, process.world_size) and process.rank == 0:
        by = "" if process.launcher == "none" else f" by {process.launcher}"
        LOG.warning(f"launch.ranks={settings.launch.ranks} is ignored: the run has {process.world_size}, started{by}")
    if settings.data.path is None:
        prepare_text(settings, stop)
    export_process(process, os.environ)
    threads = settings.launch.threads or max(1, usable_cores() // process.local_world_size)
    # Read when the OpenMP library loads, so before torch: ranks that spin at barriers starve each other.
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    keep_freed_memory()
    return composed


def prepare_text(settings: TrainRoot, stop: StopRequest) -> None:
    """For ranks that `gptscale train` did not start: the first of them prepares the text while the others wait."""
    from gptscale.data.prepare import ensure_prepared

    waiting = False

    def watch(event: ProgressEvent) -> None:
        nonlocal waiting
        if event.stage == "wait" and not waiting:
            waiting = True
            LOG.info("waiting for another process that prepares the same text")
        if stop.requested:
            raise StoppedError("stopped while the text was prepared: start it again")

    ensure_prepared(settings.data, settings.tokenizer, watch)


def connect(settings: TrainRoot, process: ProcessInfo) -> Ranks:
    """Take this rank's device and meet the others. Imports torch."""
    from gptscale.parallel.ranks import Ranks

    deepspeed, timeout_s = settings.parallel.engine == "deepspeed", settings.parallel.timeout_s
    return Ranks(process, deepspeed, timeout_s, topology_of(settings.parallel, process.world_size))


def run(composed: Composed[TrainRoot], ranks: Ranks, stop: StopRequest) -> int:
    """Train. Raises what `main` turns into an exit code."""
    from gptscale.train.loop import train

    try:
        train(composed, ranks, stop)
    except (StoppedError, DivergedError) as error:
        if ranks.rank == 0:
            LOG.warning("%s", error)
        code = EXIT_STOPPED if isinstance(error, StoppedError) else EXIT_DIVERGED
    else:
        code = EXIT_DONE
    ranks.close()
    return code


def end_alike(error: UserError | StoppedError, process: ProcessInfo) -> int:
    """For what every rank meets by itself, before it is joined to the others: one a host says it."""
    if process.local_rank == 0:
        report_failure(error, process.rank)
    elif isinstance(error, UserError):
        error = PeerFailedError()
    return exit_code_of(error, process.launcher)


def leave(error: Exception, process: ProcessInfo) -> NoReturn:
    """Say why, and leave at once: where this rank failed alone, the interpreter's end would wait for its peers."""
    if not isinstance(error, PeerFailedError):
        report_failure(error, process.rank)
    sys.stdout.flush()
    os._exit(exit_code_of(error, process.launcher))
