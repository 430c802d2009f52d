"""SLURM's shorthand lists."""

from __future__ import annotations

import pytest

from gptscale.runtime.errors import UserError
from gptscale.runtime.slurm import expand_hosts, expand_tasks_per_node, first_host


@pytest.mark.parametrize(
    ("hosts", "expected"),
    [
        ("n0", ["n0"]),
        ("n[01-03,7],m2", ["n01", "n02", "n03", "n7", "m2"]),
        ("gpu-a[098-101]", ["gpu-a098", "gpu-a099", "gpu-a100", "gpu-a101"]),
        ("a,b,c", ["a", "b", "c"]),
        ("r[1-2]n[0-1].site", ["r1n0.site", "r1n1.site", "r2n0.site", "r2n1.site"]),
        ("n[3]", ["n3"]),
    ],
)
def test_hosts(hosts: str, expected: list[str]) -> None:
    assert expand_hosts(hosts) == expected
    assert first_host(hosts) == expected[0]


@pytest.mark.parametrize("hosts", ["", "n[1-", "n[a-b]", "n[1-2", "n1,", ",n1", "n[]"])
def test_nonsense_hosts_are_refused(hosts: str) -> None:
    with pytest.raises(UserError, match="host list"):
        expand_hosts(hosts)


@pytest.mark.parametrize(("tasks", "expected"), [("2", [2]), ("2(x3),1", [2, 2, 2, 1]), ("8(x2)", [8, 8])])
def test_tasks_per_node(tasks: str, expected: list[int]) -> None:
    assert expand_tasks_per_node(tasks) == expected


def test_nonsense_tasks_are_refused() -> None:
    with pytest.raises(UserError, match="SLURM_STEP_TASKS_PER_NODE"):
        expand_tasks_per_node("two")
