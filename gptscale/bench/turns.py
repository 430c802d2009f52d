"""What a contender's process and the parent tell each other. No torch here.

parent → process    Take, Count or Watch: what to do now
process → parent    Ready once, then a Turn, Counted or Watched for every request; Failed, and the end, where something
                    goes wrong
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

from gptscale.bench.contender import Contender
from gptscale.plan.collectives import Payload
from gptscale.runtime.errors import UserError
from gptscale.runtime.malloc import keep_freed_memory
from gptscale.runtime.process import ALONE, LAUNCHER_VARIABLE
from gptscale.runtime.watch import LAUNCHER_PID_VARIABLE, die_with_launcher


@dataclass(frozen=True)
class Ready:
    built: str
    """What computes: the class of the engine or loop."""
    device: str
    keeps_freed_memory: bool
    kernels: Mapping[str, str] = field(default_factory=dict)
    """What attends in each kind of layer, where this process was asked to find out."""
    flops: int = 0
    """Useful operations of a step, where they are not those of the model."""


@dataclass(frozen=True)
class Turn:
    """One entry a step."""

    losses: tuple[float, ...]
    wall_s: tuple[float, ...]
    cpu_s: tuple[float, ...]
    """CPU time of the whole process, all its threads."""
    peak_bytes: int
    """Most memory so far: of the process on a CPU, of the device's allocator on a GPU."""


@dataclass(frozen=True)
class Take:
    """Take so many optimizer steps."""

    steps: int


@dataclass(frozen=True)
class Count:
    """Take one, and count what it hands to other ranks."""


@dataclass(frozen=True)
class Counted:
    loss: float
    payload: Payload


@dataclass(frozen=True)
class Watch:
    """Take so many of fewer micro-batches, and note when this stage of a pipeline computes."""

    steps: int
    micro_batches: int


@dataclass(frozen=True)
class Watched:
    passes_s: tuple[tuple[tuple[float, float], ...], ...]
    """Of each step, when forward and backward passes began and ended, by a clock that all ranks have in common."""


Request = Take | Count | Watch


@dataclass(frozen=True)
class Failed:
    text: str
    is_user_error: bool


def serve(connection: Connection, contender: Contender, rank: int, port: int, owner_pid: int, log: str) -> None:
    """The life of one process. `port` is where its ranks meet, 0 for a world of one; `log` takes its output."""
    os.environ |= {
        LAUNCHER_VARIABLE: "gptscale",
        LAUNCHER_PID_VARIABLE: str(owner_pid),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(contender.ranks),
        "LOCAL_WORLD_SIZE": str(contender.ranks),
        "MASTER_ADDR": ALONE.master_address,
        "MASTER_PORT": str(port),
    }
    die_with_launcher()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole terminal; the parent ends us
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    try:
        _take_turns(connection, contender)
    except Exception as error:
        traceback.print_exc()
        failed = Failed(str(error), True) if isinstance(error, UserError) else Failed(traceback.format_exc(), False)
        connection.send(failed)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # without waiting for whatever libraries do at exit, a peer's answer included


def _take_turns(connection: Connection, contender: Contender) -> None:
    keeps_freed_memory = keep_freed_memory()
    from gptscale.bench.workload import build_workload

    if contender.kind == "kernels":
        from gptscale.bench.kernel_choice import choose

        connection.send(choose(contender, keeps_freed_memory))
        return
    workload = build_workload(contender)
    connection.send(Ready(workload.built, str(workload.device), keeps_freed_memory, flops=workload.flops))
    while True:
        request: Request = connection.recv()
        match request:
            case Take(steps):
                samples = [workload.timed_step() for _ in range(steps)]
                losses, wall_s, cpu_s = zip(*samples, strict=True)
                connection.send(Turn(losses, wall_s, cpu_s, workload.peak_bytes() or process_peak_bytes()))
            case Count():
                connection.send(Counted(*workload.counted_step()))
            case Watch(steps, micro_batches):
                passes_s = tuple(workload.watched_step(micro_batches) for _ in range(steps))
                connection.send(Watched(passes_s))


def process_peak_bytes() -> int:
    """Most memory this process has held resident at one time."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
