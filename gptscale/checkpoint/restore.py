"""Go on from a checkpoint: the newest that is valid on every rank, or the one that was asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from gptscale.checkpoint.agreement import Communicator, stop_together, tell_number
from gptscale.checkpoint.folder import checkpoint_name, list_checkpoints, step_of, tidy
from gptscale.checkpoint.manifest import DamagedError
from gptscale.checkpoint.read import Checkpoint, open_checkpoint
from gptscale.flow import Piece
from gptscale.runtime.errors import UserError


def restore_newest(
    folder: Path,
    pieces: Sequence[Piece],
    comm: Communicator,
    report: Callable[[str], None],
    check: Callable[[Checkpoint], None] | None = None,
) -> Checkpoint | None:
    """Fill every rank's pieces from the newest checkpoint that is valid on all; None if the folder has no checkpoint.

    A collective, for the process group that owns the run: it first clears away what a killed save left. If any rank
    finds damage, the file and what is wrong with it are reported (by rank 0 if it sees it too), and all ranks take the
    next older checkpoint. `check` sees a checkpoint on every rank before anything is copied, and refuses it by raising
    UserError (another configuration, say).

    Raises UserError if there are checkpoints but all are damaged, or one is of another model: on a rank that
    knows why, with the reason, on the others PeerFailedError.
    """
    if comm.rank == 0:
        try:
            tidy(folder)
        except OSError as error:
            report(f"could not clear what an interrupted save left in {folder}: {error}; the next save tries again")
    # One listing for all: on a shared file system another rank may see a newer or an older state of the folder.
    steps = [step_of(path) for path in list_checkpoints(folder)] if comm.rank == 0 else []
    damaged = 0
    while True:
        step = tell_number(comm, steps[damaged] + 1 if damaged < len(steps) else 0) - 1
        if step < 0:
            break
        checkpoint = _attempt(folder / checkpoint_name(step), pieces, comm, report, check)
        if checkpoint is not None:
            return checkpoint
        damaged += 1
    if damaged:
        refused = UserError(
            f"{folder}: none of its {damaged} checkpoints is whole, see the messages above\n"
            "restore one from a copy, or give the run another run.name to start afresh"
        )
        stop_together(comm, refused, f"going on with {folder}")
    return None


def restore_from(
    path: Path,
    pieces: Sequence[Piece],
    comm: Communicator,
    report: Callable[[str], None],
    check: Callable[[Checkpoint], None] | None = None,
) -> Checkpoint:
    """Fill every rank's pieces from this checkpoint, like `restore_newest`, but raise UserError if it is damaged."""
    checkpoint = _attempt(path, pieces, comm, report, check)
    if checkpoint is None:
        refused = UserError(
            f"{path}: is damaged, see the message above\nname another checkpoint or use run.resume=auto"
        )
        stop_together(comm, refused, f"loading {path}")
    return checkpoint


def _attempt(
    path: Path,
    pieces: Sequence[Piece],
    comm: Communicator,
    report: Callable[[str], None],
    check: Callable[[Checkpoint], None] | None,
) -> Checkpoint | None:
    """Load on this rank, or None on every rank if any found damage; any other failure on any rank raises on all."""
    damage: DamagedError | None = None
    failure: Exception | None = None
    try:
        checkpoint = open_checkpoint(path)
        if check is not None:
            check(checkpoint)
        checkpoint.fill(pieces)
    except DamagedError as error:
        damage = error
    except Exception as error:
        failure = error
    if not comm.agree(failure is None):
        stop_together(comm, failure, f"loading {path}")
    if comm.agree(damage is None):
        return checkpoint
    first_rank_is_whole = comm.agree(comm.rank != 0 or damage is None)
    if damage is not None and (comm.rank == 0 or first_rank_is_whole):
        report(f"damaged checkpoint: {damage.path}: {damage.problem}")
    return None
