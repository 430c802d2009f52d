"""A private SLURM cluster on this machine: real munge, slurmctld and slurmd, in a temporary folder, gone afterwards.

Two nodes, `n0` and `n1`, are both this host, so that steps of more than one node run without a network. Debian:
`apt-get install --no-install-recommends slurm-wlm slurm-client munge`. Needs root (slurmd starts tasks as their user).
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.processes import processes_with, wait_until

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scancel", "squeue", "scontrol")

_CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=6
SlurmctldPort={port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,bf_interval=5,sched_min_interval=0
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=10
KillWait=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n[0-1] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{port_0}-{port_1}] CPUs=4 RealMemory=2000
PartitionName=main Nodes=n[0-1] Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=15
PartitionName=high Nodes=n[0-1] PriorityTier=10 PreemptMode=OFF
"""


def missing_programs() -> list[str]:
    """What of SLURM is not installed here."""
    return [name for name in PROGRAMS if shutil.which(name, path=_PATH) is None]


_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


@dataclass(frozen=True)
class Cluster:
    """A running cluster; `environ` is what its commands need."""

    folder: Path
    environ: Mapping[str, str]

    def run(self, *command: str, timeout_s: float = 60) -> str:
        """Run a SLURM command to its end and return its stdout; raises CalledProcessError with stderr shown."""
        done = subprocess.run(command, env=dict(self.environ), capture_output=True, text=True, timeout=timeout_s)
        if done.returncode:
            raise AssertionError(f"{' '.join(command)}: exit {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    def start(self, *command: str) -> subprocess.Popen[str]:
        """Start a SLURM command and leave it running: the caller ends it."""
        return subprocess.Popen(
            command,
            env=dict(self.environ),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
        )

    def logs(self) -> str:
        """The daemons' logs, for the message of a failed test."""
        return "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in (self.folder / "log").iterdir())


@contextmanager
def slurm_cluster() -> Iterator[Cluster]:
    """Start a cluster (about half a second), hand it over, end its daemons and jobs and remove its folder."""
    folder = Path(tempfile.mkdtemp(prefix="gptscale-slurm-"))
    folder.chmod(0o755)
    environ = {**{k: v for k, v in os.environ.items() if not k.startswith("SLURM")}, "PATH": _PATH}
    environ["SLURM_CONF"] = str(folder / "slurm.conf")
    daemons: list[subprocess.Popen[bytes]] = []

    def start_daemon(*command: str) -> None:
        with (folder / "log" / f"{command[0]}.start").open("ab") as log:
            # Each in its own session, in the foreground: ours to end, whatever happens to its pid file.
            daemons.append(
                subprocess.Popen(
                    command, env=environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
                )
            )

    try:
        for name in ("state", "spool/n0", "spool/n1", "log"):
            (folder / name).mkdir(parents=True)
        ports = _free_ports(3)
        (folder / "slurm.conf").write_text(
            _CONFIG.format(folder=folder, host=socket.gethostname(), port=ports[0], port_0=ports[1], port_1=ports[2])
        )
        (folder / "munge.key").write_bytes(secrets.token_bytes(1024))
        (folder / "munge.key").chmod(0o400)
        files = {"key-file": "munge.key", "socket": "munge.sock", "pid-file": "munge.pid", "seed-file": "munge.seed"}
        options = [f"--{option}={folder / name}" for option, name in files.items()]
        start_daemon("munged", "--force", "--foreground", f"--log-file={folder}/log/munged.log", *options)
        wait_until((folder / "munge.sock").exists, "munged", timeout_s=20)
        start_daemon("slurmctld", "-D", "-c")
        start_daemon("slurmd", "-D", "-N", "n0")
        start_daemon("slurmd", "-D", "-N", "n1")
        cluster = Cluster(folder, environ)
        try:
            wait_until(lambda: _idle_nodes(environ) == 2, "two idle nodes", timeout_s=20)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{cluster.logs()}") from None
        yield cluster
    finally:
        _kill_everything(folder)
        for daemon in daemons:
            daemon.wait()
        shutil.rmtree(folder)


def _kill_everything(folder: Path) -> None:
    """SIGKILL all that runs in this cluster's environment: daemons, step managers (which leave their daemon), tasks.

    A polite end takes ten seconds and more (a step manager waits for an srun that is gone), and the cluster's only
    state is in the folder, which goes as well.
    """
    deadline = time.monotonic() + 20
    while alive := processes_with(f"SLURM_CONF={folder}/slurm.conf"):
        assert time.monotonic() < deadline, f"processes of a SLURM cluster do not die: {alive}"
        for pid in alive:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def _idle_nodes(environ: Mapping[str, str]) -> int:
    shown = subprocess.run(
        ["sinfo", "--noheader", "--partition=main", "--states=idle", "--format=%D"],
        env=dict(environ),
        capture_output=True,
        text=True,
        timeout=20,
    )
    return int(shown.stdout.strip() or 0) if shown.returncode == 0 else 0


def _free_ports(count: int) -> list[int]:
    """`count` free ports in a row below the ephemeral range, for slurm.conf's Port=[a-b]."""
    while True:
        first = 12000 + secrets.randbelow(7000)
        sockets = [socket.socket() for _ in range(count)]
        try:
            for offset, held in enumerate(sockets):
                held.bind(("127.0.0.1", first + offset))
            return list(range(first, first + count))
        except OSError:
            continue
        finally:
            for held in sockets:
                held.close()
