"""The order of turns, and the refusal to compare different work."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from gptscale.bench.contender import COMPARED_STEPS, EQUAL_LOSS, MATMUL
from gptscale.bench.group import BenchError
from gptscale.bench.rounds import Samples, check_equal_losses, turn_order
from gptscale.bench.turns import Ready

NAMES = ["bare", "plain", "zero1", MATMUL]
READY = Ready(built="loop", device="cpu", keeps_freed_memory=True)


def samples(**losses: list[float]) -> dict[str, Samples]:
    return {name: Samples(READY, losses=values) for name, values in losses.items()}


def test_every_round_gives_each_one_turn_in_another_order() -> None:
    orders = [turn_order(NAMES, number) for number in range(len(NAMES))]
    assert all(sorted(order) == sorted(NAMES) for order in orders)
    assert len({tuple(order) for order in orders}) == len(NAMES)
    followers = {(first, second) for order in orders for first, second in pairwise(order)}
    assert ("bare", "plain") in followers
    assert ("plain", "bare") in followers, "whoever comes after another comes before it too"


def test_equal_losses_pass_and_the_largest_difference_is_told() -> None:
    measured = samples(bare=[5.0, 4.0], plain=[5.0, 4.00002], zero1=[5.00005, 4.0], matmul=[0.0, 0.0])
    assert math.isclose(check_equal_losses(measured, EQUAL_LOSS["fp32"]), 5e-5, rel_tol=1e-6)


@pytest.mark.parametrize("loss", [4.0002, math.nan, math.inf])
def test_another_loss_is_refused_by_name_and_step(loss: float) -> None:
    measured = samples(bare=[5.0, 4.0, 3.0], plain=[5.0, 4.0, 3.0], zero2=[5.0, loss, 3.0])
    with pytest.raises(BenchError, match=r"zero2 .* bare .* after 2 steps"):
        check_equal_losses(measured, EQUAL_LOSS["fp32"])


def test_losses_that_are_not_finite_anywhere_are_refused_too() -> None:
    with pytest.raises(BenchError, match="plain"):
        check_equal_losses(samples(bare=[math.nan], plain=[math.nan]), EQUAL_LOSS["fp32"])


def test_rounding_may_part_long_measurements_but_not_the_first_steps() -> None:
    same = [5.0] * COMPARED_STEPS
    assert check_equal_losses(samples(bare=[*same, 4.0], plain=[*same, 4.1]), EQUAL_LOSS["fp32"]) == 0
    with pytest.raises(BenchError, match=f"after {COMPARED_STEPS} steps"):
        check_equal_losses(samples(bare=same, plain=[*same[1:], 5.1]), EQUAL_LOSS["fp32"])
    with pytest.raises(BenchError, match="plain"):
        check_equal_losses(samples(bare=[*same, 4.0], plain=[*same, math.inf]), EQUAL_LOSS["fp32"])


def test_a_contender_that_took_fewer_steps_is_a_bug() -> None:
    with pytest.raises(ValueError, match="shorter"):
        check_equal_losses(samples(bare=[5.0, 4.0], plain=[5.0]), EQUAL_LOSS["fp32"])
