"""Runs whose blocks are compiled: resumed bit for bit, changed for one without, refused where nothing can compile."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.helpers.training import exact_part, read_metrics, run_training, small_run

GPTSCALE = str(Path(sys.executable).parent / "gptscale")
COMPILED = "train.compile=block"


def losses(lines: list[dict[str, Any]]) -> list[float]:
    return [line["train/loss"] for line in lines if "train/loss" in line]


def test_a_compiled_run_goes_on_bit_for_bit_and_may_change(corpus: Path, tmp_path: Path) -> None:
    def run(name: str, *more: str) -> list[dict[str, Any]]:
        run_training([*small_run(corpus, tmp_path / name), "parallel.zero_stage=3", *more], 2, tmp_path)
        return read_metrics(tmp_path / name)

    whole = run("whole", COMPILED)
    half = ("train.steps=8", "schedule.total_steps=12")
    run("half", COMPILED, *half)
    shutil.copytree(tmp_path / "half", tmp_path / "changed")
    assert exact_part(run("half", COMPILED)[-5:]) == exact_part(whole[-5:])
    changed = run("changed")  # dropout and all, without the compiler from here on
    apart = [abs(a - b) for a, b in zip(losses(changed), losses(whole), strict=True)]
    assert max(apart) < 1e-4, "the promise for another layout"
    assert exact_part(changed) != exact_part(whole), "other kernels did the sums"


def test_a_host_without_a_compiler_is_told(corpus: Path, tmp_path: Path) -> None:
    command = [GPTSCALE, "train", *small_run(corpus, tmp_path / "run"), "launch.ranks=2", COMPILED]
    environment = {**os.environ, "CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    refused = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert refused.returncode == 2, refused.stderr
    what, fix = refused.stderr.strip().splitlines()
    assert "train.compile=block: torch cannot compile on this host" in what
    assert "set train.compile=none" in fix
    assert not list((tmp_path / "run").glob("checkpoints/*"))
