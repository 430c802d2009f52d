"""A batch and sequences that grow: a run stopped on the way goes on exactly, on another layout too."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.training import exact_part, read_metrics, run_training, small_run

STEP_TOKENS = 8 * 32
GROWS = [
    "train.ramp_from=4",
    f"train.ramp_tokens={3 * STEP_TOKENS}",
    "train.length_from=16",
    f"train.length_tokens={4 * STEP_TOKENS}",
    "model.dropout=0",
    "evaluation.every_steps=0",
    "checkpoint.every_steps=3",
    "schedule.total_steps=12",
]
PLAIN = ["parallel.engine=plain", "parallel.zero_stage=0"]


def test_a_run_that_grows_is_resumed_as_if_it_had_not_stopped(corpus: Path, tmp_path: Path) -> None:
    def run(name: str, *more: str) -> list[str]:
        return [*small_run(corpus, tmp_path / name), *GROWS, *more]

    run_training(run("whole", *PLAIN), 1, tmp_path)
    run_training(run("parts", *PLAIN, "train.steps=5"), 1, tmp_path)
    run_training(run("parts", *PLAIN), 1, tmp_path)
    run_training(run("moved", *PLAIN, "train.steps=5"), 1, tmp_path)
    run_training(run("moved", "parallel.zero_stage=1"), 2, tmp_path)
    names = ("whole", "parts", "moved")  # a session's end evaluates, and so has a line of its own
    whole, parts, moved = ([line for line in read_metrics(tmp_path / name) if "train/loss" in line] for name in names)
    assert exact_part(parts) == exact_part(whole)
    tokens = [line["tokens"] for line in whole]
    grown = [after - before for before, after in zip([0, *tokens], tokens, strict=False)]
    assert grown == sorted(grown)
    assert set(grown) == {STEP_TOKENS // 2, STEP_TOKENS}  # shorter sequences are more of them
    assert [line["data/sample_hash"] for line in moved] == [line["data/sample_hash"] for line in whole]
    # Another layout sums in another order: 1e-4, the design's.
    for one, other in zip(moved, whole, strict=True):
        assert one["train/loss"] == pytest.approx(other["train/loss"], abs=1e-4)
