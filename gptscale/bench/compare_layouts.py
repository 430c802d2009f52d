"""`gptscale bench layouts`, from its contenders to a report."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from gptscale.bench.contender import MATMUL, Contender
from gptscale.bench.group import BenchError
from gptscale.bench.layouts import expected, is_one_pipeline
from gptscale.bench.report import Report
from gptscale.bench.step import bench_step
from gptscale.bench.turns import Watched
from gptscale.config.schema import BenchLayoutsConfig
from gptscale.plan.bubble import bubble, uneven_bubble
from gptscale.plan.collectives import Payload, on_the_wire
from gptscale.runtime.hardware import describe_host


@dataclass(frozen=True)
class Sent:
    """What the rank that sends most hands over in a step, and puts on the wire if rings do it: bytes."""

    payload: Payload
    expected_payload: Payload

    @property
    def wire_bytes(self) -> float:
        return on_the_wire(self.payload)


@dataclass(frozen=True)
class Bubble:
    """Of a pipeline's schedule, shares of its time."""

    name: str
    stages: int
    micro_batches: int
    stage_s: tuple[float, ...]
    """What each stage computed of a micro-batch: medians."""
    measured: float
    """Median over steps of what stages did not compute."""

    @property
    def expected(self) -> float:
        return bubble(self.stages, self.micro_batches)

    @property
    def expected_of_these_stages(self) -> float:
        """With each stage as long as it was."""
        return uneven_bubble(self.stage_s, self.micro_batches)


@dataclass(frozen=True)
class LayoutsReport:
    steps: Report
    sent: Mapping[str, Sent]
    bubbles: Sequence[Bubble]
    not_watched: str | None
    """Why no bubble was measured of pipelines that took part."""


def bench_layouts(
    bench: BenchLayoutsConfig,
    contenders: Sequence[Contender],
    command: str,
    port: Callable[[], int],
    say: Callable[[str], None],
    left_out: Mapping[str, str],
) -> LayoutsReport:
    """As `bench_step`, some contenders at a time; and what they send, which has to be what the formulas say."""
    pipelines = [contender.name for contender in contenders if is_one_pipeline(contender)]
    cores = describe_host().cores
    too_few = bench.ranks * bench.threads > cores
    watched = {} if too_few else dict.fromkeys(pipelines, bench.micro_batches)
    steps = bench_step(
        bench, contenders, command, port, say, left_out, bench.together, check_sent=check_sent, watched=watched
    )
    return LayoutsReport(
        steps=steps,
        sent={c.name: _sent(c, steps.measured[c.name].sent) for c in contenders if c.name != MATMUL},
        bubbles=[
            _bubble(name, micro_batches, found)
            for name in watched
            for micro_batches, found in steps.measured[name].watched.items()
        ],
        not_watched=f"{bench.ranks * bench.threads} threads share {cores} cores" if too_few and pipelines else None,
    )


def check_sent(contender: Contender, counted: Sequence[Payload]) -> None:
    """Raises BenchError where a rank hands over something else than the formulas say."""
    for rank, (found, formula) in enumerate(zip(counted, expected(contender), strict=True)):
        for operation, ranks in sorted({*found, *formula}):
            sent_bytes, expected_bytes = (of.get((operation, ranks), 0) for of in (found, formula))
            if sent_bytes != expected_bytes:
                raise BenchError(
                    f"{contender.name}: rank {rank} hands {sent_bytes} bytes a step to {operation} of {ranks} ranks, "
                    f"and by formula {expected_bytes}\nno figures are reported: gptscale.plan does not describe it"
                )


def _sent(contender: Contender, counted: Sequence[Payload]) -> Sent:
    rank = max(range(contender.ranks), key=lambda rank: on_the_wire(counted[rank]))
    return Sent(counted[rank], expected(contender)[rank])


def _bubble(name: str, micro_batches: int, rounds: Sequence[Sequence[Watched]]) -> Bubble:
    """From the first forward of any stage to the last backward of any; a stage computes within its passes."""
    shares: list[float] = []
    busy_s: list[list[float]] = []
    for by_rank in rounds:
        for passes_s in zip(*(watched.passes_s for watched in by_rank), strict=True):
            start_s = min(passes[0][0] for passes in passes_s)
            end_s = max(passes[-1][1] for passes in passes_s)
            busy = [sum(end - start for start, end in passes) for passes in passes_s]
            shares.append(1 - sum(busy) / (len(busy) * (end_s - start_s)))
            busy_s.append(busy)
    stage_s = tuple(statistics.median(of_stage) / micro_batches for of_stage in zip(*busy_s, strict=True))
    return Bubble(name, len(stage_s), micro_batches, stage_s, statistics.median(shares))
