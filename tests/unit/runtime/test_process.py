"""A rank finds its place from what each launcher really sets."""

from __future__ import annotations

import pytest

from gptscale.runtime.errors import UserError
from gptscale.runtime.process import ALONE, ProcessInfo, export_process, find_process, strip_local_rank

RANKED = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
TORCHRUN = {**RANKED, "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}
# Taken from a task of SLURM 22.05: srun -N2 --ntasks-per-node=2 (rank 3).
STEP = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "n[07-08]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.9",
}
BATCH = {"SLURM_JOB_ID": "77", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NTASKS": "4"}


def test_started_by_hand_is_a_world_of_one() -> None:
    assert find_process({}) == ALONE
    assert find_process({"HOME": "/root", "WORLD_SIZE": "4"}) == ALONE


@pytest.mark.parametrize(
    ("environ", "launcher"),
    [
        (TORCHRUN, "torchrun"),
        ({**RANKED, "LOCAL_WORLD_SIZE": "2", "GPTSCALE_LAUNCHER": "gptscale"}, "gptscale"),
        ({**RANKED, "LOCAL_SIZE": "2", "CROSS_RANK": "1", "CROSS_SIZE": "2"}, "deepspeed"),
        ({**RANKED, "LOCAL_WORLD_SIZE": "2"}, "none"),
        ({**STEP, **RANKED, "LOCAL_WORLD_SIZE": "2"}, "slurm"),
        ({**STEP, **TORCHRUN}, "torchrun"),
        ({**STEP, **TORCHRUN, "GPTSCALE_LAUNCHER": "gptscale"}, "gptscale"),
    ],
)
def test_launchers_that_set_rank(environ: dict[str, str], launcher: str) -> None:
    info = find_process(environ)
    assert info.launcher == launcher
    assert (info.rank, info.world_size, info.local_rank, info.local_world_size) == (3, 4, 1, 2)
    assert (info.master_address, info.master_port) == ("10.0.0.1", 29500)


def test_one_rank_a_host_needs_no_local_rank() -> None:
    info = find_process({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"})
    assert (info.local_rank, info.local_world_size, info.launcher) == (0, 1, "none")


def test_srun_step() -> None:
    info = find_process(STEP)
    assert info == ProcessInfo(
        rank=3,
        world_size=4,
        local_rank=1,
        local_world_size=2,
        launcher="slurm",
        master_address="n07",
        master_port=info.master_port,
    )
    assert 20_000 <= info.master_port < 30_000
    assert find_process({**STEP, "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}).master_port == info.master_port


def test_srun_steps_jobs_and_restarts_meet_at_other_ports() -> None:
    ports = [
        find_process({**STEP, "SLURM_JOB_ID": job, "SLURM_STEP_ID": step, "SLURM_RESTART_COUNT": restarts}).master_port
        for job in ("77", "78", "79")
        for step in ("0", "1")
        for restarts in ("0", "1")
    ]
    assert len(set(ports)) == len(ports)


def test_srun_step_on_one_host_needs_no_name() -> None:
    one = {**STEP, "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NODELIST": "n7", "SLURM_STEP_TASKS_PER_NODE": "4"}
    info = find_process({**one, "SLURM_NODEID": "0"})
    assert (info.master_address, info.local_world_size) == ("127.0.0.1", 4)


def test_srun_step_obeys_an_explicit_meeting_place() -> None:
    info = find_process({**STEP, "MASTER_ADDR": "ib0", "MASTER_PORT": "1234"})
    assert (info.master_address, info.master_port) == ("ib0", 1234)


def test_batch_shell_and_interactive_shell_are_no_ranks() -> None:
    assert find_process(BATCH) == ALONE
    assert find_process({**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PTY_PORT": "4000"}) == ALONE


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        ({"RANK": "0"}, "WORLD_SIZE"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR"),
        ({**RANKED, "RANK": "x"}, "RANK='x'"),
        ({**RANKED, "RANK": "4"}, "RANK=4"),
        ({**TORCHRUN, "LOCAL_RANK": "2"}, "LOCAL_RANK=2"),
    ],
)
def test_half_set_variables_are_refused_in_two_lines(environ: dict[str, str], named: str) -> None:
    with pytest.raises(UserError, match=named) as refusal:
        find_process(environ)
    assert len(str(refusal.value).splitlines()) == 2


def test_export_fills_what_is_missing_only() -> None:
    environ = {"MASTER_PORT": "1"}
    export_process(find_process(STEP), environ)
    assert environ == {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "n07",
        "MASTER_PORT": "1",
    }


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([], []),
        (["--local_rank=1", "experiment=tiny"], ["experiment=tiny"]),
        (["--local-rank=0", "a=1"], ["a=1"]),
        (["--local_rank", "1", "a=1"], ["a=1"]),
        (["--local-rank", "1"], []),
        (["a=1", "--local_rank=1"], ["a=1", "--local_rank=1"]),
        (["--local_ranks=1"], ["--local_ranks=1"]),
    ],
)
def test_strip_local_rank(before: list[str], after: list[str]) -> None:
    assert strip_local_rank(before) == after
