"""One dial, from the command line to a trained model: what follows is written down, and a run goes on with it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tests.helpers.processes import tree
from tests.helpers.training import read_metrics, write_corpus

GPTSCALE = str(Path(sys.executable).parent / "gptscale")


def test_a_depth_trains(tmp_path: Path) -> None:
    text = write_corpus(tmp_path / "text")
    command = [
        *(GPTSCALE, "train", "experiment=depth", "model.depth=4", f"run.dir={tmp_path / 'run'}", "parallel=plain"),
        *(f"data.sources=[{{path: {text}}}]", f"data.corpora_dir={tmp_path / 'corpora'}", "tokenizer.vocab_size=300"),
        *("data.sequence_length=32", "train.global_batch=4", "evaluation.sequences=8", "launch.threads=1"),
    ]
    for steps in (3, 4):
        with tree(*command, f"train.steps={steps}") as started:
            code, _, err = started.end(timeout_s=120)
        assert code == 0, err
    assert "from step 3" in err

    settings = OmegaConf.load(tmp_path / "run/config.yaml")
    assert (settings.model.depth, settings.model.layers, settings.model.width, settings.model.heads) == (4, 4, 256, 4)
    parameters = 12 * 4 * 256**2 + 300 * 256
    assert settings.schedule.warmup_tokens == parameters
    lines = [line for line in read_metrics(tmp_path / "run") if "train/loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:  # on the way up
        expected = settings.optimizer.learning_rate * line["tokens"] / parameters
        assert line["train/lr"] == pytest.approx(expected, rel=1e-6)
