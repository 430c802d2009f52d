"""From the events of a trace to one page: where a step's time goes, and what to look at. Pure, no torch."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

STEP = "step "
DATA, TRAIN, BACKWARD = "data wait", "train step", "backward"
"""Names of the ranges that the loop and the profiler set. What is told from them:

    data wait   waiting for the next batch
    forward     of `train step`, up to the end of its last backward, what is not backward
    backward    backward passes, gradients that are reduced meanwhile included
    update      of `train step`, after its last backward: reduction, norm, clipping, optimizer
    rest        of the step: metrics, agreement between ranks
"""
PHASES = ("data wait", "forward", "backward", "update", "rest")

COMMUNICATION = ("nccl", "gloo", "c10d::", "all_reduce", "allreduce", "reduce_scatter", "all_gather", "allgather")
ROWS = 14
GAPS = 5


@dataclass(frozen=True)
class Event:
    """One event of a trace. Times are nanoseconds of one clock."""

    name: str
    start_ns: int
    end_ns: int
    lane: int
    """Thread on the host, stream on the device: events of one lane nest or follow one another."""
    on_device: bool = False
    is_range: bool = False
    """A name that somebody gave to a span of time, not an operation."""
    correlation: int = 0
    """The same for a kernel and the call that launched it."""
    allocated_bytes: int = 0


@dataclass(frozen=True)
class Operator:
    name: str
    calls: int
    self_ns: int
    """Time in it and not in what it called."""


@dataclass(frozen=True)
class Gap:
    """A stretch of time in which no operator (on a device: no kernel) runs."""

    ns: int
    step: str
    before: str
    """What ran last."""


@dataclass(frozen=True)
class Figures:
    """What the page says. `device_` fields are empty or None without a GPU."""

    step_ns: tuple[int, ...]
    phase_ns: dict[str, int]
    """Of all steps together. On a GPU the host is ahead of the device: there this is `device_phase_ns`."""
    operators: tuple[Operator, ...]
    kernels: tuple[Operator, ...]
    device_phase_ns: dict[str, int]
    """Time of kernels by the phase in which they were launched."""
    device_busy: float | None
    """Share of the steps' time in which at least one kernel runs."""
    gaps: tuple[Gap, ...]
    memory_peak_bytes: int | None = None
    """Most that was allocated beyond the start of the window, where allocations were recorded."""
    communication: float = 0.0
    """Share of operators' (on a GPU: kernels') time that is communication."""


def step_span(number: int) -> str:
    return f"{STEP}{number}"


def analyse(events: Sequence[Event]) -> Figures:
    """Read a trace with at least one whole step in it."""
    steps = sorted((e for e in events if e.is_range and not e.on_device and is_step(e.name)), key=lambda e: e.start_ns)
    assert steps, "no step was recorded"
    host = [e for e in events if not e.on_device and not e.is_range and e.name != "[memory]" and within(e, steps)]
    device = [e for e in events if e.on_device and not e.is_range and e.name != "[memory]"]
    spans = phase_spans(events, steps)
    launched_ns = {e.correlation: e.start_ns for e in events if not e.on_device and not e.is_range and e.correlation}
    device_phase_ns: dict[str, int] = {}
    if device:
        device_phase_ns = dict.fromkeys(PHASES, 0)
        for kernel in device:
            device_phase_ns[phase_at(launched_ns.get(kernel.correlation, kernel.start_ns), spans)] += length(kernel)
    operators, kernels = self_times(host), self_times(device)
    busy = device or host
    wall_ns = sum(length(e) for e in steps)
    busy_ns = sum(end - start for step in steps for start, end in clipped(busy, step))
    return Figures(
        step_ns=tuple(length(e) for e in steps),
        phase_ns=phase_times(spans, steps),
        operators=operators,
        kernels=kernels,
        device_phase_ns=device_phase_ns,
        device_busy=busy_ns / wall_ns if device else None,
        gaps=largest_gaps(busy, steps),
        memory_peak_bytes=memory_peak(events),
        communication=communication_share(kernels or operators),
    )


def is_step(name: str) -> bool:
    return name.startswith(STEP) and name[len(STEP) :].isdigit()


def within(event: Event, steps: Iterable[Event]) -> bool:
    return any(step.start_ns <= event.start_ns < step.end_ns for step in steps)


def length(event: Event) -> int:
    return event.end_ns - event.start_ns


def phase_spans(events: Sequence[Event], steps: Sequence[Event]) -> list[tuple[str, int, int]]:
    """(phase, start, end) in nanoseconds, without overlaps; what lies between them within a step is "rest"."""
    ranges = [e for e in events if e.is_range and not e.on_device and within(e, steps)]
    spans = [(DATA, e.start_ns, e.end_ns) for e in ranges if e.name == DATA]
    for train in (e for e in ranges if e.name == TRAIN):
        passes = sorted(
            (e.start_ns, e.end_ns) for e in ranges if e.name == BACKWARD and train.start_ns <= e.start_ns < train.end_ns
        )
        at = train.start_ns
        for start, end in passes:
            spans += [("forward", at, start), ("backward", start, end)]
            at = end
        spans.append(("update", at, train.end_ns))
    return sorted(spans, key=lambda item: item[1])


def phase_at(time_ns: int, spans: Sequence[tuple[str, int, int]]) -> str:
    after = bisect_right(spans, time_ns, key=lambda span: span[1])
    return spans[after - 1][0] if after and time_ns < spans[after - 1][2] else "rest"


def phase_times(spans: Sequence[tuple[str, int, int]], steps: Sequence[Event]) -> dict[str, int]:
    times = dict.fromkeys(PHASES, 0)
    for phase, start, end in spans:
        times[phase] += end - start
    times["rest"] = sum(length(step) for step in steps) - sum(times.values())
    return times


def self_times(events: Sequence[Event]) -> tuple[Operator, ...]:
    """Calls and self time by name, the largest first."""
    calls: defaultdict[str, int] = defaultdict(int)
    times: defaultdict[str, int] = defaultdict(int)
    lanes: defaultdict[tuple[bool, int], list[Event]] = defaultdict(list)
    for event in events:
        lanes[event.on_device, event.lane].append(event)
    for lane in lanes.values():
        open_calls: list[Event] = []
        for event in sorted(lane, key=lambda e: (e.start_ns, -e.end_ns)):
            while open_calls and open_calls[-1].end_ns <= event.start_ns:
                open_calls.pop()
            calls[event.name] += 1
            times[event.name] += length(event)
            if open_calls:
                times[open_calls[-1].name] -= min(event.end_ns, open_calls[-1].end_ns) - event.start_ns
            open_calls.append(event)
    found = [Operator(name, calls[name], times[name]) for name in calls]
    return tuple(sorted(found, key=lambda operator: (-operator.self_ns, operator.name)))


def clipped(events: Iterable[Event], step: Event) -> list[tuple[int, int]]:
    """The stretches of a step in which any of the events runs, in order and without overlaps."""
    merged: list[tuple[int, int]] = []
    for event in sorted(events, key=lambda e: e.start_ns):
        start, end = max(event.start_ns, step.start_ns), min(event.end_ns, step.end_ns)
        if start >= end:
            continue
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def largest_gaps(events: Sequence[Event], steps: Sequence[Event]) -> tuple[Gap, ...]:
    gaps: list[Gap] = []
    for step in steps:
        inside = [e for e in events if e.end_ns > step.start_ns and e.start_ns < step.end_ns]
        at, before = step.start_ns, "the step's start"
        for event in sorted(inside, key=lambda e: (e.start_ns, -e.end_ns)):
            if event.start_ns > at:
                gaps.append(Gap(event.start_ns - at, step.name, before))
            if event.end_ns > at:
                at, before = event.end_ns, event.name
        if step.end_ns > at:
            gaps.append(Gap(step.end_ns - at, step.name, before))
    return tuple(sorted(gaps, key=lambda gap: -gap.ns)[:GAPS])


def memory_peak(events: Sequence[Event]) -> int | None:
    changes = sorted((e.start_ns, e.allocated_bytes) for e in events if e.name == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak if changes else None


def communication_share(operators: Sequence[Operator]) -> float:
    total = sum(operator.self_ns for operator in operators)
    return sum(operator.self_ns for operator in operators if speaks(operator.name)) / total if total else 0.0


def speaks(name: str) -> bool:
    """Whether an operator or kernel talks to other ranks."""
    return any(word in name.lower() for word in COMMUNICATION)


def advice(figures: Figures) -> list[str]:
    """What the figures say to look at first. A threshold is where the gain begins to be worth a change: a tenth."""
    found: list[str] = []
    phases = figures.device_phase_ns or figures.phase_ns
    total = sum(phases.values()) or 1
    wall = sum(figures.step_ns)
    if figures.phase_ns["data wait"] > 0.05 * wall:
        found.append("batches come late: read from a faster disk, or give the rank more cores to read with")
    if figures.device_busy is not None and figures.device_busy < 0.9:
        found.append(
            "the device waits for the host: raise train.micro_batch, so that kernels are larger, or look at the gaps "
            "in the trace for what makes the host wait"
        )
    if figures.communication > 0.1:
        found.append(
            f"{figures.communication:.0%} is communication: a larger train.global_batch has fewer exchanges a token, "
            "and a lower parallel.zero_stage has smaller ones where memory allows"
        )
    if phases["update"] > 0.2 * total:
        found.append("the update is a large share: more micro-batches a step (train.global_batch) spread it thinner")
    if figures.phase_ns["rest"] > 0.1 * wall:
        found.append("much of a step is outside of the engine: is the disk of the run's folder slow, or a rank late?")
    waiting = [gap for gap in figures.gaps if speaks(gap.before)]
    if waiting and waiting[0].ns > 0.05 * wall / len(figures.step_ns):
        found.append(f"after {waiting[0].before} a rank waits for others: compare their pages (profile.ranks)")
    largest = (figures.kernels or figures.operators)[:1]
    if largest:
        names = "kernel" if figures.kernels else "operator"
        share = largest[0].self_ns / (sum(o.self_ns for o in figures.kernels or figures.operators) or 1)
        found.append(f"{share:.0%} of the time is in one {names}, {largest[0].name}: what is gained there counts")
    return found


def write_page(figures: Figures, place: str) -> str:
    steps = len(figures.step_ns)
    mean_ms = sum(figures.step_ns) / steps / 1e6
    lines = [
        f"{steps} steps, {place}",
        f"wall time a step: {mean_ms:,.2f} ms (from {min(figures.step_ns) / 1e6:,.2f} to "
        f"{max(figures.step_ns) / 1e6:,.2f}); recording makes steps slower, so compare shares, not times",
        "",
        "where it goes" + (" on the host" if figures.kernels else ""),
        *_phases(figures.phase_ns, steps),
    ]
    if figures.device_busy is not None:
        lines += [
            "",
            f"kernels by the phase that launched them; the device is busy {figures.device_busy:.1%} of the time",
        ]
        lines += _phases(figures.device_phase_ns, steps)
        lines += ["", "kernels", *_table(figures.kernels, steps)]
    lines += ["", "operators by self time on the host", *_table(figures.operators, steps)]
    if figures.gaps:
        nothing = "no kernel" if figures.kernels else "no operator"
        lines += ["", f"largest gaps, in which {nothing} runs"]
        lines += [f"  {gap.ns / 1e6:10,.3f} ms  in {gap.step}, after {gap.before}" for gap in figures.gaps]
    if figures.memory_peak_bytes is not None:
        lines += ["", f"most memory held beyond the start of the window: {figures.memory_peak_bytes:,} bytes"]
    lines += ["", "what to look at", *(f"  - {line}" for line in advice(figures))]
    return "\n".join(lines) + "\n"


def _phases(times: dict[str, int], steps: int) -> list[str]:
    total = sum(times.values()) or 1
    return [f"  {name:<10} {ns / steps / 1e6:10,.3f} ms a step  {ns / total:6.1%}" for name, ns in times.items()]


def _table(operators: Sequence[Operator], steps: int) -> list[str]:
    total = sum(operator.self_ns for operator in operators) or 1
    rows = [f"  {'self ms a step':>14}  {'share':>6}  {'calls a step':>12}  name"]
    for operator in operators[:ROWS]:
        rows.append(
            f"  {operator.self_ns / steps / 1e6:14,.3f}  {operator.self_ns / total:6.1%}  "
            f"{operator.calls / steps:12,.1f}  {operator.name[:72]}"
        )
    left = operators[ROWS:]
    if left:
        ns = sum(operator.self_ns for operator in left)
        rows.append(f"  {ns / steps / 1e6:14,.3f}  {ns / total:6.1%}  {'':>12}  {len(left)} others")
    return rows
