"""From how the ranks ended to who is to blame and what the launcher returns. Pure."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass

from gptscale.runtime.errors import (
    EXIT_DIVERGED,
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_LOST_PEER,
    EXIT_STOPPED,
    EXIT_USER,
)


@dataclass(frozen=True)
class Exit:
    """How a rank ended. `code` is negative for a signal; `told` says that the launcher had told the ranks to end."""

    rank: int
    code: int
    told: bool = False

    @property
    def failed(self) -> bool:
        return self.code not in (EXIT_DONE, EXIT_STOPPED)

    @property
    def explains_itself(self) -> bool:
        """Its own words are what the user needs, in at most two lines: the launcher adds none."""
        return self.code in (EXIT_USER, EXIT_DIVERGED)


def find_culprit(exits: Sequence[Exit]) -> Exit | None:
    """Of the ranks' ends, in the order they came, the one that brought the others down; None where none failed.

    Who only lost a peer is not to blame while another can be, even one that took until after the launcher's TERM to
    finish its traceback; and nobody is where that peer was asked to stop while it waited for data, so that it left the
    others in the midst of a step. Where several failed alike, rank 0 it is: the user has seen it.
    """
    failures = [ended for ended in exits if ended.failed]
    if _stopped(exits) and all(ended.code == EXIT_LOST_PEER for ended in failures):
        return None
    for candidates in (
        [ended for ended in failures if not ended.told and ended.code != EXIT_LOST_PEER],
        [ended for ended in failures if ended.told and ended.code > 0 and ended.code != EXIT_LOST_PEER],
        [ended for ended in failures if ended.code == EXIT_LOST_PEER],
        failures,
    ):
        if candidates:
            first = candidates[0]
            alike = [ended for ended in candidates if ended.rank == 0 and ended.code == first.code > 0]
            return alike[0] if alike else first
    return None


def total_exit_code(exits: Sequence[Exit]) -> int:
    """The culprit's code, 1 if a signal or a lost peer ended it; 75 where ranks stopped on request; else 0."""
    culprit = find_culprit(exits)
    if culprit is not None:
        return EXIT_FAILED if culprit.code < 0 or culprit.code == EXIT_LOST_PEER else culprit.code
    return EXIT_STOPPED if _stopped(exits) else EXIT_DONE


def _stopped(exits: Sequence[Exit]) -> bool:
    return any(ended.code == EXIT_STOPPED for ended in exits)


def describe(culprit: Exit) -> str:
    """One line for the user: "rank 1 failed (exit 1)"."""
    if culprit.code == EXIT_LOST_PEER:
        return f"rank {culprit.rank} lost a peer, and no rank has said why"
    if culprit.code > 0:
        return f"rank {culprit.rank} failed (exit {culprit.code})"
    names = {number.value: number.name for number in signal.Signals}
    name = names.get(-culprit.code, f"signal {-culprit.code}")  # real-time signals have no name
    # The launcher's own SIGKILLs come after another failure; an unasked one is most often the kernel's.
    hint = " (out of memory? `dmesg` says)" if -culprit.code == signal.SIGKILL and not culprit.told else ""
    return f"rank {culprit.rank} was ended by {name}{hint}"
