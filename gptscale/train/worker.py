"""A rank, from its command line to its exit code. What can be refused is refused before torch is imported."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from gptscale.checkpoint.agreement import PeerFailedError
from gptscale.config.compose import Composed, compose
from gptscale.config.schema import TrainRoot
from gptscale.runtime.errors import (
    EXIT_DIVERGED,
    EXIT_DONE,
    EXIT_LOST_PEER,
    EXIT_STOPPED,
    EXIT_USER,
    DivergedError,
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

LOG = logging.getLogger("gptscale.train")


def main(arguments: Sequence[str]) -> int:
    try:
        process = find_process(os.environ)
    except UserError as error:
        return report(error)
    die_with_launcher()
    with StopRequest() as stop:
        try:
            composed = prepare(strip_local_rank(list(arguments)), process)
        except UserError as error:
            # Every rank finds the same mistake; one a host says it.
            return report(error) if process.local_rank == 0 else silent_code(process)
        try:
            return run(composed, process, stop)
        except PeerFailedError:
            return silent_code(process)
        except UserError as error:
            return report(error)
        except Exception as error:
            leave(error, process)


def prepare(arguments: Sequence[str], process: ProcessInfo) -> Composed[TrainRoot]:
    """Compose and check the settings, make sure the text is prepared, set up the process. No torch."""
    composed = compose("train", TrainRoot, arguments)
    settings = composed.settings
    check_run(settings, process.world_size)
    open_logs(None, process.rank)
    if settings.launch.ranks not in (1, process.world_size) and process.rank == 0:
        by = "" if process.launcher == "none" else f" by {process.launcher}"
        LOG.warning(f"launch.ranks={settings.launch.ranks} is ignored: the run has {process.world_size}, started{by}")
    if settings.data.path is None:
        from gptscale.data.prepare import ensure_prepared

        ensure_prepared(settings.data, settings.tokenizer, None)
    export_process(process, os.environ)
    threads = settings.launch.threads or max(1, usable_cores() // process.local_world_size)
    # Read when the OpenMP library loads, so before torch: ranks that spin at barriers starve each other.
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    keep_freed_memory()
    return composed


def run(composed: Composed[TrainRoot], process: ProcessInfo, stop: StopRequest) -> int:
    """Train. Raises what `main` turns into an exit code."""
    from gptscale.parallel.ranks import Ranks
    from gptscale.train.loop import train

    settings = composed.settings
    ranks = Ranks(process, deepspeed=settings.parallel.engine == "deepspeed", timeout_s=settings.parallel.timeout_s)
    try:
        train(composed, ranks, stop)
    except (StoppedError, DivergedError) as error:
        if process.rank == 0:
            LOG.warning("%s", error)
        code = EXIT_STOPPED if isinstance(error, StoppedError) else EXIT_DIVERGED
    else:
        code = EXIT_DONE
    ranks.close()
    return code


def report(error: UserError) -> int:
    """Say what the user has to mend."""
    if os.environ.get("GPTSCALE_DEBUG") == "1":
        traceback.print_exception(error)
    print(error, file=sys.stderr, flush=True)
    return EXIT_USER


def silent_code(process: ProcessInfo) -> int:
    """For a rank that leaves with another, which says why: our own launcher has to know whom to quote."""
    return EXIT_LOST_PEER if process.launcher == "gptscale" else EXIT_USER


def leave(error: Exception, process: ProcessInfo) -> NoReturn:
    """A bug, or a lost peer: say so and leave at once, without waiting in anybody's teardown."""
    report_failure(error, process.rank)
    sys.stdout.flush()
    os._exit(exit_code_of(error, process.launcher))
