"""fp16 through the whole training loop: the scale is shown, saved and gone on with, and overflows are no divergence."""

from __future__ import annotations

from pathlib import Path

import gptscale.train.setup
from tests.helpers import ranks
from tests.helpers.training import exact_part, read_metrics, small_run, train


def train_on_a_cpu(arguments: list[str]) -> int:
    """A rank of a training that a user would be refused on a CPU, where fp16 is slow."""
    gptscale.train.setup.use_precision = lambda precision, ranks: None
    return train(arguments)


def run(arguments: list[str], folder: Path, code: int = 0) -> str:
    started = ranks.start(train_on_a_cpu, [arguments], 1, folder)
    assert started.wait() == [code], started.text()
    return started.text()


def test_a_run_in_fp16_goes_on_bit_for_bit(corpus: Path, tmp_path: Path) -> None:
    fp16 = ["precision=fp16", "parallel=plain", "precision.loss_scale=4194304", "precision.loss_scale_window=3"]
    fp16 += ["guard.max_skipped_steps=2", "schedule.total_steps=12"]
    run([*small_run(corpus, tmp_path / "whole"), *fp16], tmp_path)
    run([*small_run(corpus, tmp_path / "twice"), *fp16, "train.steps=5"], tmp_path)
    run([*small_run(corpus, tmp_path / "twice"), *fp16], tmp_path)
    lines = read_metrics(tmp_path / "whole")
    again = read_metrics(tmp_path / "twice")
    steps = [line for line in lines if "train/loss" in line]
    assert exact_part([line for line in again if "train/loss" in line]) == exact_part(steps)
    scales = [line["train/loss_scale"] for line in steps]
    assert len(set(scales)) > 2, scales
    assert [line["train/loss_scale"] for line in again if "train/loss" in line] == scales
    overflowed = [line["train/grad_norm"] is None for line in steps]
    assert sum(overflowed) > 2, "more in a row than the guard would let pass"
    assert not all(overflowed[6:])
