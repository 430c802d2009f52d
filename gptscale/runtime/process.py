"""Who this process is among its peers, whichever launcher started it. Pure functions of the environment.

Each launcher says it in its own words: our own and torchrun set RANK and its companions, DeepSpeed sets them less
LOCAL_WORLD_SIZE (and puts `--local_rank=N` before the arguments), srun sets SLURM_* alone.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Literal

from gptscale.runtime.errors import UserError
from gptscale.runtime.slurm import expand_tasks_per_node, first_host

Launcher = Literal["gptscale", "torchrun", "deepspeed", "slurm", "none"]

LAUNCHER_VARIABLE = "GPTSCALE_LAUNCHER"
"""Set to `gptscale` by our own launcher for its ranks."""

_SLURM_PORTS = range(20_000, 30_000)
"""Below Linux's ephemeral ports (32768 and up), so that no outgoing connection of another program sits on one."""


@dataclass(frozen=True)
class ProcessInfo:
    """A rank's place in its world and where to meet the others.

    `launcher` is who started it: "none" is a process started by hand (a world of one) or by something that sets RANK
    and WORLD_SIZE and that we do not know. `master_port` 0, in a world of one only, is "any free port".
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    launcher: Launcher
    master_address: str
    master_port: int


ALONE = ProcessInfo(
    rank=0,
    world_size=1,
    local_rank=0,
    local_world_size=1,
    launcher="none",
    master_address="127.0.0.1",
    master_port=0,
)


def find_process(environ: Mapping[str, str]) -> ProcessInfo:
    """Read a rank's place from its environment; UserError where that is half set or not numbers."""
    if "RANK" in environ:
        return _from_rank_variables(environ)
    if _in_slurm_step(environ):
        return _from_slurm(environ)
    return ALONE


def export_process(info: ProcessInfo, environ: MutableMapping[str, str]) -> None:
    """Set what torch.distributed and DeepSpeed read, where it is missing: a value that is there stays."""
    for name, value in (
        ("RANK", info.rank),
        ("WORLD_SIZE", info.world_size),
        ("LOCAL_RANK", info.local_rank),
        ("LOCAL_WORLD_SIZE", info.local_world_size),
        ("MASTER_ADDR", info.master_address),
        ("MASTER_PORT", info.master_port),
    ):
        environ.setdefault(name, str(value))


def strip_local_rank(arguments: Sequence[str]) -> list[str]:
    """Arguments without the `--local_rank=N` that DeepSpeed and older PyTorch launchers put first; theirs alone goes.

    `arguments` is sys.argv[1:]. Spelt with - or _, with = or a space.
    """
    if not arguments:
        return []
    name, equals, _ = arguments[0].partition("=")
    if name not in ("--local_rank", "--local-rank"):
        return list(arguments)
    return list(arguments[1 if equals else 2 :])


def _from_rank_variables(environ: Mapping[str, str]) -> ProcessInfo:
    world_size = _number(environ, "WORLD_SIZE")
    if world_size > 1 and not ("MASTER_ADDR" in environ and "MASTER_PORT" in environ):
        raise UserError(
            f"RANK and WORLD_SIZE={world_size} are set but MASTER_ADDR or MASTER_PORT is not\n"
            "start with torchrun, deepspeed, srun or `gptscale train launch.ranks=N`, or set them for every rank"
        )
    info = ProcessInfo(
        rank=_number(environ, "RANK"),
        world_size=world_size,
        local_rank=_number(environ, "LOCAL_RANK", default=0),
        local_world_size=_local_world_size(environ, world_size),
        launcher=_launcher_of_rank_variables(environ),
        master_address=environ.get("MASTER_ADDR", ALONE.master_address),
        master_port=_number(environ, "MASTER_PORT", default=ALONE.master_port),
    )
    if not (0 <= info.rank < world_size and 0 <= info.local_rank < info.local_world_size <= world_size):
        raise UserError(
            f"RANK={info.rank} WORLD_SIZE={world_size} LOCAL_RANK={info.local_rank} "
            f"LOCAL_WORLD_SIZE={info.local_world_size} do not fit together\n"
            "unset them to run one process, or let a launcher set all of them"
        )
    return info


def _launcher_of_rank_variables(environ: Mapping[str, str]) -> Launcher:
    if environ.get(LAUNCHER_VARIABLE) == "gptscale":
        return "gptscale"
    if "TORCHELASTIC_RUN_ID" in environ:
        return "torchrun"
    # DeepSpeed's launch.py sets these two beside RANK; nobody else does.
    if "CROSS_RANK" in environ and "LOCAL_SIZE" in environ:
        return "deepspeed"
    # A job script that derives RANK from SLURM_PROCID by itself is still a step of srun's.
    if _in_slurm_step(environ) and environ["SLURM_PROCID"] == environ["RANK"]:
        return "slurm"
    return "none"


def _local_world_size(environ: Mapping[str, str], world_size: int) -> int:
    """DeepSpeed says LOCAL_SIZE. Who gives no LOCAL_RANK has one rank a host; who gives it and no size, one host."""
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        if name in environ:
            return _number(environ, name)
    return world_size if "LOCAL_RANK" in environ else 1


def _in_slurm_step(environ: Mapping[str, str]) -> bool:
    """In a task of srun's. The batch shell has SLURM_PROCID=0 too, but no step; `srun --pty bash` is for a person."""
    return "SLURM_STEP_ID" in environ and "SLURM_PROCID" in environ and "SLURM_PTY_PORT" not in environ


def _from_slurm(environ: Mapping[str, str]) -> ProcessInfo:
    total = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
    world_size = _number(environ, total, default=1)
    nodes = environ.get("SLURM_STEP_NODELIST", "")
    on_one_host = environ.get("SLURM_STEP_NUM_NODES", "1") == "1" or not nodes
    tasks = expand_tasks_per_node(environ.get("SLURM_STEP_TASKS_PER_NODE", str(world_size)))
    return ProcessInfo(
        rank=_number(environ, "SLURM_PROCID"),
        world_size=world_size,
        local_rank=_number(environ, "SLURM_LOCALID"),
        local_world_size=tasks[_number(environ, "SLURM_NODEID", default=0)],
        launcher="slurm",
        # A node's name need not resolve on the node itself, and one host needs no name.
        master_address=environ.get("MASTER_ADDR", ALONE.master_address if on_one_host else first_host(nodes)),
        master_port=_number(environ, "MASTER_PORT", default=_slurm_port(environ)),
    )


def _slurm_port(environ: Mapping[str, str]) -> int:
    """The same on every rank, another for each job, step and restart, so that neighbours do not meet."""
    job = _number(environ, "SLURM_JOB_ID", default=0)
    step = _number(environ, "SLURM_STEP_ID")
    restarts = _number(environ, "SLURM_RESTART_COUNT", default=0)
    return _SLURM_PORTS[(job * 101 + step * 11 + restarts) % len(_SLURM_PORTS)]


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name)
    if text is None:
        if default is not None:
            return default
        raise UserError(f"{name} is not set though its companions are\nlet a launcher set them, or unset them all")
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{name}={text!r} is not a number\nlet a launcher set it, or unset it") from None
