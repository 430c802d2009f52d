"""The scripts in launch/ hand every argument on as typed."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[3] / "launch"
HARD = ["name=x y", "+a.b=[1, 2]", "q='\"'", "$(touch no)", "*", ""]


@pytest.mark.parametrize(
    ("script", "program", "environ", "before"),
    [
        ("train_torchrun.sh", "torchrun", {}, ["--standalone", "--nproc-per-node", "gpu", "-m"]),
        ("train_torchrun.sh", "torchrun", {"RANKS": "2"}, ["--standalone", "--nproc-per-node", "2", "-m"]),
        ("train_deepspeed.sh", "deepspeed", {}, ["--no_local_rank", "--module"]),
        ("train_deepspeed.sh", "deepspeed", {"RANKS": "2"}, ["--num_gpus", "2", "--no_local_rank", "--module"]),
        ("train_deepspeed.sh", "deepspeed", {"HOSTFILE": "a b"}, ["--hostfile", "a b", "--no_local_rank", "--module"]),
    ],
)
def test_arguments_pass(tmp_path: Path, script: str, program: str, environ: dict[str, str], before: list[str]) -> None:
    shown = tmp_path / program
    shown.write_text("#!/usr/bin/env bash\nprintf '%s\\0' \"$@\"\n")
    shown.chmod(0o755)
    done = subprocess.run(
        [LAUNCH / script, *HARD],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", **environ},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split("\0")[:-1] == [*before, "gptscale.train", *HARD]
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("script", sorted(path.name for path in LAUNCH.glob("*.s*")))
def test_scripts_parse(script: str) -> None:
    subprocess.run(["bash", "-n", LAUNCH / script], check=True)
