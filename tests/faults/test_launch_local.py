"""Our launcher and its ranks, with real processes and real signals: nobody is left, and the user sees who and why."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from gptscale.launcher.local import launch_local
from tests.helpers.processes import tree, wait_for_ranks, wait_until

WORKER = "tests.helpers.worker"


def launcher(
    folder: Path, behaviour: str, *arguments: str, ranks: int = 2, stop_timeout_s: float = 20, logs: bool = False
) -> tuple[str, ...]:
    log_folder = str(folder / "logs") if logs else "-"
    command = [sys.executable, "-m", "tests.helpers.launch_local", str(ranks), str(stop_timeout_s), log_folder]
    return (*command, WORKER, str(folder), behaviour, *arguments)


def test_arguments_environment_and_place_arrive_intact(tmp_path: Path) -> None:
    hard = ["name=x y", "+a.b=[1, 2]", "q='it''s \"so\"'", "$(touch no)", "", "--local_rank=7", "-m", "é\n"]
    with tree(
        *launcher(tmp_path, "exit=0", *hard, ranks=3),
        environ={"OMP_NUM_THREADS": "9", "OMP_WAIT_POLICY": "ACTIVE", "TORCHELASTIC_RUN_ID": "outer", "RANK": "5"},
    ) as started:
        reports = wait_for_ranks(tmp_path, 3, started)
        assert started.end()[0] == 0
    for rank, report in enumerate(reports):
        assert report["arguments"] == hard
        port = report["info"].pop("master_port")
        assert port == reports[0]["info"].get("master_port", port)
        assert report["info"] == {
            "rank": rank,
            "world_size": 3,
            "local_rank": rank,
            "local_world_size": 3,
            "launcher": "gptscale",
            "master_address": "127.0.0.1",
        }
        assert report["environ"] == {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "ACTIVE", "GOMP_SPINCOUNT": "0"}


@pytest.mark.parametrize("behaviour", ["wait", "stuck", "helper"])
def test_sigkill_of_the_launcher_leaves_nobody(tmp_path: Path, behaviour: str) -> None:
    with tree(*launcher(tmp_path, behaviour)) as started:
        reports = wait_for_ranks(tmp_path, 2, started)
        assert [report["watched"] for report in reports] == [[started.process.pid]] * 2
        started.process.kill()
        if behaviour == "helper":
            # Killed by the kernel, a rank cannot end what it started: its helpers are to watch it.
            helpers = {report["helper"] for report in reports}
            wait_until(lambda: set(started.alive()) <= helpers, "ranks end", 2)
        else:
            started.wait_until_gone(2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_request_to_stop_reaches_every_rank_and_waits_for_the_save(tmp_path: Path, number: signal.Signals) -> None:
    with tree(*launcher(tmp_path, "save")) as started:
        wait_for_ranks(tmp_path, 2, started)
        started.process.send_signal(number)
        code, _, err = started.end()
        assert code == 75
        assert f"{number.name}: the run stops after a save" in err
        assert [(tmp_path / f"saved-{rank}").read_text() for rank in (0, 1)] == [number.name] * 2
        assert started.alive() == []


def test_ranks_that_do_not_handle_the_request_yet_end_with_it(tmp_path: Path) -> None:
    with tree(*launcher(tmp_path, "wait")) as started:
        wait_for_ranks(tmp_path, 2, started)
        started.process.send_signal(signal.SIGTERM)
        assert started.end()[0] == 75
        assert started.alive() == []


def test_ranks_that_do_not_save_in_time_are_killed(tmp_path: Path) -> None:
    with tree(*launcher(tmp_path, "never-saves@1,save@0", stop_timeout_s=1)) as started:
        wait_for_ranks(tmp_path, 2, started)
        started.process.send_signal(signal.SIGTERM)
        code, _, err = started.end()
        assert code == 1
        assert "rank 1 did not save and end within 1 s; killed" in err
        assert started.alive() == []


def test_a_rank_that_stops_by_itself_gives_the_others_the_same_time(tmp_path: Path) -> None:
    with tree(*launcher(tmp_path, "save", stop_timeout_s=1)) as started:
        reports = wait_for_ranks(tmp_path, 2, started)
        os.kill(reports[0]["pid"], signal.SIGUSR1)
        assert started.end()[0] == 1
        assert started.alive() == []


def test_a_second_interrupt_kills(tmp_path: Path) -> None:
    with tree(*launcher(tmp_path, "never-saves@1,stuck@0")) as started:
        wait_for_ranks(tmp_path, 2, started)
        started.process.send_signal(signal.SIGINT)
        time.sleep(0.1)
        started.process.send_signal(signal.SIGINT)
        time.sleep(0.8)
        assert started.process.poll() is None, "the echo of the first Ctrl-C was taken for a second"
        started.process.send_signal(signal.SIGINT)
        assert started.end(timeout_s=5)[0] == 130
        assert started.alive() == []


@pytest.mark.parametrize(
    ("behaviour", "code", "said"),
    [
        ("raise@1,wait@0", 1, ["ArithmeticError: rank 1 cannot go on", "gptscale: rank 1 failed (exit 1)"]),
        ("raise@0,wait@1", 1, ["ArithmeticError: rank 0 cannot go on", "gptscale: rank 0 failed (exit 1)"]),
        ("raise@1,stuck@0", 1, ["ArithmeticError: rank 1 cannot go on", "gptscale: rank 1 failed (exit 1)"]),
        ("die=SIGKILL@1,wait@0", 1, ["gptscale: rank 1 was ended by SIGKILL (out of memory? `dmesg` says)"]),
        ("die=SIGSEGV@0,wait@1", 1, ["gptscale: rank 0 was ended by SIGSEGV"]),
        ("raise@1,loses-peer@0", 1, ["ArithmeticError: rank 1 cannot go on", "gptscale: rank 1 failed (exit 1)"]),
        ("exit=7@1,helper@0", 7, ["rank 1 says why", "gptscale: rank 1 failed (exit 7)"]),
        ("chatter@1,wait@0", 4, ["the last words", "gptscale: rank 1 failed (exit 4)"]),
        ("exit=2@1,wait@0", 2, ["rank 1 says why"]),
        ("exit=2", 2, ["rank 0 says why"]),
        ("exit=3@0,wait@1", 3, ["rank 0 says why"]),
    ],
)
def test_a_rank_that_fails_ends_the_others_and_is_named_last(
    tmp_path: Path, behaviour: str, code: int, said: list[str]
) -> None:
    with tree(*launcher(tmp_path, behaviour, logs=True)) as started:
        wait_until(lambda: len(list(tmp_path.glob("rank-*.json"))) == 2, "two ranks", 20)
        actual_code, out, err = started.end(timeout_s=10)
        assert started.alive() == []
        assert (actual_code, out) == (code, "")
        lines = [line.split("; its log is")[0] for line in err.splitlines()]
        assert lines[-len(said) :] == said
        if "logs/rank-1.log" in err:
            assert said[0] in (tmp_path / "logs/rank-1.log").read_text()
        if "chatter" in behaviour:
            assert len(err) < 100_000
            assert (tmp_path / "logs/rank-1.log").stat().st_size > 300_000


def test_the_culprits_traceback_is_last_when_the_others_lose_it_in_a_collective(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "tests.helpers.launch_local",
        "3",
        "20",
        str(tmp_path),
        "tests.helpers.gloo_worker",
    ]
    with tree(*command) as started:
        code, _, err = started.end(timeout_s=90)
    assert code == 1
    lines = [line for line in err.splitlines() if line.startswith(("rank", "gptscale"))]  # torch's own warnings aside
    assert lines[0].startswith("rank 0: lost a peer: ")
    assert lines[1] == "rank 1: Traceback (most recent call last):"
    assert lines[-2] == "rank 1: ArithmeticError: rank 1 cannot go on"
    assert lines[-1] == f"gptscale: rank 1 failed (exit 1); its log is {tmp_path}/rank-1.log"
    assert "rank 2" not in err
    assert "rank 2: lost a peer" in (tmp_path / "rank-2.log").read_text()


def test_a_stopped_rank_does_not_keep_the_launcher(tmp_path: Path) -> None:
    with tree(*launcher(tmp_path, "die=SIGSTOP@0,exit=9@1")) as started:
        assert started.end(timeout_s=20)[0] == 9
        assert started.alive() == []


def test_called_within_a_program_it_leaves_handlers_and_children_as_they_were(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)}
    descriptors = set(os.listdir("/proc/self/fd"))
    children = {child.pid for child in psutil.Process().children()}  # other tests' fork servers, for one
    code = launch_local(WORKER, [str(tmp_path), "exit=2@1,exit=0@0"], 2, threads=1, logs=None, stop_timeout_s=5)
    assert code == 2
    assert capfd.readouterr().err == "rank 0 says why\nrank 1 says why\n"
    assert {number: signal.getsignal(number) for number in before} == before
    assert set(os.listdir("/proc/self/fd")) == descriptors
    assert {child.pid for child in psutil.Process().children()} == children, "zombies count as children"
