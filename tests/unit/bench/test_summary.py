"""Samples → figures, and when elapsed times are said to be doubtful."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gptscale.bench.environment import Environment, describe_environment
from gptscale.bench.rounds import Samples
from gptscale.bench.summary import Peak, Spread, matmul_peak, spread, summarise
from gptscale.bench.turns import Ready, Turn

READY = Ready(built="loop", device="cpu", keeps_freed_memory=True)


def samples(*rounds: tuple[float, ...], cpu_share: float = 1.0) -> Samples:
    turns = [Turn((0.0,) * len(wall_s), wall_s, tuple(s * cpu_share for s in wall_s), 2**20) for wall_s in rounds]
    return Samples(READY, rounds=turns)


def test_spread_is_the_quartiles() -> None:
    assert spread([4.0, 1.0, 3.0, 2.0, 5.0]) == Spread(2.0, 3.0, 4.0)
    assert spread([7.0]) == Spread(7.0, 7.0, 7.0)


def test_a_ratio_is_taken_within_a_round() -> None:
    # The machine was five times slower in the second round, for both; a ratio of medians would be 1.5.
    bare = samples((1.0, 1.0), (5.0, 5.0), (1.0, 1.0))
    slower = samples((1.2, 1.2), (6.0, 6.0), (1.5, 1.5), cpu_share=0.5)
    rows = summarise({"bare": bare, "zero1": slower}, step_flops=10.0, peak=Peak(20.0, 40.0))
    assert [row.name for row in rows] == ["bare", "zero1"]
    assert rows[0].wall_ratio == Spread(1.0, 1.0, 1.0)
    assert rows[1].wall_ratio.median == pytest.approx(1.2)
    assert rows[1].cpu_ratio.median == pytest.approx(0.6)
    assert rows[1].wall_s.median == pytest.approx(1.5)


def test_shares_of_the_peak_count_useful_operations() -> None:
    matmul = samples((0.1,), (0.1,), cpu_share=0.5)
    peak = matmul_peak(matmul, flops=20, ranks=2)
    assert peak.flops_per_wall_s == pytest.approx(400.0)
    assert peak.flops_per_cpu_s == pytest.approx(800.0)
    rows = summarise({"bare": samples((0.5,), cpu_share=0.5), "matmul": matmul}, step_flops=100.0, peak=peak)
    assert [row.name for row in rows] == ["bare"]
    assert rows[0].wall_share_of_peak == pytest.approx(0.5)
    assert rows[0].cpu_share_of_peak == pytest.approx(0.5)


def environment(start: float, end: float, cores: int = 2) -> Environment:
    described = describe_environment("gptscale bench step", 1, 1, "cpu", keeps_freed_memory=True, load_at_start=start)
    return replace(described, load_at_end=end, usable_cores=cores)


def test_other_work_makes_elapsed_times_doubtful_but_our_own_does_not() -> None:
    assert environment(0.1, 1.2).doubt() is None
    assert "load 3.0" in (environment(3.0, 1.0).doubt() or "")
    assert environment(0.1, 2.5).doubt() is not None


def test_so_do_more_threads_than_cores() -> None:
    assert "share 1 cores" in (replace(environment(0.0, 0.0, cores=1), ranks=2).doubt() or "")
