"""Workers that end within two seconds of their launcher's death, however it died.

A launcher that is killed outright cannot end its ranks, and some leave them even when asked to stop: SIGTERM to
`deepspeed` ends its runner only, while `deepspeed.launcher.launch` and all ranks go on (DeepSpeed #4098). So each
worker watches every launcher above it: a thread waits on their pidfds and, for a worker that is stuck with Python's
global lock held, the kernel kills it when its direct parent dies (prctl PR_SET_PDEATHSIG).
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import NoReturn

from gptscale.runtime.ancestors import Ancestor, launcher_name, read_ancestors, reaps_orphans, still_alive
from gptscale.runtime.process import Launcher, find_process

LAUNCHER_PID_VARIABLE = "GPTSCALE_LAUNCHER_PID"
"""Set by our own launcher for its ranks, so that one which starts after the launcher's death can tell."""

_PR_SET_PDEATHSIG = 1
_POLL_S = 0.5


def die_with_launcher(environ: Mapping[str, str] = os.environ) -> list[int]:
    """From now on this worker ends when a launcher above it does; returns the pids watched, none for launcher "none".

    To be called first thing, before imports that take seconds. Where a launcher is gone already the worker ends here.
    SIGKILL is how it ends, its own children included: there is nobody left to whom an exit code would matter. A worker
    that the kernel kills (see above) cannot end its children: those watch their parent by themselves.
    """
    launcher = find_process(environ).launcher
    if launcher == "none":
        return []
    launchers = choose_launchers(read_ancestors(), launcher, environ)
    if launchers is None:
        _die(f"the launcher ({launcher}) died before this rank began")
    return _watch(launchers)


def choose_launchers(
    ancestors: Sequence[Ancestor], launcher: Launcher, environ: Mapping[str, str]
) -> list[Ancestor] | None:
    """Which ancestors (nearest first) to watch; None where a launcher that must be there is not, so it has died."""
    if launcher == "gptscale" and LAUNCHER_PID_VARIABLE in environ:
        pid = int(environ[LAUNCHER_PID_VARIABLE])
        return [ancestor for ancestor in ancestors if ancestor.pid == pid] or None
    known = [index for index, ancestor in enumerate(ancestors) if launcher_name(ancestor.argv)]
    if known:
        top = known[-1]
        orphaned = top + 1 < len(ancestors) and reaps_orphans(ancestors[top + 1])
        if orphaned and launcher_name(ancestors[top].argv) == "deepspeed.launcher.launch":
            return None  # its runner is gone: the runner itself may be init's child (nohup), launch.py never is
        return [ancestors[index] for index in known]
    if not ancestors or (launcher == "slurm" and ancestors[0].pid == 1):
        return []  # a container's first process, or one whose parent is outside of it: they end together
    # A launcher that we cannot name: one used as a library, or under another title. But init launches no ranks.
    return None if reaps_orphans(ancestors[0]) else [ancestors[0]]


def _watch(launchers: Sequence[Ancestor]) -> list[int]:
    handles = []
    for launcher in launchers:
        try:
            handles.append((launcher, _open(launcher.pid)))
        except ProcessLookupError:
            _die(f"{launcher} died before this rank watched it")
    # In this order: who is alive after its handle was opened is who the handle is for, not a reuser of its pid.
    for launcher in launchers:
        if not still_alive(launcher):
            _die(f"{launcher} died before this rank watched it")
    if launchers and launchers[0].pid == os.getppid():
        _let_the_kernel_kill_us_with(launchers[0])
    if handles:
        threading.Thread(target=_wait_and_die, args=(handles,), name="launcher-watch", daemon=True).start()
    return [launcher.pid for launcher in launchers]


def _open(pid: int) -> int | None:
    """A pidfd; None where the kernel has none (before Linux 5.3, as on older clusters) and polling must do."""
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.EPERM):
            return None
        raise


def _let_the_kernel_kill_us_with(parent: Ancestor) -> None:
    """Only if the parent's main thread started us: the kernel acts at the death of the *thread* that did."""
    try:
        with open(f"/proc/{parent.pid}/task/{parent.pid}/children") as file:
            by_main_thread = str(os.getpid()) in file.read().split()
    except OSError:
        return  # another user's process, or a kernel without this file: the thread alone watches
    if by_main_thread:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if not still_alive(parent):
            _die(f"{parent} died before this rank watched it")


def _wait_and_die(handles: Sequence[tuple[Ancestor, int | None]]) -> None:
    _die(f"{wait_for_a_death(handles)} died")


def wait_for_a_death(handles: Sequence[tuple[Ancestor, int | None]]) -> Ancestor:
    """Wait until one of them dies. Without pidfds it looks twice a second."""
    waiting = select.poll()
    for _, handle in handles:
        if handle is not None:
            waiting.register(handle, select.POLLIN)
    all_have_one = all(handle is not None for _, handle in handles)
    while True:
        dead = {handle for handle, _ in waiting.poll(None if all_have_one else _POLL_S * 1000)}
        for launcher, handle in handles:
            if handle in dead or (handle is None and not still_alive(launcher)):
                return launcher


def _die(why: str) -> NoReturn:
    line = f"rank {os.environ.get('RANK', os.environ.get('SLURM_PROCID', '?'))}: {why}; ending\n"
    # Only into what takes a line without blocking: nobody may read it any more, or stderr may be closed.
    with suppress(OSError, ValueError):
        if select.select([], [2], [], 0)[1]:
            os.write(2, line.encode())
    for child in _descendants(os.getpid()):
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
    os._exit(1)  # not reached: a process that kills itself does not return from it


def _descendants(pid: int) -> Iterator[int]:
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except FileNotFoundError:
        return
    for thread in threads:
        try:
            with open(f"/proc/{pid}/task/{thread}/children") as file:
                children = [int(child) for child in file.read().split()]
        except FileNotFoundError:
            continue
        for child in children:
            yield from _descendants(child)
            yield child
