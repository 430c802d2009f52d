"""SLURM's shorthand for lists: hosts (`n[01-03,7],m2`) and tasks a node (`2(x3),1`)."""

from __future__ import annotations

import re

from gptscale.runtime.errors import UserError

_PART = re.compile(r"(?:[^,\[\]]|\[[^\]]*\])+")
"""One entry of a host list: up to a comma that is not within brackets."""
_TASKS = re.compile(r"(\d+)(?:\(x(\d+)\))?")


def expand_hosts(hosts: str) -> list[str]:
    """`n[01-03,7],m2` → n01 n02 n03 n7 m2, in SLURM's order; several brackets in a name multiply, the last one fastest.

    Raises UserError for what is not a host list.
    """
    parts = _PART.findall(hosts)
    if ",".join(parts) != hosts or not parts:
        raise UserError(f"{hosts!r} is not a SLURM host list\nset MASTER_ADDR to the first host of the step")
    return [name for part in parts for name in _expand_name(part)]


def first_host(hosts: str) -> str:
    """The host of rank 0, under every distribution of tasks but `arbitrary`."""
    return expand_hosts(hosts)[0]


def expand_tasks_per_node(tasks: str) -> list[int]:
    """`2(x3),1` → 2 2 2 1: how many tasks each node of the step runs. Raises UserError for anything else."""
    counts = []
    for part in tasks.split(","):
        match = _TASKS.fullmatch(part)
        if not match:
            raise UserError(f"SLURM_STEP_TASKS_PER_NODE={tasks!r} is not a list of counts\nstart the ranks with srun")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _expand_name(name: str) -> list[str]:
    """One entry, `rack[1-2]n[01-03]`: text and brackets in turn."""
    names = [""]
    for text, ranges in re.findall(r"([^\[\]]+)|\[([^\]]*)\]", name):
        endings = [text] if text else [number for one in ranges.split(",") for number in _expand_range(one)]
        names = [name + ending for name in names for ending in endings]
    return names


def _expand_range(text: str) -> list[str]:
    """`08-10` → 08 09 10, with the leading zeros of the first number; `7` → 7."""
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    if not match:
        raise UserError(f"[{text}] is not a range of a SLURM host list\nset MASTER_ADDR to the first host of the step")
    first, last = match[1], match[2] or match[1]
    return [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
