"""The processes of one contender, as the parent sees them."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TypeVar

from gptscale.bench.contender import Contender
from gptscale.bench.turns import Count, Counted, Failed, Ready, Request, Take, Turn, Watch, Watched, serve
from gptscale.runtime.errors import UserError

_LOG_TAIL = 15
"""Lines of a dead process's output that are shown."""

Message = TypeVar("Message", Ready, Turn, Counted, Watched)


class BenchError(RuntimeError):
    """The measurement cannot be trusted, or a contender failed: no figures are given."""


def fork_context() -> ForkServerContext:
    """Processes forked from one that has torch, so that seven of them start in seconds, but not DeepSpeed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gptscale.bench.preload"])
    return context


class Group:
    """One process a rank. They wait, using no CPU, until they are given a turn."""

    def __init__(self, contender: Contender, port: int, logs: Path, context: ForkServerContext) -> None:
        self.contender = contender
        self._processes: list[BaseProcess] = []
        self._connections: list[Connection] = []
        self._logs = [logs / f"{contender.name}-{rank}.log" for rank in range(contender.ranks)]
        for rank, log in enumerate(self._logs):
            ours, theirs = context.Pipe()
            arguments = (theirs, contender, rank, port, os.getpid(), str(log))
            process = context.Process(target=serve, args=arguments, name=f"{contender.name}-{rank}")
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)

    def ready(self) -> Ready:
        """Wait until all ranks are built."""
        return self._answers(Ready)[0]

    def turn(self, steps: int) -> Turn:
        """Have all ranks take `steps` steps: elapsed time of the slowest, CPU-seconds of all together."""
        self._ask(Take(steps))
        turns = self._answers(Turn)
        if any(turn.losses != turns[0].losses for turn in turns):
            raise BenchError(f"the ranks of {self.contender.name} report different losses of the same global batch")
        return Turn(
            losses=turns[0].losses,
            wall_s=_combined(max, [turn.wall_s for turn in turns]),
            cpu_s=_combined(sum, [turn.cpu_s for turn in turns]),
            peak_bytes=max(turn.peak_bytes for turn in turns),
        )

    def count(self) -> list[Counted]:
        """Have all ranks take a step, and count what each hands over: by rank."""
        self._ask(Count())
        return self._answers(Counted)

    def watch(self, steps: int, micro_batches: int) -> list[Watched]:
        """Have all ranks, stages of a pipeline, take steps of `micro_batches`, and note when each computes: by rank."""
        self._ask(Watch(steps, micro_batches))
        return self._answers(Watched)

    def close(self) -> None:
        """End the processes and wait for them, whatever they do."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for connection in self._connections:
            connection.close()

    def _ask(self, request: Request) -> None:
        for rank, connection in enumerate(self._connections):
            try:
                connection.send(request)
            except (BrokenPipeError, ConnectionResetError):
                raise BenchError(self._obituary(rank)) from None

    def _answers(self, kind: type[Message]) -> list[Message]:
        """One message of every rank. All are listened to at once: a rank whose peer has died may never answer."""
        answers: dict[int, Message] = {}
        while waiting := [c for rank, c in enumerate(self._connections) if rank not in answers]:
            for connection in wait(waiting):
                assert isinstance(connection, Connection)
                rank = self._connections.index(connection)
                try:
                    message = connection.recv()
                except (EOFError, ConnectionResetError):  # the second: it died with a message of ours unread
                    raise BenchError(self._obituary(rank)) from None
                if isinstance(message, Failed):
                    if message.is_user_error:
                        raise UserError(message.text)
                    raise BenchError(f"{self._processes[rank].name} failed\n{message.text}")
                assert isinstance(message, kind)
                answers[rank] = message
        return [answers[rank] for rank in sorted(answers)]

    def _obituary(self, rank: int) -> str:
        process = self._processes[rank]
        process.join()
        log = self._logs[rank]
        lines = log.read_text(errors="replace").splitlines()[-_LOG_TAIL:] if log.exists() else []
        return "\n".join([f"{process.name} died (exit code {process.exitcode})", *lines])


def _combined(how: Callable[[tuple[float, ...]], float], by_rank: list[tuple[float, ...]]) -> tuple[float, ...]:
    return tuple(how(of_step) for of_step in zip(*by_rank, strict=True))
