"""The folder of a run's checkpoints: their names, what a killed process leaves behind, and which are kept.

A hidden folder never counts as a checkpoint. `.writing-step-…` is a save under way; `.replaced-step-…` the old
checkpoint of a step while the new one takes its name; `.deleting-step-…` one that retention has let go.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from gptscale.runtime.files import fsync_folder

CHECKPOINTS = "checkpoints"
"""The folder within a run's own."""
MANIFEST = "manifest.json"
WRITING, REPLACED, DELETING = ".writing-", ".replaced-", ".deleting-"
_NAME = re.compile(r"step-(\d{8,})")


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Every checkpoint of a folder, the latest step first; whether one is valid is for `open_checkpoint` to say.

    The order comes from the names, not from file times, which clocks and copies change. A missing folder has none.
    """
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """Step of a checkpoint, from its folder's name."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path.name} is not the name of a checkpoint (step-00001000)")
    return int(match[1])


def tidy(folder: Path) -> None:
    """Undo what a process that died in a save or a deletion left; for the process that owns the run. Raises OSError."""
    if not folder.is_dir():
        return
    for leftover in sorted(folder.glob(f"{REPLACED}*")):
        final = folder / leftover.name.removeprefix(REPLACED)
        if final.exists():
            delete_checkpoint(leftover)
        else:
            os.rename(leftover, final)
            fsync_folder(folder)
    for prefix in (WRITING, DELETING):
        for leftover in sorted(folder.glob(f"{prefix}*")):
            delete_checkpoint(leftover)


def delete_checkpoint(path: Path) -> None:
    """Delete so that a kill at no moment leaves what looks like a checkpoint: first the name, then the manifest."""
    hidden = path.with_name(DELETING + path.name.removeprefix(WRITING).removeprefix(REPLACED).removeprefix(DELETING))
    if hidden != path:
        if hidden.exists():
            delete_checkpoint(hidden)
        os.rename(path, hidden)
        fsync_folder(path.parent)
    (hidden / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(hidden)


def publish(temporary: Path, final: Path) -> None:
    """Give a finished save its name, in place of an older checkpoint of the same step if there is one.

    Between the two renames of a replacement only the hidden old one exists; `tidy` gives it its name back.
    """
    if final.exists():
        os.rename(final, final.with_name(REPLACED + final.name))
    os.rename(temporary, final)
    fsync_folder(final.parent)


def retain(folder: Path, saved_step: int, keep: int, counts: Callable[[Path], bool]) -> None:
    """Keep the newest `keep` checkpoints up to the one just saved for which `counts` is true, and delete what is older.

    A checkpoint of a later step belongs to a future that this run has left: it went back to an older one, because the
    later was damaged or because it was told to. It goes too, or the next resume would jump to it. Raises OSError.
    """
    kept = 0
    for path in list_checkpoints(folder):
        if step_of(path) > saved_step or kept == keep:
            delete_checkpoint(path)
        elif counts(path):
            kept += 1
