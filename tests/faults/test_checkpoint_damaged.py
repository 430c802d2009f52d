"""One flipped bit, a cut or a missing file, wherever it is: the damage is found and named, and the older one taken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gptscale.checkpoint.agreement import Alone
from gptscale.checkpoint.restore import restore_newest
from gptscale.checkpoint.write import save_checkpoint
from tests.helpers.checkpoints import cut, empty_state, on_ranks, random_state, whole_pieces

SHAPES = {"embedding.weight": (64, 16), "blocks.0.out.weight": (6, 8), "norm.weight": (6,)}
RANKS = 2


@pytest.fixture
def newest(tmp_path: Path) -> Path:
    """The newer of two checkpoints of two ranks, in chunks of 4 kB."""
    for step in (1, 2):
        pieces, _ = cut(random_state(SHAPES, step), RANKS, step)

        def save(comm, step=step, pieces=pieces):  # type: ignore[no-untyped-def]
            return save_checkpoint(
                tmp_path,
                step,
                pieces[comm.rank],
                state={"step": step},
                layout={},
                comm=comm,
                keep=2,
                report=pytest.fail,
                chunk_bytes=4096,
            )

        assert on_ranks(RANKS, save) == [tmp_path / f"step-0000000{step}"] * RANKS
    return tmp_path / "step-00000002"


def restored(folder: Path) -> tuple[int, list[str]]:
    """Step that a restart takes, whose every value is checked, and what it reports."""
    reports: list[str] = []
    state = empty_state(SHAPES)
    checkpoint = restore_newest(folder, whole_pieces(state), Alone(), reports.append)
    assert checkpoint is not None
    assert checkpoint.state == {"step": checkpoint.step}
    for key, whole in random_state(SHAPES, checkpoint.step).items():
        assert torch.equal(state[key], whole)
    return checkpoint.step, reports


def test_undamaged_the_newest_is_taken(newest: Path) -> None:
    assert restored(newest.parent) == (2, [])


@pytest.mark.parametrize("name", ["rank-00000.safetensors", "rank-00001.safetensors", "manifest.json"])
def test_a_flipped_bit_in_any_part_is_found(newest: Path, name: str) -> None:
    """Bytes all over: length, header, padding and values of the files, every part of the manifest."""
    intact = (newest / name).read_bytes()
    for position in [*range(16), *range(16, len(intact), len(intact) // 150), len(intact) - 1]:
        damaged = bytearray(intact)
        damaged[position] ^= 1 << position % 8
        (newest / name).write_bytes(damaged)
        step, reports = restored(newest.parent)
        assert step == 1, f"bit {position % 8} of byte {position} went unnoticed"
        assert len(reports) == 1
        assert f"step-00000002/{name}: " in reports[0]
    (newest / name).write_bytes(intact)
    assert restored(newest.parent) == (2, [])


@pytest.mark.parametrize("name", ["rank-00000.safetensors", "rank-00001.safetensors", "manifest.json"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
        lambda path: path.write_bytes(path.read_bytes() + b"\n"),
        lambda path: path.write_bytes(bytes(path.stat().st_size)),
        lambda path: (path.unlink(), path.mkdir()),
        lambda path: (path.unlink(), path.symlink_to("nowhere")),
    ],
    ids=["missing", "empty", "one byte short", "half", "one byte long", "zeros", "a folder", "dangling link"],
)
def test_a_cut_or_missing_file_is_found(newest: Path, name: str, damage: Callable[[Path], object]) -> None:
    damage(newest / name)
    step, reports = restored(newest.parent)
    assert step == 1
    assert len(reports) == 1
    assert f"step-00000002/{name}: " in reports[0]


def test_a_file_of_the_other_checkpoint_is_found(newest: Path) -> None:
    """Same size, intact in itself, but not the one that the manifest vouches for."""
    name = "rank-00000.safetensors"
    older = newest.parent / "step-00000001" / name
    size = max((newest / name).stat().st_size, older.stat().st_size)
    (newest / name).write_bytes(older.read_bytes().ljust(size)[: (newest / name).stat().st_size])
    step, reports = restored(newest.parent)
    assert (step, len(reports)) == (1, 1)
