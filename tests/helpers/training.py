"""Training runs for tests: a small corpus made here, and `gptscale.train` in real ranks."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tests.helpers import ranks
from tests.helpers.ranks import Started

WORDS = ["the", "a", "model", "token", "shard", "loss", "rank", "step", "data", "layer", "head", "mask", "norm", "text"]


def write_corpus(folder: Path, documents: int = 400) -> Path:
    """A jsonl file of sentences over a few words, so that a tiny model learns something within seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = random.Random(0)
    path = folder / "text.jsonl"
    with path.open("w") as file:
        for _ in range(documents):
            length = generator.randrange(20, 120)
            file.write(json.dumps({"text": " ".join(generator.choice(WORDS) for _ in range(length))}) + "\n")
    return path


def small_run(corpus: Path, folder: Path) -> list[str]:
    """Overrides of a run of 12 steps with dropout, evaluations and three checkpoints."""
    return [
        "experiment=tiny",
        f"run.dir={folder}",
        f"data.path={corpus}",
        "data.sequence_length=32",
        "model.layers=2",
        "model.width=32",
        "model.dropout=0.1",
        "train.steps=12",
        "train.global_batch=8",
        "train.micro_batch=2",
        "schedule.warmup_tokens=512",
        "evaluation.every_steps=3",
        "evaluation.sequences=13",
        "checkpoint.every_steps=4",
        "launch.threads=1",
        "parallel.timeout_s=60",
    ]


def train(arguments: list[str]) -> int:
    """One rank of `python -m gptscale.train`, in this process."""
    from gptscale.train.worker import main

    return main(arguments)


def run_training(arguments: list[str], world_size: int, folder: Path, code: int = 0) -> Started:
    started = ranks.start(train, [arguments], world_size, folder)
    codes = started.wait()
    assert codes == [code] * world_size, f"exit codes {codes}, not {code}\n{started.text()}"
    return started


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


EXACT = (
    "step",
    "tokens",
    "train/loss",
    "train/grad_norm",
    "train/lr",
    "train/loss_scale",
    "train/noise_scale_tokens",
    "noise/signal",
    "noise/trace",
    "data/sample_hash",
    "eval/loss",
    "eval/bits_per_byte",
)
"""What must be equal bit for bit between two runs that should be the same; the rest is time and memory."""
SOME_RUNS_ONLY = {"train/loss_scale", "train/noise_scale_tokens", "noise/signal", "noise/trace"}
"""Of these, what is in a line only where a run asks for it."""


def exact_part(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: line[key] for key in EXACT if key in line} for line in lines]
