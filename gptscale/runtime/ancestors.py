"""The processes above this one, and which of them are launchers. Linux: all of it is read from /proc."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_LAUNCHER_MODULES = {
    "deepspeed.launcher.launch",
    "deepspeed.launcher.runner",
    "torch.distributed.run",
    "torch.distributed.launch",
}
_LAUNCHER_SCRIPTS = {"deepspeed": "deepspeed.launcher.runner", "torchrun": "torch.distributed.run"}
_OPTIONS_WITH_A_VALUE = {"-X", "-W", "--check-hash-based-pycs"}
_REAPERS = {
    "systemd",
    "init",
    "tini",
    "dumb-init",
    "docker-init",
    "catatonit",
    "conmon",
    "s6-svscan",
    "supervisord",
    "containerd-shim",
}


@dataclass(frozen=True)
class Ancestor:
    """A process above this one. `started_ticks` since boot tells it from a later process of the same pid."""

    pid: int
    started_ticks: int
    argv: tuple[str, ...]

    def __str__(self) -> str:
        return f"{launcher_name(self.argv) or 'the parent'} (process {self.pid})"


def read_ancestors() -> list[Ancestor]:
    """From the parent up to the first process; what another user's hidden /proc entry hides ends the list."""
    found: list[Ancestor] = []
    pid = os.getppid()
    while pid > 0:
        stat = _read_stat(pid)
        if stat is None:
            break
        found.append(Ancestor(pid=pid, started_ticks=stat.started_ticks, argv=_read_argv(pid)))
        pid = stat.parent
    return found


def still_alive(ancestor: Ancestor) -> bool:
    """It runs; a zombie, or another process under its pid, does not count."""
    stat = _read_stat(ancestor.pid)
    return stat is not None and stat.state not in "ZX" and stat.started_ticks == ancestor.started_ticks


def launcher_name(argv: Sequence[str]) -> str | None:
    """The launcher's module ("torch.distributed.run", "slurmstepd", …), or None for any other command line."""
    if argv and argv[0].startswith("slurmstepd:"):
        return "slurmstepd"
    program = _python_program(argv)
    if program in _LAUNCHER_MODULES:
        return program
    if program.endswith(".py"):
        as_module = program.removesuffix(".py").replace("/", ".")
        return next((module for module in _LAUNCHER_MODULES if as_module.endswith(module)), None)
    return _LAUNCHER_SCRIPTS.get(os.path.basename(program))


def reaps_orphans(ancestor: Ancestor) -> bool:
    """An init: the parent that the kernel gives to a process whose own has died. Python as pid 1 does not count."""
    name = os.path.basename(ancestor.argv[0]) if ancestor.argv else ""
    return (ancestor.pid == 1 and not name.startswith("python")) or name in _REAPERS


def _python_program(argv: Sequence[str]) -> str:
    """What a Python command line runs: the module after -m, or the script; "" for none."""
    if not argv or not os.path.basename(argv[0]).startswith("python"):
        return ""
    rest = iter(argv[1:])
    for argument in rest:
        if argument == "-m":
            return next(rest, "")
        if argument == "-c":
            return ""
        if argument in _OPTIONS_WITH_A_VALUE:
            next(rest, "")
        elif not argument.startswith("-"):
            return argument
    return ""


@dataclass(frozen=True)
class _Stat:
    state: str
    parent: int
    started_ticks: int


def _read_stat(pid: int) -> _Stat | None:
    """proc(5), /proc/PID/stat: fields 3 (state), 4 (parent) and 22 (start). The name, field 2, may hold anything."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text[text.rindex(")") + 2 :].split()
    return _Stat(state=fields[0], parent=int(fields[1]), started_ticks=int(fields[19]))


def _read_argv(pid: int) -> tuple[str, ...]:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError):
        return ()
    return tuple(os.fsdecode(word) for word in words[:-1])
