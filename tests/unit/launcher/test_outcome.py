"""Who is to blame, and the exit code for the whole."""

from __future__ import annotations

import signal

import pytest

from gptscale.launcher.outcome import Exit, describe, find_culprit, total_exit_code


@pytest.mark.parametrize(
    ("exits", "culprit", "code"),
    [
        ([Exit(0, 0), Exit(1, 0)], None, 0),
        ([Exit(0, 75), Exit(1, 75)], None, 75),
        ([Exit(0, 0), Exit(1, 75)], None, 75),
        ([Exit(1, 1), Exit(0, 76)], 1, 1),
        # The peer that lost its connection ended before the one whose traceback took a while.
        ([Exit(0, 76), Exit(1, 1)], 1, 1),
        ([Exit(0, 76), Exit(1, 1, told=True)], 1, 1),
        ([Exit(0, 76), Exit(1, -15, told=True)], 0, 1),
        ([Exit(0, 76), Exit(1, 76)], 0, 1),
        ([Exit(1, -9), Exit(0, 76), Exit(2, -15, told=True)], 1, 1),
        # Both refuse the same configuration: rank 0's words are on the screen already.
        ([Exit(1, 2), Exit(0, 2)], 0, 2),
        ([Exit(1, 2), Exit(0, -15, told=True)], 1, 2),
        ([Exit(1, 3), Exit(0, 1)], 1, 3),
        ([Exit(1, 5), Exit(0, 3)], 1, 5),
        ([Exit(1, -9), Exit(0, -9)], 1, 1),
        ([Exit(0, 75), Exit(1, 76)], None, 75),
        ([Exit(0, 75), Exit(1, 76), Exit(2, 1, told=True)], 2, 1),
        ([Exit(0, 75), Exit(1, 1)], 1, 1),
        ([Exit(0, 75), Exit(1, -9, told=True)], 1, 1),
    ],
)
def test_culprit_and_code(exits: list[Exit], culprit: int | None, code: int) -> None:
    found = find_culprit(exits)
    assert (found.rank if found else None) == culprit
    assert total_exit_code(exits) == code


def test_descriptions() -> None:
    assert describe(Exit(1, 1)) == "rank 1 failed (exit 1)"
    assert describe(Exit(1, -signal.SIGSEGV)) == "rank 1 was ended by SIGSEGV"
    assert "out of memory" in describe(Exit(1, -signal.SIGKILL))
    assert "out of memory" not in describe(Exit(1, -signal.SIGKILL, told=True))
    assert describe(Exit(2, -40)) == "rank 2 was ended by signal 40"
    assert "lost a peer" in describe(Exit(0, 76))
