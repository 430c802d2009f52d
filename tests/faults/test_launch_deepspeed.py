"""Ranks of `deepspeed` end with its runner *and* with its launch.py, however they die. The ranks import no torch.

A start takes some six seconds, so each serves several checks.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.processes import Tree, tree, wait_for_ranks, wait_until

HARD = ["name=x y", "+a.b=[1, 2]", "q='it''s \"so\"'", "$(touch no)"]


def command(folder: Path, behaviour: str, *options: str) -> tuple[str, ...]:
    # Nobody binds the port, as these ranks never meet.
    runner = (sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus=2", "--master_port=20000")
    return (*runner, *options, "--module", "tests.helpers.worker", str(folder), behaviour, *HARD)


def start_and_check(folder: Path, started: Tree) -> tuple[list[dict[str, Any]], int, int]:
    """What the ranks say, and the pids of launch.py and the runner."""
    reports = wait_for_ranks(folder, 2, started)
    assert [report["info"]["launcher"] for report in reports] == ["deepspeed"] * 2
    assert [report["info"]["local_rank"] for report in reports] == [0, 1]
    assert [report["info"]["local_world_size"] for report in reports] == [2, 2]
    assert [report["arguments"] for report in reports] == [HARD] * 2
    assert reports[0]["watched"] == reports[1]["watched"]
    launch, runner = reports[0]["watched"]
    assert runner == started.process.pid
    return reports, launch, runner


@pytest.mark.parametrize(
    ("victim", "number", "options"),
    [
        ("runner", signal.SIGKILL, ()),
        ("runner", signal.SIGTERM, ("--no_local_rank",)),
        ("launch.py", signal.SIGKILL, ()),
        ("a terminal's Ctrl-C", signal.SIGINT, ()),
    ],
)
def test_nobody_outlives_deepspeed(
    tmp_path: Path, victim: str, number: signal.Signals, options: tuple[str, ...]
) -> None:
    with tree(*command(tmp_path, "wait", *options), environ={"DS_ACCELERATOR": "cpu"}) as started:
        reports, launch, runner = start_and_check(tmp_path, started)
        if victim == "a terminal's Ctrl-C":
            os.killpg(runner, number)  # the runner leads the foreground group: all in it get the signal
        else:
            os.kill(runner if victim == "runner" else launch, number)
        ranks = {report["pid"] for report in reports}
        started.wait_until_gone(2, but=set(started.alive()) - ranks)
        started.wait_until_gone(10)


def test_a_killed_rank_ends_the_others(tmp_path: Path) -> None:
    with tree(*command(tmp_path, "die=SIGKILL@1,wait@0"), environ={"DS_ACCELERATOR": "cpu"}) as started:
        wait_until(lambda: len(list(tmp_path.glob("rank-*.json"))) == 2, "two ranks", timeout_s=60)
        started.wait_until_gone(10)
        assert started.end()[0] != 0
