"""What a person sees while text is being prepared."""

from __future__ import annotations

import pytest

from gptscale.cli import progress
from gptscale.cli.progress import prepare_progress, tokenise_line
from gptscale.data.prepare import ProgressEvent


def event(**fields: int) -> ProgressEvent:
    return ProgressEvent("tokenise", **{"parts": 40, "bytes": 400_000_000, **fields})


@pytest.mark.parametrize(
    ("at", "elapsed_s", "says"),
    [
        (event(), 0.0, "tokenising: part 0 of 40, 0 tokens"),
        (event(), 9.0, "tokenising: part 0 of 40, 0 tokens"),
        (
            event(parts_done=10, tokens=26_000_000, bytes_done=100_000_000),
            25.0,
            "tokenising: part 10 of 40, 26,000,000 tokens, 4.0 MB/s, 1 min 15 s left",
        ),
        (  # what was there before this process began took it no time
            event(parts_done=30, tokens=78_000_000, bytes_done=300_000_000, bytes_before=280_000_000),
            10.0,
            "tokenising: part 30 of 40, 78,000,000 tokens, 2.0 MB/s, 50 s left",
        ),
        (
            event(parts_done=0, bytes_done=8_000_000),
            4.0,
            "tokenising: part 0 of 40, 0 tokens, 2.0 MB/s, 3 min 16 s left",
        ),
    ],
)
def test_tokens_speed_and_time_left(at: ProgressEvent, elapsed_s: float, says: str) -> None:
    assert tokenise_line(at, elapsed_s) == says


def test_a_log_gets_a_line_now_and_then(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now_s)
    show = prepare_progress()
    show(ProgressEvent("tokenizer"))
    for second in range(1, 60):
        now_s = 100.0 + second
        show(event(parts_done=second // 10, bytes_done=1_000_000 * (second // 10)))
    now_s = 175.0
    show(ProgressEvent("merge", 3, 12))
    show(ProgressEvent("done", 40, 40, 1_234_567))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 7
    assert all(line.startswith("tokenising: part ") for line in lines[:5])
    assert lines[5:] == ["writing shards: 25 %", "prepared 1,234,567 tokens in 75 s"]
