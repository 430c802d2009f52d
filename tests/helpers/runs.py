"""Run folders for the tests of whoever reads them: files as a training writes them, with figures made up here."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gptscale.data.shards import PartRecord
from gptscale.report.facts import DataCard, Facts, SessionFacts

BATCH_TOKENS = 524_288

CONFIG = """\
run:
  name: {name}
model:
  layers: 24
  width: 1024
optimizer:
  learning_rate: {rate}
data:
  path:
  - path: corpora/web
    weight: 3.0
  - path: corpora/code
    weight: 1.0
train:
  steps: {total}
"""


def write_run(
    folder: Path,
    steps: int,
    total: int | None = None,
    sets: Sequence[str] = ("web", "code", "books"),
    evaluate_every: int = 0,
    skipped: Sequence[int] = (),
    mfu: bool = True,
    optional: bool = True,
    samples: bool = True,
    rate: float = 3e-4,
    seed: int = 0,
    other_rows_from: int = 10**9,
    name: str | None = None,
) -> Path:
    """A run of `steps` steps out of `total`. `optional`: also the keys that not every run has. `other_rows_from`: the
    last step up to which two runs have the same sample hashes."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = random.Random(seed)
    total = steps if total is None else total
    evaluate_every = evaluate_every or max(1, steps // 10)
    lines: list[dict[str, Any]] = []
    tellings: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        done = step / total
        mean = 2.55 + 8.2 * math.exp(-9 * done**0.55) - 0.2 * done
        took_s = 0.61 + abs(generator.gauss(0, 0.012)) + (0.9 if generator.random() < 0.004 else 0)
        lost = step in skipped
        line = {
            "step": step,
            "tokens": step * BATCH_TOKENS,
            "train/loss": None if lost else mean + generator.gauss(0, 0.035),
            "train/grad_norm": None if lost else 0.35 + 2.5 * math.exp(-30 * done) + abs(generator.gauss(0, 0.05)),
            "train/lr": rate * min(1.0, step / max(1, total / 50)) * (0.55 + 0.45 * math.cos(math.pi * done)),
            "throughput/tokens_per_sec": BATCH_TOKENS / took_s,
            "throughput/mfu": BATCH_TOKENS / took_s * 2.4e9 / 7.915e15 if mfu else None,
            "throughput/step_time_s": took_s,
            "throughput/data_wait_pct": 0.8,
            "data/sample_hash": f"{(step + (step > other_rows_from) * 2**32) * 0x9E3779B97F4A7C15 % 2**64:016x}",
            "memory/peak_bytes": int(41.3e9 + min(step, 20) * 2e7),
        }
        if optional:
            line |= {
                "time/data_s": 0.005,
                "time/forward_backward_s": 0.78 * took_s,
                "time/update_s": 0.19 * took_s,
                "time/save_s": 4.2 if step > 1 and (step - 1) % evaluate_every == 0 else 0.0,
                "train/noise_scale_tokens": 4e4 * (1 + 30 * done) * math.exp(generator.gauss(0, 0.2)),
                "train/loss_scale": 65536.0 / (2 if any(step > other for other in skipped) else 1),
            }
        lines.append(line)
        if sets and (step % evaluate_every == 0 or step == steps):
            scores: dict[str, Any] = {"step": step, "time/evaluate_s": 6.5}
            for number, which in enumerate(sets):
                loss = mean + 0.04 + 0.22 * number * (1.1 - done) - 0.5 * (which == "code")
                prefix = "eval/" if which == "held-out" else f"eval/{which}/"
                scores |= {
                    f"{prefix}loss": loss,
                    f"{prefix}perplexity": math.exp(loss),
                    f"{prefix}bits_per_byte": loss / math.log(2) / 4.3,
                }
            lines.append(scores)
            if samples:
                words = [
                    "the",
                    "model",
                    "of",
                    "language",
                    "learns",
                    "what",
                    "<b>bold</b>",
                    "and",
                    "returns",
                    "a",
                    "list",
                ]
                for prompt in ("def read_", "The history of "):
                    text = " ".join(generator.choice(words) for _ in range(24))
                    tellings.append({"step": step, "prompt": prompt, "completion": text + "\n    return x"})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.yaml").write_text(CONFIG.format(name=name or folder.name, rate=rate, total=total))
    if tellings:
        (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in tellings))
    some_facts(name or folder.name, total, resumed=steps * 2 // 5, peak=7.915e15 if mfu else None).write(folder)
    return folder


def some_facts(name: str, total: int, resumed: int, peak: float | None) -> Facts:
    """Of eight GPUs, two sessions and two corpora."""
    session = SessionFacts(
        started_utc="2026-03-01T08:15:02+00:00",
        resumed_step=0,
        ranks=8,
        layout="ZeRO-1",
        micro_batch=8,
        device="NVIDIA H100 80GB HBM3",
        host="node-17",
        cpu="AMD EPYC 9654 96-Core Processor",
        cores=192,
        memory_bytes=1_622_000_000_000,
        command=f"python -m gptscale.train experiment=modern-350m run.name={name} launch.ranks=8",
        versions={"gptscale": "0.1.0", "python": "3.12.4", "torch": "2.13.0", "CUDA": "13.0", "deepspeed": "0.19.8"},
    )
    later = replace(session, started_utc="2026-03-01T19:40:55+00:00", resumed_step=resumed)
    web = (
        PartRecord(
            "web-00", "https://example.org/a/rather/long/address/of/a/dump.parquet", "ODC-By", "2024-10", 9, 800, 3600
        ),
        PartRecord("web-01", "https://example.org/another.parquet", "ODC-By", "2024-10", 4, 300, 1300),
    )
    code = (
        PartRecord("stdlib: abc.py … zipfile.py", "stdlib", "PSF-2.0", "Python 3.12.4", 700, 3_100_000, 12_000_000),
    )
    return Facts(
        name=name,
        parameters=355_922_944,
        total_steps=total,
        precision="bf16",
        flops_per_token=2_400_000_000,
        flops_formula="forward and backward: 6 · parameters of all matrix products + attention counted causally",
        peak_flops=peak,
        data=(
            DataCard(
                "corpora/web", "a1", "t", 0.75, 9_730_112_004, 8_412_993, 41_200_000_000, 50304, 9**8, 9**5, web, 112
            ),
            DataCard("corpora/code", "b2", "t", 0.25, 3_120_400_127, 902_113, 12_900_000_000, 50304, 9**7, 9**4, code),
        ),
        sessions=(session, later) if resumed else (session,),
    )
