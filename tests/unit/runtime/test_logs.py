"""Rank logs, and how failures read."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gptscale.runtime.errors import DivergedError, PeerCrashedError, PeerFailedError, StoppedError, UserError
from gptscale.runtime.logs import describe_failure, exit_code_of, lost_a_peer, open_logs, report_failure


@pytest.fixture(autouse=True)
def _closed_logs() -> Iterator[None]:
    yield
    for handler in list(logging.getLogger("gptscale").handlers):
        logging.getLogger("gptscale").removeHandler(handler)
        handler.close()


def test_rank_0_speaks_and_every_rank_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    open_logs(tmp_path / "logs", rank=1)
    logging.getLogger("gptscale.train.loop").warning("from one")
    open_logs(tmp_path / "logs", rank=0)
    logging.getLogger("gptscale.train.loop").info("from zero")
    logging.getLogger("gptscale.train.loop").warning("careful")
    logging.getLogger("gptscale.train.loop").debug("not wanted")
    out, err = capsys.readouterr()
    assert (out, err) == ("", "from zero\nwarning: careful\n")
    assert " rank 1 WARNING from one" in (tmp_path / "logs/rank-1.log").read_text()
    assert len((tmp_path / "logs/rank-0.log").read_text().splitlines()) == 2
    open_logs(tmp_path / "logs", rank=0)
    logging.getLogger("gptscale").info("appended")
    assert len((tmp_path / "logs/rank-0.log").read_text().splitlines()) == 3


def test_without_a_folder_only_rank_0_is_heard(capsys: pytest.CaptureFixture[str]) -> None:
    open_logs(None, rank=3)
    logging.getLogger("gptscale").error("nobody hears")
    open_logs(None, rank=0)
    logging.getLogger("gptscale").info("heard")
    assert capsys.readouterr().err == "heard\n"


# As gloo, the store and NCCL word them (torch 2.13; NCCL's from its sources).
LOST = [
    "[/x/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1. This is typically caused by",
    "[/x/pair.cc:537] Read error [127.0.0.1]:39055: Connection reset by peer. This is typically caused by",
    "[/x/unbound_buffer.cc:78] Timed out waiting 5000ms for recv operation to complete",
    "Timed out after 5 seconds waiting for clients. 1/2 clients joined.",
    "[Rank 0]: Rank 1 failed to pass monitoredBarrier in 1800000 ms\n Original exception: \n[/x/pair.cc:553] …",
    "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=5, OpType=ALLREDUCE",
]


@pytest.mark.parametrize("message", LOST)
def test_a_lost_peer_takes_one_line(message: str) -> None:
    error = RuntimeError(message)
    text = describe_failure(error, rank=1)
    assert text.startswith("rank 1: lost a peer: ")
    assert "\n" not in text
    assert "/x/" not in text
    assert exit_code_of(error, "gptscale") == 76
    assert exit_code_of(error, "torchrun") == 1


def test_a_peers_bug_takes_one_line_and_a_peers_mistake_blames_nobody_here() -> None:
    error = PeerCrashedError("saving step-00000001 failed on another rank, which says why")
    text = describe_failure(error, rank=1)
    assert text == "rank 1: lost a peer: saving step-00000001 failed on another rank, which says why"
    assert (exit_code_of(error, "gptscale"), exit_code_of(error, "slurm")) == (76, 1)
    assert (exit_code_of(PeerFailedError(), "gptscale"), exit_code_of(PeerFailedError(), "slurm")) == (76, 2)


def raised(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as caught:
        return caught


def test_a_bug_shows_its_traceback_under_the_ranks_name() -> None:
    text = describe_failure(raised(ZeroDivisionError("by zero\nsecond line")), rank=2)
    lines = text.splitlines()
    assert lines[0] == "rank 2: Traceback (most recent call last):"
    assert lines[-2:] == ["rank 2: ZeroDivisionError: by zero", "rank 2: second line"]
    assert exit_code_of(ZeroDivisionError(), "gptscale") == 1


@pytest.mark.parametrize(
    "error", [BrokenPipeError(32, "Broken pipe"), ConnectionResetError(104, "Connection reset by peer")]
)
def test_a_broken_pipe_of_its_own_is_no_lost_peer(error: OSError) -> None:
    assert not lost_a_peer(error)
    assert "Traceback" in describe_failure(raised(error), rank=0)


@pytest.mark.parametrize(
    ("error", "code"),
    [(UserError("data.path: none\nset it"), 2), (DivergedError("loss"), 3), (StoppedError("saved"), 75)],
)
def test_expected_ends_are_told_without_a_traceback(error: Exception, code: int) -> None:
    assert describe_failure(raised(error), rank=0, environ={}) == str(error)
    assert "Traceback" in describe_failure(raised(error), rank=0, environ={"GPTSCALE_DEBUG": "1"})
    assert exit_code_of(error, "slurm") == code


def test_the_log_keeps_the_traceback_of_every_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    open_logs(tmp_path, rank=0)
    report_failure(raised(UserError("data.path: none\nset it")), rank=0)
    assert capsys.readouterr().err == "data.path: none\nset it\n"
    assert "Traceback" in (tmp_path / "rank-0.log").read_text()


FULL_DISK = """
import logging, resource, sys
from pathlib import Path
from gptscale.runtime.logs import open_logs

log = open_logs(Path(sys.argv[1]), rank=0)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))  # the kernel takes no more, as on a full disk
for step in range(20):
    log.info("step %d", step)
"""


def test_a_log_that_the_disk_refuses_ends_with_one_line(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("step")] == [f"step {n}" for n in range(20)]
    (said,) = [line for line in done.stderr.splitlines() if not line.startswith("step")]
    assert str(tmp_path / "rank-0.log") in said
