"""Rounds of turns: all contenders alive, one computing at a time, in an order that changes."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from gptscale.bench.contender import (
    COMPARED_STEPS,
    EQUAL_LOSS,
    MULTIPLY_ONLY,
    Contender,
    kernel_timer,
    with_kernels,
)
from gptscale.bench.group import BenchError, Group, fork_context
from gptscale.bench.turns import Ready, Turn, Watched
from gptscale.config.schema import BenchConfig
from gptscale.plan.collectives import Payload

CheckSent = Callable[[Contender, Sequence[Payload]], None]
"""Told, by rank, what a contender's step hands over; raises BenchError where that cannot be."""


@dataclass
class Samples:
    """What one contender gave. Rounds in order; the warm-up apart."""

    ready: Ready
    rounds: list[Turn] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    """Of all steps, the warm-up's too."""
    same_work: bool = True
    """Whether it takes the reference's steps."""
    compared_steps: int = COMPARED_STEPS
    """Steps over which its losses must be the reference's."""
    sent: Sequence[Payload] = ()
    """By rank, where it was counted: what a step hands to other ranks."""
    watched: dict[int, list[Sequence[Watched]]] = field(default_factory=dict)
    """By micro-batches of a step, where the schedule of a pipeline was watched: of each round, by rank."""

    @property
    def peak_bytes(self) -> int:
        return self.rounds[-1].peak_bytes


def measure(
    contenders: Sequence[Contender],
    kernels: Mapping[str, str],
    bench: BenchConfig,
    port: Callable[[], int],
    say: Callable[[str], None],
    check_sent: CheckSent | None = None,
    watched_micro_batches: Mapping[str, Sequence[int]] = MappingProxyType({}),
) -> dict[str, Samples]:
    """Samples by name, the first contender being the reference. `port` gives each a port where its ranks meet.
    `kernels`: what attends in each kind of layer of ours, unless a contender's settings name one. With `check_sent`
    what each rank hands to others is counted in a step after the warm-up, and told to it. `watched_micro_batches` are
    those of the steps in which pipelines, by name, are watched after the rounds.

    Raises BenchError where a contender fails, or computes something else than the reference: its losses, after the
    same number of steps, must be the same.
    """
    context = fork_context()
    with ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gptscale-bench-")))
        groups: dict[str, Group] = {}
        contenders = [with_kernels(contender, kernels) for contender in contenders]
        say(f"starting {', '.join(contender.name for contender in contenders)}")
        for contender in contenders:
            groups[contender.name] = Group(contender, port(), logs, context)
            stack.callback(groups[contender.name].close)
        measured = {
            contender.name: Samples(
                groups[contender.name].ready(),
                same_work=contender.same_work,
                compared_steps=contender.compared_steps,
            )
            for contender in contenders
        }
        tolerance = EQUAL_LOSS[contenders[0].settings.precision.compute]
        for name in groups:
            say(f"warming up {name}")
            measured[name].losses += groups[name].turn(bench.warmup_steps).losses
        check_equal_losses(measured, tolerance)
        if check_sent is not None:
            say("counting bytes")
            for contender in contenders:
                if contender.name not in MULTIPLY_ONLY:
                    counted = groups[contender.name].count()
                    measured[contender.name].losses.append(counted[0].loss)
                    measured[contender.name].sent = [of_rank.payload for of_rank in counted]
                    check_sent(contender, measured[contender.name].sent)
        for number in range(bench.rounds):
            say(f"round {number + 1} of {bench.rounds}")
            for name in turn_order(list(groups), number):
                turn = groups[name].turn(bench.steps_per_turn)
                measured[name].rounds.append(turn)
                measured[name].losses += turn.losses
        check_equal_losses(measured, tolerance)
        for name, several in watched_micro_batches.items():
            say(f"watching {name}")
            measured[name].watched = {micro_batches: [] for micro_batches in several}
            for _ in range(bench.rounds):
                for micro_batches, found in measured[name].watched.items():
                    found.append(groups[name].watch(bench.steps_per_turn, micro_batches))
        return measured


def time_kernels(contender: Contender, say: Callable[[str], None]) -> Ready:
    """The attention kernels that a run of these settings would take, found while nothing else computes."""
    say("timing attention kernels")
    with tempfile.TemporaryDirectory(prefix="gptscale-bench-") as logs:
        group = Group(kernel_timer(contender), 0, Path(logs), fork_context())
        try:
            return group.ready()
        finally:
            group.close()


def turn_order(names: Sequence[str], number: int) -> list[str]:
    """Who computes after whom in a round: every round begins with another, and every second one runs backwards."""
    start = number % len(names)
    order = [*names[start:], *names[:start]]
    return order if number % 2 == 0 else order[::-1]


def check_equal_losses(measured: Mapping[str, Samples], tolerance: float) -> float:
    """The largest difference from the reference's loss at the first `COMPARED_STEPS` steps.

    Raises BenchError where it is above `tolerance`, or a loss of any step is not finite.
    """
    reference, *others = (name for name in measured if name not in MULTIPLY_ONLY)
    worst = 0.0
    for name in others:
        pairs = zip(measured[reference].losses, measured[name].losses, strict=True)
        for step, (expected, loss) in enumerate(pairs, start=1):
            apart = abs(loss - expected) if step <= measured[name].compared_steps else 0.0
            if not (math.isfinite(loss) and math.isfinite(expected)) or apart > tolerance:
                raise BenchError(
                    f"{name} does not compute what {reference} does: after {step} steps its loss is {loss:.6f}, not "
                    f"{expected:.6f} (they may differ by {tolerance:g})\nno speed is reported for different work"
                )
            worst = max(worst, apart)
    return worst
