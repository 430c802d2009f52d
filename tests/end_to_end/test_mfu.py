"""The MFU of a run on a device whose peak is known, which a plugin sees to here."""

from __future__ import annotations

from pathlib import Path

import pytest

from gptscale.config.compose import compose
from gptscale.config.schema import TrainRoot
from gptscale.model.count import flops_per_token
from tests.helpers.training import read_metrics, run_training, small_run

PLUGIN = """
from gptscale.runtime import hardware

hardware._DEVICES["cpu"] = hardware._device(100, fp32=0.25)
"""


def test_the_mfu_is_of_all_devices_and_of_the_length_that_a_step_has(corpus: Path, tmp_path: Path) -> None:
    plugin = tmp_path / "peak.py"
    plugin.write_text(PLUGIN)
    grows = ["train.length_from=16", f"train.length_tokens={2 * 8 * 32}", "model.dropout=0"]
    run = [*small_run(corpus, tmp_path / "run"), *grows, "train.steps=4", f"plugins=[{plugin}]", "launch.ranks=2"]
    said = run_training(run, 2, tmp_path).text()
    assert "of 0.5 TFLOP/s" in said
    model = compose("train", TrainRoot, run).settings.model
    lines = [line for line in read_metrics(tmp_path / "run") if "train/loss" in line]
    for line, length in zip(lines, (16, 16, 32, 32), strict=True):
        of_peak = line["throughput/tokens_per_sec"] * flops_per_token(model, 384, length) / (2 * 0.25e12)
        assert line["throughput/mfu"] == pytest.approx(of_peak, rel=1e-9)
