"""What `gptscale bench data` found, as text for people and as JSON for programs."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from gptscale.bench.data import DataReport
from gptscale.bench.data_readers import (
    ORDER_LENGTH,
    ORDER_SHARE,
    ORDER_TOKENS,
    READERS,
    LargeSamples,
    ReaderSamples,
    ReadingSamples,
)
from gptscale.bench.data_tokenisers import TOKENISERS
from gptscale.bench.data_turns import OURS
from gptscale.bench.readers.common import Ordered, Pass
from gptscale.bench.readers.limits import READS, WIDENS
from gptscale.bench.readers.tokenisers import Encoded
from gptscale.bench.tables import aligned
from gptscale.config.build import plain
from gptscale.config.schema import BenchDataConfig


def to_text(report: DataReport) -> str:
    environment, bench = report.environment, report.bench
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    lines = [
        f"{'command':<9}{environment.command}",
        f"{'date':<9}{environment.date}",
        f"{'machine':<9}{environment.cpu}, {environment.usable_cores} usable cores",
        f"{'software':<9}gptscale {environment.gptscale}, python {environment.python}, torch {environment.torch}"
        f"{'; ' if versions else ''}{versions}",
        f"{'load':<9}{environment.load_at_start:.2f} at the start, {environment.load_at_end:.2f} at the end, of which "
        "this command makes up to 2",
        f"{'method':<9}{bench.rounds} rounds; every turn is a fresh process, one at a time, one torch thread; medians",
    ]
    if report.reading is not None:
        lines += ["", *_reader_lines(report.bench, report.reading)]
    if report.tokenisers:
        lines += ["", *_tokeniser_lines(report)]
    lines += [f"not run: {name}: {why}" for name, why in report.left_out.items()]
    doubt = environment.doubt()
    if doubt is not None:
        lines += ["", f"Elapsed times are doubtful: {doubt}. Trust the ratios of CPU-seconds."]
    return "\n".join(lines)


def _reader_lines(bench: BenchDataConfig, found: ReadingSamples) -> list[str]:
    ours = found.readers[OURS]
    header = ["", "Mtok/s", f"{OURS} ÷", "a CPU-s", f"{OURS} ÷", "first batch", "opened", "memory", "resume", "exact"]
    rows = []
    for name, samples in found.readers.items():
        rows.append(
            [
                name,
                f"{_median(samples.passes, wall_rate) / 1e6:,.0f}",
                "" if name == OURS else f"{_ratio(ours, samples, wall_rate):.1f}",
                f"{_median(samples.passes, cpu_rate) / 1e6:,.0f}",
                "" if name == OURS else f"{_ratio(ours, samples, cpu_rate):.1f}",
                _milliseconds([one.first_batch_s for one in samples.passes]),
                _milliseconds([one.opened_s for one in samples.passes]),
                f"{_median(samples.passes, lambda one: one.resident_bytes) / 1e6:,.0f} MB",
                _milliseconds([one.opened_s for one in samples.resumes]),
                "yes" if samples.exact else "NO",
            ]
        )
    shares = [
        wall_rate(one) / min(found.limits[name][number] for name in (READS, WIDENS))
        for number, one in enumerate(ours.passes)
    ]
    lines = [
        f"reading {bench.tokens:,} ids of two bytes, shuffled, as int64 batches of {bench.batch} rows: "
        f"{bench.sequence_length:,} inputs, and the last target",
        *aligned([header, *rows]),
        "",
        "limits, Mtok/s: "
        + ", ".join(f"{name} {statistics.median(rates) / 1e6:,.0f}" for name, rates in found.limits.items())
        + f"; {OURS} reaches {statistics.median(shares):.0%} of the slower of {READS} and {WIDENS}",
        f"{OURS} ÷: median over the rounds of the ratio within a round. first batch: from torch alone imported;",
        "opened, resume: from the reader's libraries imported to the first batch, at the start and in the middle.",
        "memory: beyond torch's, after the pass.",
        "exact: after the resume come the same ids that the first process went on with.",
        "",
        *_large(found.large),
        f"the order of {ORDER_TOKENS:.0e} tokens ({ORDER_TOKENS // ORDER_LENGTH:,} samples):",
        *(f"  {name}: {_order(samples.order)}" for name, samples in found.readers.items() if samples.order is not None),
        "",
        *(f"{name}: {samples.passes[0].flags}" for name, samples in found.readers.items()),
    ]
    return lines


def _large(large: LargeSamples) -> list[str]:
    opened, resumed = (_milliseconds([one.opened_s for one in ones]) for ones in (large.passes, large.resumes))
    memory = _median(large.passes, lambda one: one.resident_bytes) / 1e6
    return [
        f"{OURS} on {ORDER_TOKENS:.0e} tokens in {large.shards:,} shards (files with holes): opened {opened}, resumed "
        f"in the middle {resumed}, memory {memory:,.0f} MB",
        "",
    ]


def _tokeniser_lines(report: DataReport) -> list[str]:
    header = ["", "MB/s", f"÷{OURS}", "Mtok/s", "MB a CPU-s", f"÷{OURS}"]
    ours = report.tokenisers.get(OURS, [])
    rows = []
    for name, samples in report.tokenisers.items():
        ratios = [byte_rate(one) / byte_rate(other) for one, other in zip(samples, ours, strict=False)]
        cpu_ratios = [cpu_byte_rate(one) / cpu_byte_rate(other) for one, other in zip(samples, ours, strict=False)]
        rows.append(
            [
                name,
                f"{_median(samples, byte_rate) / 1e6:.2f}",
                f"{statistics.median(ratios):.2f}" if ratios else "",
                f"{_median(samples, lambda one: one.tokens / one.wall_s) / 1e6:.2f}",
                f"{_median(samples, cpu_byte_rate) / 1e6:.2f}",
                f"{statistics.median(cpu_ratios):.2f}" if cpu_ratios else "",
            ]
        )
    return [
        f"tokenising {report.bench.text_bytes / 1e6:,.0f} MB of Python's and torch's source text, vocabulary of "
        f"{report.bench.vocab_size:,}",
        *aligned([header, *rows]),
        "",
        *(f"{name}: {TOKENISERS[name]}" for name in report.tokenisers),
    ]


def wall_rate(one: Pass) -> float:
    return one.tokens / one.wall_s


def cpu_rate(one: Pass) -> float:
    return one.tokens / one.cpu_s


def byte_rate(one: Encoded) -> float:
    return one.text_bytes / one.wall_s


def cpu_byte_rate(one: Encoded) -> float:
    return one.text_bytes / one.cpu_s


def _ratio(ours: ReaderSamples, other: ReaderSamples, rate: Callable[[Pass], float]) -> float:
    pairs = zip(ours.passes, other.passes, strict=True)
    return statistics.median(rate(one) / rate(two) for one, two in pairs)


def _median(samples: Sequence[Any], value: Callable[[Any], float]) -> float:
    return statistics.median(map(value, samples))


def _milliseconds(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds) * 1e3:,.0f} ms"


def _order(order: Ordered) -> str:
    whole = ORDER_TOKENS // ORDER_LENGTH
    if order.samples == whole:
        return f"{order.wall_s:.3f} s, {order.peak_bytes / 1e6:,.1f} MB"
    return (
        f"{order.wall_s * ORDER_SHARE:,.0f} s, {order.peak_bytes * ORDER_SHARE / 1e9:,.1f} GB "
        f"({ORDER_SHARE} × what {order.samples:,} samples took)"
    )


def to_json(report: DataReport) -> dict[str, Any]:
    reading = report.reading
    return {
        "bench": plain(report.bench),
        "environment": dataclasses.asdict(report.environment),
        "versions": report.versions,
        "readers": {} if reading is None else {name: _reader(name, one) for name, one in reading.readers.items()},
        "large": None if reading is None else dataclasses.asdict(reading.large),
        "limits": {} if reading is None else reading.limits,
        "tokenisers": {name: [dataclasses.asdict(one) for one in ones] for name, ones in report.tokenisers.items()},
        "not_run": report.left_out,
    }


def _reader(name: str, samples: ReaderSamples) -> dict[str, Any]:
    return {"environment": READERS[name].environment, "exact": samples.exact, **dataclasses.asdict(samples)}
