"""Samples → medians, quartiles and ratios. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gptscale.bench.contender import MATMUL
from gptscale.bench.rounds import Samples
from gptscale.bench.turns import Turn


@dataclass(frozen=True)
class Spread:
    """Quartiles of a sample."""

    lower: float
    median: float
    upper: float


@dataclass(frozen=True)
class Row:
    """One contender's figures. Times are those of a step; ratios are to the reference, within the same round."""

    name: str
    built: str
    wall_s: Spread
    cpu_s: Spread
    wall_ratio: Spread
    cpu_ratio: Spread
    wall_share_of_peak: float
    """Useful operations a second, as a share of what matrix products alone reached in the same rounds."""
    cpu_share_of_peak: float
    """The same by CPU-seconds: another process on the cores changes it little."""
    peak_bytes: int


@dataclass(frozen=True)
class Peak:
    """Rate of matrix products alone, all ranks together."""

    flops_per_wall_s: float
    flops_per_cpu_s: float


def matmul_peak(samples: Samples, flops: int, ranks: int) -> Peak:
    """`flops`: operations of one of its steps on one rank. Ranks multiply at the same time; CPU-seconds add up."""
    wall_s = statistics.median(_steps(samples.rounds, "wall_s"))
    cpu_s = statistics.median(_steps(samples.rounds, "cpu_s"))
    return Peak(flops * ranks / wall_s, flops * ranks / cpu_s)


def summarise(measured: Mapping[str, Samples], step_flops: float, peak: Peak) -> list[Row]:
    """`step_flops`: useful operations of one optimizer step over all ranks."""
    reference = next(iter(measured.values()))
    rows = []
    for name, samples in measured.items():
        if name == MATMUL:
            continue
        flops = samples.ready.flops or step_flops
        wall_s, cpu_s = spread(_steps(samples.rounds, "wall_s")), spread(_steps(samples.rounds, "cpu_s"))
        rows.append(
            Row(
                name=name,
                built=samples.ready.built,
                wall_s=wall_s,
                cpu_s=cpu_s,
                wall_ratio=spread(_ratios(samples.rounds, reference.rounds, "wall_s")),
                cpu_ratio=spread(_ratios(samples.rounds, reference.rounds, "cpu_s")),
                wall_share_of_peak=flops / wall_s.median / peak.flops_per_wall_s,
                cpu_share_of_peak=flops / cpu_s.median / peak.flops_per_cpu_s,
                peak_bytes=samples.peak_bytes,
            )
        )
    return rows


def spread(values: Sequence[float]) -> Spread:
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    return Spread(*statistics.quantiles(values, n=4, method="inclusive"))


def _steps(turns: Sequence[Turn], clock: str) -> list[float]:
    return [seconds for turn in turns for seconds in getattr(turn, clock)]


def _ratios(turns: Sequence[Turn], reference: Sequence[Turn], clock: str) -> list[float]:
    """One a round: what disturbs the machine for longer than a round then disturbs both sides."""
    return [sum(getattr(a, clock)) / sum(getattr(b, clock)) for a, b in zip(turns, reference, strict=True)]
