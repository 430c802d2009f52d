"""Which ancestors are launchers, which are gone, and waiting for a death."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from gptscale.runtime.ancestors import Ancestor, launcher_name, read_ancestors, reaps_orphans, still_alive
from gptscale.runtime.process import Launcher
from gptscale.runtime.watch import choose_launchers, wait_for_a_death

LAUNCH = ("/v/bin/python3", "-u", "-m", "deepspeed.launcher.launch", "--world_info=e30=", "train.py")
RUNNER = ("/v/bin/python3", "/v/bin/deepspeed", "--num_gpus", "2", "--module", "gptscale.train")
TORCHRUN = ("/v/bin/python3.11", "/v/bin/torchrun", "--nproc-per-node", "2", "-m", "gptscale.train")
STEPD = ("slurmstepd: [12.0]", "", "")
SHELL = ("bash", "-c", "deepspeed --module gptscale.train")
INIT = ("/sbin/init",)


@pytest.mark.parametrize(
    ("argv", "name"),
    [
        (LAUNCH, "deepspeed.launcher.launch"),
        (RUNNER, "deepspeed.launcher.runner"),
        (TORCHRUN, "torch.distributed.run"),
        (("python", "-X", "importtime", "-m", "torch.distributed.run"), "torch.distributed.run"),
        (("python", "/v/site-packages/torch/distributed/run.py", "x.py"), "torch.distributed.run"),
        (STEPD, "slurmstepd"),
        (SHELL, None),
        (("bash", "launch/train_deepspeed.sh"), None),
        (("vim", "/v/bin/deepspeed"), None),
        (("python", "-c", "torchrun"), None),
        (("python", "-m", "pytest", "deepspeed"), None),
        (("python", "train.py", "torchrun"), None),
        (("python",), None),
        ((), None),
    ],
)
def test_launchers_are_known_by_their_command_line(argv: tuple[str, ...], name: str | None) -> None:
    assert launcher_name(argv) == name


def chain(*argvs: tuple[str, ...]) -> list[Ancestor]:
    """Nearest first; the last is process 1."""
    return [Ancestor(pid=len(argvs) - index, started_ticks=0, argv=argv) for index, argv in enumerate(argvs)]


@pytest.mark.parametrize(
    ("ancestors", "launcher", "watched"),
    [
        (chain(LAUNCH, RUNNER, SHELL, INIT), "deepspeed", [4, 3]),
        (chain(LAUNCH, RUNNER, INIT), "deepspeed", [3, 2]),  # nohup: the runner's own parent is gone, and may be
        (chain(LAUNCH, ("sshd: user",), INIT), "deepspeed", [3]),  # a remote host under pdsh
        (chain(LAUNCH, INIT), "deepspeed", None),  # SIGTERM to the runner, before the ranks were up
        (chain(INIT), "deepspeed", None),
        (chain(TORCHRUN, SHELL, INIT), "torchrun", [3]),
        (chain(("bash", "wrap.sh"), TORCHRUN, INIT), "torchrun", [2]),
        (chain(TORCHRUN, STEPD, INIT), "torchrun", [3, 2]),
        (chain(TORCHRUN), "torchrun", [1]),  # torchrun as a container's first process
        (chain(("python", "own_launcher.py"), INIT), "torchrun", [2]),
        (chain(("python", "own_launcher.py")), "torchrun", [1]),
        (chain(INIT), "torchrun", None),
        (chain(("/lib/systemd/systemd", "--user"), INIT), "torchrun", None),
        (chain(STEPD, ("slurmd",), INIT), "slurm", [3]),
        (chain(("bash", "job.sh"), STEPD, INIT), "slurm", [2]),
        (chain(("bash",)), "slurm", []),
        ([], "slurm", []),
    ],
)
def test_the_whole_chain_of_launchers_is_watched(
    ancestors: list[Ancestor], launcher: Launcher, watched: list[int] | None
) -> None:
    chosen = choose_launchers(ancestors, launcher, {})
    assert (None if chosen is None else [ancestor.pid for ancestor in chosen]) == watched


def test_our_own_launcher_is_known_by_its_pid() -> None:
    ancestors = chain(("python", "-m", "gptscale"), SHELL, INIT)
    assert choose_launchers(ancestors, "gptscale", {"GPTSCALE_LAUNCHER_PID": "3"}) == ancestors[:1]
    assert choose_launchers(ancestors, "gptscale", {"GPTSCALE_LAUNCHER_PID": "99"}) is None


def test_inits() -> None:
    assert [reaps_orphans(ancestor) for ancestor in chain(("tini", "--", "x"), SHELL, INIT)] == [True, False, True]
    assert not reaps_orphans(Ancestor(1, 0, ("python3", "x.py")))


def test_own_ancestors_are_read_up_to_the_first_process() -> None:
    ancestors = read_ancestors()
    assert ancestors[0].pid == os.getppid()
    assert all(still_alive(ancestor) for ancestor in ancestors)
    impostor = Ancestor(ancestors[0].pid, ancestors[0].started_ticks + 1, ancestors[0].argv)
    assert not still_alive(impostor)


SHOW = "from gptscale.runtime.ancestors import read_ancestors; print(*(a.pid for a in read_ancestors()))"


def test_a_name_with_parentheses_and_spaces_does_not_confuse(tmp_path: object) -> None:
    odd = f"{tmp_path}/) R 1 (x y"
    os.symlink(sys.executable, odd)
    code = f"import subprocess, sys, os; print(os.getpid(), flush=True); subprocess.run([sys.argv[1], '-c', {SHOW!r}])"
    done = subprocess.run(
        [odd, "-c", code, sys.executable], capture_output=True, text=True, check=True, env={**os.environ}
    )
    middle, shown = done.stdout.splitlines()
    assert shown.split()[:2] == [middle, str(os.getpid())]


@pytest.mark.parametrize("with_handles", [True, False], ids=["pidfd", "polling"])
def test_the_one_that_dies_is_reported_dead_or_reaped_not(with_handles: bool) -> None:
    children = [subprocess.Popen(["sleep", seconds]) for seconds in ("60", "0.3", "60")]
    try:
        handles = []
        for child in children:
            ancestor = next(one for one in _ancestors_from(child.pid) if one.pid == child.pid)
            handles.append((ancestor, os.pidfd_open(child.pid) if with_handles else None))
        # Nobody reaps the second: a zombie counts as dead.
        assert wait_for_a_death(handles).pid == children[1].pid
    finally:
        for child in children:
            child.kill()
            child.wait()
        for _, handle in handles:
            if handle is not None:
                os.close(handle)


def _ancestors_from(pid: int) -> list[Ancestor]:
    """`pid` as an ancestor: its start time is field 22 of its stat."""
    with open(f"/proc/{pid}/stat") as file:
        return [Ancestor(pid, int(file.read().split()[21]), ("sleep",))]
