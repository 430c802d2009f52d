"""A user's own source, block, optimizer and schedule, by name, without a change to ours."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

PLUGIN = """
import torch
from torch import nn

from gptscale.data.sources import FORMATS, Document, Format, Part
from gptscale.model.gpt import BLOCKS
from gptscale.model.linear import Linear
from gptscale.model.norm import RMSNorm
from gptscale.train.optimizer import OPTIMIZERS, parameter_groups
from gptscale.train.schedule import SCHEDULES


def find(source, key):
    return (Part("counts", source, "counting", "", (), 2_000_000, "none", "1"),)


def read(part):
    for number in range(300):
        yield Document(str(number), " ".join(str(number + k) for k in range(60)))


FORMATS.register("counting")(Format(find, read))


@BLOCKS.register("shifted")
class Shifted(nn.Module):
    \"\"\"A gated mix of each token with the one before it.\"\"\"

    def __init__(self, config, layer, rotary):
        super().__init__()
        self.norm = RMSNorm(config.width, config.norm_epsilon)
        self.mix = Linear(config.width, config.width * config.block_options["factor"], False)
        self.out = Linear(config.width * config.block_options["factor"], config.width, False)

    def forward(self, x_BTD, cache=None):
        y_BTD = self.norm(x_BTD)
        before_BTD = torch.nn.functional.pad(y_BTD, (0, 0, 1, 0))[:, :-1]
        return x_BTD + self.out(torch.relu(self.mix(y_BTD + before_BTD)))


@OPTIMIZERS.register("heavy_ball")
def heavy_ball(model, config):
    groups = parameter_groups(model.named_parameters(), config.weight_decay)
    for group in groups:
        group["state_kinds"] = ("momentum_buffer",)
    return torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.options["momentum"])


@OPTIMIZERS.register("forgetful")
def forgetful(model, config):
    return torch.optim.SGD(model.parameters(), lr=config.learning_rate, momentum=0.9)


@SCHEDULES.register("stairs")
def stairs(tokens, total_tokens, config):
    return 0.5 ** int(config.options["stairs"] * tokens / total_tokens)
"""

SETTINGS = (
    "experiment=tiny",
    "plugins=[./mine.py]",
    "data.sources=[{format: counting}]",
    "data.workers=2",
    "tokenizer.vocab_size=274",
    "model.block=shifted",
    "model.block_options.factor=2",
    "optimizer.name=heavy_ball",
    "optimizer.options.momentum=0.9",
    "optimizer.learning_rate=0.05",
    "schedule.name=stairs",
    "schedule.options.stairs=4",
    "schedule.warmup_tokens=0",
    "checkpoint.every_steps=6",
    "logging.print_every_steps=1",
)


def gptscale(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gptscale.cli.main", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240)


def metrics(folder: Path, run: str) -> list[dict[str, float]]:
    lines = (folder / "runs" / run / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if "train/loss" in line]


def test_parts_of_ones_own_train_resume_and_generate(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(PLUGIN)
    two = ("launch.ranks=2", "parallel.zero_stage=1")
    for arguments in (
        [*SETTINGS, "run.name=whole", "train.steps=12", "launch.ranks=1", "parallel.engine=plain"],
        [*SETTINGS, "run.name=parts", "train.steps=6", "schedule.total_steps=12", *two],
        [*SETTINGS, "run.name=parts", "train.steps=12", "launch.ranks=2", "parallel.zero_stage=3"],
    ):
        done = gptscale(tmp_path, "train", *arguments)
        assert done.returncode == 0, done.stderr
    whole, parts = metrics(tmp_path, "whole"), metrics(tmp_path, "parts")
    rates = [line["train/lr"] for line in whole]
    assert [rates[0], rates[3], rates[11]] == [0.05, 0.025, 0.05 / 16]
    assert whole[0]["train/loss"] - whole[-1]["train/loss"] > 0.5, "it learns"
    # Other sums over ranks; a momentum that the resumption had lost would show as 0.1 and more.
    assert all(abs(a["train/loss"] - b["train/loss"]) < 1e-4 for a, b in zip(whole, parts, strict=True))

    wanted = ["source=runs/parts", "prompt=1 2 3", "generate.max_new_tokens=4", "generate.cache=false"]
    refused = gptscale(tmp_path, "generate", *wanted)
    assert refused.returncode == 2
    assert "model.block=shifted" in refused.stderr
    assert "plugins=" in refused.stderr
    completed = gptscale(tmp_path, "generate", *wanted, "plugins=[./mine.py]")
    assert completed.returncode == 0, completed.stderr
    assert completed.stdout.strip()


def test_an_optimizer_that_does_not_say_what_it_keeps_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(PLUGIN)
    refused = gptscale(tmp_path, "train", *SETTINGS, "train.steps=1", "launch.ranks=1", "optimizer.name=forgetful")
    assert refused.returncode == 2
    assert "optimizer.name=forgetful does not say what it keeps" in refused.stderr
    assert "state_kinds" in refused.stderr
    assert "Traceback" not in refused.stderr
