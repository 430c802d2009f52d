"""Learning-rate schedules as functions of tokens."""

from __future__ import annotations

import math

import pytest

from gptscale.config.schema import ScheduleConfig
from gptscale.runtime.errors import UserError
from gptscale.train.schedule import SCHEDULES, check_schedule, learning_rate


def test_the_learning_rate_warms_up_and_falls_along_a_cosine() -> None:
    config = ScheduleConfig(warmup_tokens=100, final_ratio=0.1)
    rates = [learning_rate(tokens, config, 1.0, 1100) for tokens in (50, 100, 600, 1100, 5000)]
    assert rates == pytest.approx([0.5, 1.0, 0.55, 0.1, 0.1])
    # 0.1 + 0.9 · (1 + cos(π/4)) / 2 at a quarter of the way
    assert learning_rate(350, config, 1.0, 1100) == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 4)))


def test_a_line_is_straight() -> None:
    config = ScheduleConfig(name="linear", warmup_tokens=100, final_ratio=0.0)
    assert [learning_rate(tokens, config, 2.0, 1100) for tokens in (100, 350, 600, 1100, 1200)] == [2, 1.5, 1, 0, 0]


def test_warm_up_stable_decay_is_flat_until_its_cooldown() -> None:
    config = ScheduleConfig(name="wsd", warmup_tokens=100, final_ratio=0.0, cooldown_ratio=0.2)
    rates = [learning_rate(tokens, config, 1.0, 1000) for tokens in (50, 100, 500, 800, 850, 950, 1000, 1100)]
    assert rates == pytest.approx([0.5, 1, 1, 1, 0.5, 1 - math.sqrt(0.75), 0, 0])
    flat = ScheduleConfig(name="wsd", cooldown_ratio=0.0)
    assert learning_rate(1000, flat, 1.0, 1000) == 1.0


def test_a_warm_up_that_reaches_into_the_cooldown_leaves_less_of_it() -> None:
    config = ScheduleConfig(name="wsd", warmup_tokens=900, final_ratio=0.0, cooldown_ratio=0.2)
    rates = [learning_rate(tokens, config, 1.0, 1000) for tokens in (450, 900, 925, 1000, 2000)]
    assert rates == pytest.approx([0.5, 1, 0.5, 0, 0])


@pytest.mark.parametrize("name", ["constant", "cosine", "linear", "wsd", "inverse_sqrt"])
@pytest.mark.parametrize("total", [1, 50, 100, 101])
def test_no_rate_is_negative_or_above_the_peak_wherever_the_end_is(name: str, total: int) -> None:
    for cooldown in (0.0, 0.2, 1.0):
        config = ScheduleConfig(name=name, warmup_tokens=100, final_ratio=0.0, cooldown_ratio=cooldown)
        rates = [learning_rate(tokens, config, 1.0, total) for tokens in range(1, 300)]
        assert all(0 <= rate <= 1 for rate in rates)


def test_the_inverse_square_root_has_no_need_of_an_end() -> None:
    config = ScheduleConfig(name="inverse_sqrt", warmup_tokens=100, final_ratio=0.05)
    assert [learning_rate(tokens, config, 1.0, 10**9) for tokens in (50, 100, 400, 10_000)] == [0.5, 1.0, 0.5, 0.1]
    assert learning_rate(10**8, config, 1.0, 10**9) == 0.05
    with pytest.raises(UserError, match="warmup_tokens"):
        check_schedule(ScheduleConfig(name="inverse_sqrt"))


@pytest.mark.parametrize("name", ["constant", "cosine", "linear", "wsd", "inverse_sqrt"])
def test_every_schedule_starts_at_the_peak_and_never_rises(name: str) -> None:
    assert name in SCHEDULES.names()
    config = ScheduleConfig(name=name, warmup_tokens=64, final_ratio=0.01)
    rates = [learning_rate(tokens, config, 3e-4, 5000) for tokens in range(64, 6000, 7)]
    assert rates[0] == 3e-4
    assert rates == sorted(rates, reverse=True)
    assert min(rates) >= 3e-6 * (1 - 1e-9)


def test_a_near_name_is_offered() -> None:
    with pytest.raises(UserError, match="did you mean cosine"):
        check_schedule(ScheduleConfig(name="cosin"))
