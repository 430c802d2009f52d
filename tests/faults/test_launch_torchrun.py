"""Ranks of torchrun end with it, however it dies. The ranks themselves import no torch."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

from tests.helpers.processes import tree, wait_for_ranks

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d")


def command(folder: Path, behaviour: str, *arguments: str) -> tuple[str, ...]:
    meeting = "--rdzv-endpoint=127.0.0.1:0"  # any free port: two runs of the tests do not meet
    return (*TORCHRUN, meeting, "-m", "tests.helpers.worker", str(folder), behaviour, *arguments)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nobody_outlives_torchrun(tmp_path: Path, number: signal.Signals) -> None:
    with tree(*command(tmp_path, "wait@0,stuck@1" if number == signal.SIGKILL else "wait")) as started:
        reports = wait_for_ranks(tmp_path, 2, started)
        assert [report["info"]["launcher"] for report in reports] == ["torchrun"] * 2
        assert [report["info"]["local_world_size"] for report in reports] == [2, 2]
        assert [report["watched"] for report in reports] == [[started.process.pid]] * 2
        started.process.send_signal(number)
        started.wait_until_gone(2 if number == signal.SIGKILL else 10)


def test_ranks_save_when_torchrun_is_asked_to_stop(tmp_path: Path) -> None:
    hard = ["name=x y", "+a.b=[1, 2]", 'q="so"', "--local_rank=7"]
    with tree(*command(tmp_path, "save", *hard)) as started:
        reports = wait_for_ranks(tmp_path, 2, started)
        assert [report["arguments"] for report in reports] == [hard] * 2
        started.process.send_signal(signal.SIGTERM)
        started.wait_until_gone(10)
        assert sorted(path.name for path in tmp_path.glob("saved-*")) == ["saved-0", "saved-1"]


def test_a_killed_rank_ends_the_others(tmp_path: Path) -> None:
    with tree(*command(tmp_path, "die=SIGKILL@1,wait@0")) as started:
        started.wait_until_gone(20)
        assert started.end()[0] == 1
