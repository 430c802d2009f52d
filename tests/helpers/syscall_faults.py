"""Saves in other processes that a chosen system call kills or fails: `FaultyRanks` starts them, `save` asks for one.

One server process with the preloaded library imports torch once and then forks ranks, which takes milliseconds.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import multiprocessing
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_suffix(".c")
COUNT, KILL, KILL_HALFWAY, FAIL, FAIL_FROM = range(5)
SHAPES = {"blocks.0.out.weight": (6, 8), "norm.weight": (6,)}


@dataclass(frozen=True)
class Order:
    """One save: which state (`attempt` seeds it) under which step, and what befalls the `victim` at its call `at`."""

    folder: str
    step: int
    attempt: int
    ranks: int = 1
    keep: int = 2
    victim: int = 0
    at: int = -1
    mode: int = COUNT
    error: int = 0


@dataclass(frozen=True)
class Outcome:
    """What one rank came to: `ended` is "saved", the class of the error it raised, or "killed"."""

    ended: str
    message: str
    reports: list[str]
    calls: list[str]
    """Each call that changes files under the folder, as `name path`."""


def turning_points(calls: list[str]) -> list[int]:
    """Numbers of the calls to strike at: all but those within a run of the same call, ten writes to one file, say."""
    return [
        at for at in range(len(calls)) if not (0 < at < len(calls) - 1 and calls[at - 1] == calls[at] == calls[at + 1])
    ]


class FaultyRanks:
    """The server process; a context manager, so that no process outlives the test."""

    def __init__(self, scratch: Path) -> None:
        library = scratch / "syscall_faults.so"
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, SOURCE, "-ldl"], check=True)
        self._scratch = scratch
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.syscall_faults", library, scratch],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=SOURCE.parents[2],
            env={**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"},
        )

    def __enter__(self) -> FaultyRanks:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(timeout=30)

    def save(self, order: Order) -> list[Outcome]:
        """Carry out one save and give what each rank came to."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(asdict(order)) + "\n")
        self._server.stdin.flush()
        return [Outcome(**outcome) for outcome in json.loads(self._server.stdout.readline())]


class PipeCommunicator:
    """Ranks that are processes; rank 0 asks all others. A rank that has died is an EOFError or BrokenPipeError."""

    def __init__(self, rank: int, size: int, peers: list[Connection]) -> None:
        self.rank = rank
        self.size = size
        self._peers = peers

    def agree(self, ok: bool) -> bool:
        if self.rank:
            self._peers[0].send_bytes(bytes([ok]))
            return bool(self._peers[0].recv_bytes()[0])
        everybody = all([ok, *(bool(peer.recv_bytes()[0]) for peer in self._peers)])
        for peer in self._peers:
            peer.send_bytes(bytes([everybody]))
        return everybody


def serve(library: str, scratch: Path) -> None:
    # Imported by the server, before it forks, so that the ranks find everything in memory.
    import torch

    for module in ("gptscale.checkpoint.write", "tests.helpers.checkpoints"):
        importlib.import_module(module)
    torch.set_num_threads(1)
    faults = ctypes.CDLL(library)
    for line in sys.stdin:
        print(json.dumps(_carry_out(Order(**json.loads(line)), faults, scratch)), flush=True)


def _carry_out(order: Order, faults: ctypes.CDLL, scratch: Path) -> list[dict[str, Any]]:
    links = [multiprocessing.Pipe() for _ in range(order.ranks - 1)]
    logs = [scratch / f"calls-{rank}" for rank in range(order.ranks)]
    results = [scratch / f"result-{rank}.json" for rank in range(order.ranks)]
    children = []
    for rank in range(order.ranks):
        results[rank].unlink(missing_ok=True)
        child = os.fork()
        if child == 0:
            # Each rank keeps its own ends only: a link that a sibling holds open would hide a death.
            mine = [link[0] for link in links] if rank == 0 else [links[rank - 1][1]]
            for end in {end for link in links for end in link} - set(mine):
                end.close()
            at = order.at if rank == order.victim else -1
            mode = order.mode if rank == order.victim else COUNT
            faults.arm(order.folder.encode(), at, mode, order.error, str(logs[rank]).encode())
            results[rank].write_text(json.dumps(_save(order, PipeCommunicator(rank, order.ranks, mine))))
            os._exit(0)
        children.append(child)
    for link in links:
        for end in link:
            end.close()
    outcomes = []
    for child, result, log in zip(children, results, logs, strict=True):
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            outcome: dict[str, Any] = {"ended": "killed", "message": "", "reports": []}
        else:
            outcome = json.loads(result.read_text())
        outcomes.append({**outcome, "calls": log.read_text().splitlines()})
    return outcomes


def _save(order: Order, comm: PipeCommunicator) -> dict[str, Any]:
    from gptscale.checkpoint.write import save_checkpoint
    from tests.helpers.checkpoints import cut, random_state

    pieces, _ = cut(random_state(SHAPES, order.attempt), order.ranks, order.attempt)
    reports: list[str] = []
    ended, message = "saved", ""
    try:
        save_checkpoint(
            Path(order.folder),
            order.step,
            pieces[comm.rank],
            state={"attempt": order.attempt},
            layout={"ranks": order.ranks},
            comm=comm,
            keep=order.keep,
            report=reports.append,
        )
    except Exception as error:
        ended, message = type(error).__name__, str(error)
    return {"ended": ended, "message": message, "reports": reports}


if __name__ == "__main__":
    serve(sys.argv[1], Path(sys.argv[2]))
