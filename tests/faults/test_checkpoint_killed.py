"""A save may die at any system call: afterwards a checkpoint always loads, and it is exactly the old or the new state.

Processes really die of SIGKILL, before the call or, for a write, half way through it (`tests/helpers/syscall_faults`).
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gptscale.checkpoint.agreement import Alone
from gptscale.checkpoint.folder import list_checkpoints
from gptscale.checkpoint.read import open_checkpoint
from gptscale.checkpoint.restore import restore_newest
from tests.helpers.checkpoints import empty_state, random_state, whole_pieces
from tests.helpers.syscall_faults import KILL, KILL_HALFWAY, SHAPES, FaultyRanks, Order, turning_points


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyRanks]:
    with FaultyRanks(tmp_path_factory.mktemp("server")) as ranks:
        yield ranks


def restored_attempt(folder: Path) -> int | None:
    """Which save's state a restart finds, once every value is known to be that save's and nothing was damaged."""
    state = empty_state(SHAPES)
    checkpoint = restore_newest(folder, whole_pieces(state), Alone(), pytest.fail)
    if checkpoint is None:
        return None
    attempt = checkpoint.state["attempt"]
    for key, whole in random_state(SHAPES, attempt).items():
        assert torch.equal(state[key], whole)
    # Whatever is listed is whole, not just what was loaded; and the restart has cleared the leftovers.
    for path in list_checkpoints(folder):
        open_checkpoint(path).verify()
    assert not list(folder.glob(".*"))
    return int(attempt)


@pytest.mark.parametrize(
    ("ranks", "victim", "steps"),
    [
        pytest.param(1, 0, [10, 20, 30], id="retention"),
        pytest.param(2, 0, [10, 20], id="rank 0 of 2"),
        pytest.param(2, 1, [10, 20], id="rank 1 of 2"),
        pytest.param(1, 0, [10, 10], id="replacing the only one"),
        pytest.param(1, 0, [10], id="the first of all"),
        pytest.param(1, 0, [10, 30, 20], id="back to an older one"),
    ],
)
def test_killed_at_every_call(faulty: FaultyRanks, tmp_path: Path, ranks: int, victim: int, steps: list[int]) -> None:
    """The last step of `steps` is saved again and again, killed at every call in turn."""
    base, folder = tmp_path / "base", tmp_path / "checkpoints"
    base.mkdir()
    last = len(steps) - 1
    for attempt, step in enumerate(steps[:-1]):
        outcomes = faulty.save(Order(str(base), step, attempt, ranks))
        assert [outcome.ended for outcome in outcomes] == ["saved"] * ranks
    shutil.copytree(base, folder)
    # A save that is left alone, to count its calls.
    calls = faulty.save(Order(str(folder), steps[-1], last, ranks))[victim].calls
    assert restored_attempt(folder) == last

    found = []
    for at in turning_points(calls):
        call = calls[at]
        for mode in (KILL, KILL_HALFWAY) if call.startswith("write") else (KILL,):
            shutil.rmtree(folder)
            shutil.copytree(base, folder)
            outcomes = faulty.save(Order(str(folder), steps[-1], last, ranks, victim=victim, at=at, mode=mode))
            assert outcomes[victim].ended == "killed"
            attempt = restored_attempt(folder)
            old = last - 1 if last else None
            assert attempt in (old, last), f"killed at {call}"
            if any(outcome.ended == "saved" for outcome in outcomes):
                assert attempt == last
            found.append(attempt)
    # Once the new one counts it stays: the moment of publication is one call.
    assert found == sorted(found, key=lambda attempt: attempt == last)
    assert last not in found[:1]
    if victim == 0:
        assert found[-1] == last


def test_a_run_killed_again_and_again_never_loses_ground(faulty: FaultyRanks, tmp_path: Path) -> None:
    """Saves killed one after the other, each starting amid what the last has left, now and then at the same step."""
    draw = random.Random(0)
    for chain in range(12):
        folder = tmp_path / str(chain)
        step, known = 0, None
        for attempt in range(6):
            step += draw.choice([0, 1, 1])
            ranks = draw.choice([1, 2])
            order = Order(
                str(folder), step, attempt, ranks, victim=draw.randrange(ranks), at=draw.randrange(45), mode=KILL
            )
            outcomes = faulty.save(order)
            # Half of the restarts look before they save, and so clear up; the others save straight into the leftovers.
            if draw.random() < 0.5 or attempt == 5:
                found = restored_attempt(folder)
                assert (known is None) or (found is not None and found >= known)
                if all(outcome.ended == "saved" for outcome in outcomes):
                    assert found == attempt
                known = found
            elif any(outcome.ended == "saved" for outcome in outcomes):
                known = attempt


def test_bytes_reach_the_disk_before_the_names_that_vouch_for_them(faulty: FaultyRanks, tmp_path: Path) -> None:
    """The order of fsync and rename, which is all that a test can see of a power cut."""
    folder = tmp_path / "checkpoints"
    outcomes = faulty.save(Order(str(folder), 10, 0, ranks=2))
    writing = f"{folder}/.writing-step-00000010"
    for rank, outcome in enumerate(outcomes):
        file = f"{writing}/rank-{rank:05d}.safetensors"
        written = [index for index, call in enumerate(outcome.calls) if call == f"write {file}"]
        assert written
        assert outcome.calls.index(f"fsync {file}") > max(written)
    calls = outcomes[0].calls
    named = calls.index(f"rename {writing}/manifest.json")
    assert calls[named - 1].startswith(f"fsync {writing}/.manifest.json")
    assert calls[named + 1 : named + 4] == [
        f"fsync {writing}",
        f"rename {folder}/step-00000010",
        f"fsync {folder}",
    ]
