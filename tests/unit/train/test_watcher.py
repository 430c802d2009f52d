"""What a progress line says of the time that is left."""

from __future__ import annotations

from gptscale.train.watcher import time_left


def test_the_time_left_counts_tokens_and_not_steps() -> None:
    """1,500 tokens in 6 s, an evaluation of 2 s among them: 250 tokens a second."""
    pace = [(500, 1.0), (1000, 3.0), (0, 2.0)]
    assert time_left(1000, pace) == "0:04"
    assert time_left(250 * 61, pace) == "1:01"
    assert time_left(250 * (2 * 3600 + 3 * 60 + 4), pace) == "2:03:04"
    assert time_left(0, pace) == "0:00"
