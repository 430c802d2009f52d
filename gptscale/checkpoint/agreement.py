"""Ranks that act together: each learns whether all of them got through."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn, Protocol, TypeVar

from gptscale.runtime.errors import PeerCrashedError, PeerFailedError, UserError

Result = TypeVar("Result")

NUMBER_BITS = 40
"""Width of a number that rank 0 tells the others: steps far beyond any run."""


class Communicator(Protocol):
    """What checkpoints need of a process group."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def agree(self, ok: bool) -> bool:
        """True, on every rank, if every rank says true. Nobody returns before everybody has called: a barrier."""
        ...


class Alone:
    """A communicator of one process."""

    rank = 0
    size = 1

    def agree(self, ok: bool) -> bool:
        return ok


def all_or_none(
    comm: Communicator, action: Callable[[], Result], undertaking: str, undo: Callable[[], None] | None = None
) -> Result:
    """Run `action` on this rank; if it raised on any rank, raise on all, as `stop_together` does.

    Once all ranks know of a failure, and so none of them is still at work, `undo` runs on each.
    """
    failure: Exception | None = None
    try:
        result = action()
    except Exception as error:
        failure = error
    if comm.agree(failure is None):
        return result
    if undo is not None:
        undo()
    stop_together(comm, failure, undertaking)


def stop_together(comm: Communicator, failure: Exception | None, undertaking: str) -> NoReturn:
    """Raise on every rank, once all know that one of them has a `failure`: its own error on a rank that has one.

    Where rank 0 has one of the user's mistakes to tell, it tells it for all, which mostly have the same. A rank that
    tells nothing raises PeerFailedError, or PeerCrashedError where any rank met a bug.
    """
    only_mistakes = comm.agree(failure is None or isinstance(failure, UserError))
    first_tells = not comm.agree(comm.rank != 0 or not isinstance(failure, UserError))
    if failure is not None and not (first_tells and comm.rank != 0 and isinstance(failure, UserError)):
        raise failure
    message = f"{undertaking} failed on another rank, which says why"
    raise PeerFailedError(message) if only_mistakes else PeerCrashedError(message)


def tell_number(comm: Communicator, number: int) -> int:
    """Rank 0's `number` on every rank, bit by bit through `agree`: the only thing asked of a process group."""
    if not 0 <= number < 1 << NUMBER_BITS:
        raise ValueError(f"{number} does not fit {NUMBER_BITS} bits")
    bits = (comm.agree(comm.rank != 0 or bool(number >> bit & 1)) for bit in range(NUMBER_BITS))
    return sum(1 << bit for bit, is_set in enumerate(bits) if is_set)
