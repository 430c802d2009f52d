"""The pure parts of training: schedule, parameter groups, metrics, what may change on resume, the guard."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gptscale.config.build import plain
from gptscale.config.schema import GuardConfig, ModelConfig, OptimizerConfig, TrainRoot
from gptscale.flow import Position
from gptscale.model.gpt import GPT
from gptscale.runtime.errors import DivergedError, UserError
from gptscale.train.guard import Guard
from gptscale.train.metrics import MetricsFile, read_metrics
from gptscale.train.optimizer import build_optimizer, parameter_groups
from gptscale.train.progress import Progress
from gptscale.train.refusal import refuse_differences
from gptscale.train.resume import differences


def test_parameter_groups_cover_everything_once_and_decay_matrices_only() -> None:
    model = GPT(ModelConfig(layers=2, width=32, heads=4), 100, 16, torch.float32)
    groups = {group["name"]: group for group in parameter_groups(model.named_parameters(), 0.1)}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed = {names[id(parameter)] for parameter in groups["decay"]["params"]}  # type: ignore[attr-defined]
    kept = {names[id(parameter)] for parameter in groups["no_decay"]["params"]}  # type: ignore[attr-defined]
    assert decayed | kept == set(names.values())
    assert not decayed & kept
    assert decayed == {
        name for name, parameter in model.named_parameters() if parameter.dim() == 2 and name != "embedding.positions"
    }
    assert groups["no_decay"]["weight_decay"] == 0
    assert build_optimizer(model, OptimizerConfig()).defaults["fused"] is True
    with pytest.raises(UserError, match="adamw"):
        build_optimizer(model, OptimizerConfig(name="adam"))


def test_a_model_without_biases_has_no_empty_group() -> None:
    layer = torch.nn.Linear(4, 4, bias=False)
    assert [group["name"] for group in parameter_groups(layer.named_parameters(), 0.1)] == ["decay"]


def test_metrics_are_cut_back_to_the_resumed_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 0)
    for step in range(1, 6):
        file.write({"step": step, "train/loss": 1 / 3 if step != 4 else math.nan})
    file.close()
    with path.open("a") as broken:
        broken.write('{"step": 6, "train/lo')  # a kill in the middle of a line
    assert read_metrics(path)[3] == {"step": 4, "train/loss": None}
    file = MetricsFile(path, 3)
    file.write({"step": 4, "train/loss": 0.25})
    file.close()
    assert [(line["step"], line["train/loss"]) for line in read_metrics(path)] == [
        (1, 1 / 3),
        (2, 1 / 3),
        (3, 1 / 3),
        (4, 0.25),
    ]


def test_what_may_change_on_resume() -> None:
    saved = {"model": {"layers": 2}, "train": {"steps": 5, "global_batch": 8}, "launch": {"ranks": 1}}
    wanted = {"model": {"layers": 3}, "train": {"steps": 9, "global_batch": 4}, "launch": {"ranks": 2}}
    assert differences(saved, wanted) == ["model.layers: 2 → 3", "train.global_batch: 8 → 4"]


def test_a_run_of_an_older_version_goes_on() -> None:
    """It has no word of a setting that is new: the setting's default is what it was trained with."""
    wanted = plain(TrainRoot())
    older = {name: dict(group) for name, group in wanted.items() if name != "guard"}
    del older["model"]["tied_embeddings"]
    data: dict[str, Any] = {"seed": 0, "corpora": []}
    state = {"settings": older, "data": data, "progress": Progress().to_json(), "tokenizer_sha256": ""}
    refuse_differences("runs/x", state, wanted, data, "", ())
    wanted["model"]["tied_embeddings"] = False
    with pytest.raises(UserError, match=r"model\.tied_embeddings: True → False"):
        refuse_differences("runs/x", state, wanted, data, "", ())


def test_progress_survives_json() -> None:
    progress = Progress(3, Position(24, ((5, 7),)), 768, 2**64 - 5, 1, {"full": "sdpa"}).advanced(8, 256, 9)
    assert progress.sample_hash == 4
    written = json.loads(json.dumps(progress.to_json()))
    assert Progress.from_json(written) == progress
    del written["attention_kernels"]  # as in checkpoints of older versions
    assert Progress.from_json(written).attention_kernels == {}


def test_the_guard_counts_skips_in_a_row() -> None:
    guard = Guard(GuardConfig(max_skipped_steps=3))
    for norm in (math.inf, math.nan, 1.0, math.inf, math.inf):
        guard.watch(1, norm)
    with pytest.raises(DivergedError, match="3 updates in a row"):
        guard.watch(6, math.nan)


FULL_DISK = """
import resource, sys
from pathlib import Path
from gptscale.runtime.errors import UserError
from gptscale.train.metrics import MetricsFile

file = MetricsFile(Path(sys.argv[1]), 0)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))  # the kernel takes no more, as on a full disk
try:
    try:
        for step in range(1, 100):
            file.write({"step": step})
    finally:
        file.close()
except UserError as error:
    print(error)
"""


def test_a_disk_that_takes_no_more_is_the_users_to_free(tmp_path: Path) -> None:
    """Also when the file is closed on the way out: that must not raise something else in its place."""
    path = tmp_path / "metrics.jsonl"
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert str(path) in done.stdout
    assert "free the disk" in done.stdout
    steps = [line["step"] for line in read_metrics(path)]
    assert steps == list(range(1, len(steps) + 1))
    assert steps
