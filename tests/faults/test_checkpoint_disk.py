"""A disk that is full, fails or is read-only: a save fails on every rank, says why, and leaves things as they were."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gptscale.checkpoint.agreement import Alone
from gptscale.checkpoint.folder import list_checkpoints
from gptscale.checkpoint.restore import restore_newest
from tests.helpers.checkpoints import empty_state, random_state, whole_pieces
from tests.helpers.syscall_faults import FAIL, FAIL_FROM, SHAPES, FaultyRanks, Order, turning_points


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyRanks]:
    with FaultyRanks(tmp_path_factory.mktemp("server")) as ranks:
        yield ranks


def restored_attempt(folder: Path) -> int:
    state = empty_state(SHAPES)
    checkpoint = restore_newest(folder, whole_pieces(state), Alone(), pytest.fail)
    assert checkpoint is not None
    for key, whole in random_state(SHAPES, checkpoint.state["attempt"]).items():
        assert torch.equal(state[key], whole)
    return int(checkpoint.state["attempt"])


@pytest.mark.parametrize(
    ("ranks", "victim", "error"),
    [
        pytest.param(1, 0, errno.EIO, id="alone, EIO"),
        pytest.param(1, 0, errno.ENOSPC, id="alone, ENOSPC"),
        pytest.param(2, 0, errno.EIO, id="rank 0 of 2, EIO"),
        pytest.param(2, 1, errno.ENOSPC, id="rank 1 of 2, ENOSPC"),
    ],
)
def test_any_call_may_fail(faulty: FaultyRanks, tmp_path: Path, ranks: int, victim: int, error: int) -> None:
    base, folder = tmp_path / "base", tmp_path / "checkpoints"
    for attempt in (0, 1):
        faulty.save(Order(str(base), attempt, attempt))
    shutil.copytree(base, folder)
    calls = faulty.save(Order(str(folder), 2, 2, ranks))[victim].calls
    published = next((index for index, call in enumerate(calls) if call == f"fsync {folder}"), len(calls))
    # The first call makes sure of the folder, which is there: nobody minds its failure.
    for at in turning_points(calls):
        call = calls[at]
        if call == f"mkdir {folder}":
            continue
        shutil.rmtree(folder)
        shutil.copytree(base, folder)
        outcomes = faulty.save(Order(str(folder), 2, 2, ranks, victim=victim, at=at, mode=FAIL, error=error))
        ended = [outcome.ended for outcome in outcomes]
        if at > published:
            # The save stands; what was not deleted is said, and hidden or still whole.
            assert ended == ["saved"] * ranks
            assert len(outcomes[0].reports) == 1, call
            assert "could not delete old checkpoints" in outcomes[0].reports[0]
            assert restored_attempt(folder) == 2
            continue
        assert ended == ["UserError" if rank == victim else "PeerFailedError" for rank in range(ranks)], call
        assert [outcome.message.count("\n") for outcome in outcomes] == [int(rank == victim) for rank in range(ranks)]
        assert "step-00000002" in outcomes[victim].message
        # No half of a save is left. Only the last fsync, of the folder itself, fails with everything in place.
        assert not list(folder.glob(".*")), call
        assert restored_attempt(folder) == (2 if at == published else 1)
        assert len(list_checkpoints(folder)) == (3 if at == published else 2)
        if error == errno.EIO and ranks == 1:
            (outcome,) = faulty.save(Order(str(folder), 3, 3))
            assert outcome.ended == "saved"
            assert restored_attempt(folder) == 3


def test_a_disk_that_fails_for_good_leaves_the_old_ones(faulty: FaultyRanks, tmp_path: Path) -> None:
    """From some call on, every call fails, those of the clean-up too; later the disk is back."""
    base, folder = tmp_path / "base", tmp_path / "checkpoints"
    for attempt in (0, 1):
        faulty.save(Order(str(base), attempt, attempt))
    shutil.copytree(base, folder)
    for at in turning_points(faulty.save(Order(str(folder), 2, 2))[0].calls):
        shutil.rmtree(folder)
        shutil.copytree(base, folder)
        (outcome,) = faulty.save(Order(str(folder), 2, 2, at=at, mode=FAIL_FROM, error=errno.EIO))
        assert outcome.ended in ("saved", "UserError")
        assert restored_attempt(folder) == 2 if outcome.ended == "saved" else restored_attempt(folder) in (1, 2)


FULL = """
import sys
from pathlib import Path
from gptscale.checkpoint.agreement import Alone
from gptscale.checkpoint.read import open_checkpoint
from gptscale.checkpoint.write import save_checkpoint
from gptscale.runtime.errors import UserError
from tests.helpers.checkpoints import random_state, whole_pieces

folder = Path(sys.argv[1]) / "checkpoints"
small, large = (whole_pieces(random_state({"a": (size,)}, 0)) for size in (100_000, 1_000_000))
save = lambda step, pieces: save_checkpoint(
    folder, step, pieces, state={}, layout={}, comm=Alone(), keep=2, report=print)
save(1, small)
for _ in range(3):
    try:
        save(2, large)
    except UserError as error:
        print(error)
    assert [path.name for path in folder.iterdir()] == ["step-00000001"]
    open_checkpoint(folder / "step-00000001").verify()
save(3, small)
"""


def test_a_full_disk_is_named_with_the_bytes_it_lacks(tmp_path: Path) -> None:
    """On a real file system of 8 MB. Needs the right to mount: root's, or a user namespace."""
    unshare = ["unshare", "--mount", *([] if os.getuid() == 0 else ["--map-root-user"])]
    if subprocess.run([*unshare, "mount", "-t", "tmpfs", "none", tmp_path], capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    script = f"mount -t tmpfs -o size=8m none {tmp_path} && exec {sys.executable} -c '{FULL}' {tmp_path}"
    done = subprocess.run([*unshare, "sh", "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 6
    named = re.fullmatch(
        rf"{tmp_path}/checkpoints/step-00000002 was not saved: No space left on device; "
        r"this rank's part needs ([\d,]+) bytes, ([\d,]+) are free",
        lines[0],
    )
    assert named is not None, lines[0]
    needed_bytes, free_bytes = (int(number.replace(",", "")) for number in named.groups())
    assert 12_000_000 < needed_bytes < 12_001_000
    assert 7_000_000 < free_bytes < 8 * 2**20 - 1_200_000
    assert lines[1].startswith("free some space or lower checkpoint.keep")


def test_a_folder_on_a_read_only_disk_is_named(tmp_path: Path) -> None:
    unshare = ["unshare", "--mount", *([] if os.getuid() == 0 else ["--map-root-user"])]
    if subprocess.run([*unshare, "mount", "-t", "tmpfs", "none", tmp_path], capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    python = FULL.split("save(1, small)")[0] + "save(1, small)"
    script = f"mount -t tmpfs -o ro none {tmp_path} && exec {sys.executable} -c '{python}' {tmp_path}"
    done = subprocess.run([*unshare, "sh", "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "UserError" in done.stderr
    assert f"{tmp_path}/checkpoints cannot be written (Read-only file system)\nmake it writable" in done.stderr
