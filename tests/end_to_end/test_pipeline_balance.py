"""Stages by measured time: a heavy head has fewer layers beside it, and a run keeps to what was measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from gptscale.config.schema import DataConfig, ModelConfig, ParallelConfig, TrainConfig, TrainRoot
from gptscale.parallel.ranks import Ranks
from gptscale.plan.stages import balanced
from gptscale.runtime.process import ALONE
from gptscale.train.balance import seconds_of_parts
from tests.helpers.training import exact_part, read_metrics, run_training, small_run


def test_time_is_that_of_the_parts() -> None:
    """A head of 250 times a layer's products takes most of the time, and full layers more than windows of a few."""
    model = ModelConfig(layers=6, width=64, heads=2, attention_pattern=("full", "window"), window=16)
    settings = TrainRoot(
        model=model,
        data=DataConfig(sequence_length=2048),
        train=TrainConfig(steps=1, micro_batch=1),
        parallel=ParallelConfig(pipeline=2),
    )
    ranks = Ranks(ALONE, deepspeed=False, timeout_s=60)
    embedding, *layers, head = seconds_of_parts(settings, 200_000, ranks)
    assert len(layers) == 6
    assert layers[0::2] == [layers[0]] * 3
    assert layers[1::2] == [layers[1]] * 3
    assert layers[0] > layers[1]
    assert head > sum(layers) > embedding / 100
    assert balanced([embedding, *layers, head], 2) == [5, 1]
    light = replace(settings, model=replace(model, attention_pattern=("full",)))
    assert balanced(seconds_of_parts(light, 128, ranks), 2) in ([3, 3], [4, 2])


def test_a_run_keeps_to_its_stages(corpus: Path, tmp_path: Path) -> None:
    def run(steps: int, *extra: str) -> list[str]:
        length = [f"train.steps={steps}", "schedule.total_steps=6"]
        asked = ["model.layers=4", "parallel.pipeline=2", "parallel.pipeline_balance=time"]
        return [*small_run(corpus, tmp_path / "run"), *asked, *length, *extra]

    started = run_training(run(3), 2, tmp_path)
    record = tmp_path / "run" / "pipeline.json"
    layers = json.loads(record.read_text())["layers"]
    assert sum(layers) == 4
    assert f"stages of {layers[0]}, {layers[1]} layers by measured time" in started.text()
    # Another measurement might say otherwise: what is kept counts.
    other = [1, 3] if layers != [1, 3] else [3, 1]
    record.write_text(json.dumps({"layers": other}))
    goes_on = run_training(run(6), 2, tmp_path)
    assert f"stages of {other[0]}, {other[1]} layers by measured time" in goes_on.text()
    assert json.loads(record.read_text())["layers"] == other
    assert len([line for line in exact_part(read_metrics(tmp_path / "run")) if "train/loss" in line]) == 6
