from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gptscale.checkpoint.agreement import Alone
from gptscale.checkpoint.folder import list_checkpoints, step_of
from gptscale.checkpoint.read import open_checkpoint
from gptscale.checkpoint.write import save_checkpoint
from gptscale.flow import Piece
from gptscale.runtime.errors import PeerCrashedError, UserError
from tests.helpers.checkpoints import ThreadCommunicator, cut, on_ranks, random_state, whole_pieces

SHAPES = {"a": (6, 4), "b": (5,)}


def save(folder: Path, step: int, seed: int = 0, keep: int = 3, **changes: Any) -> Path:
    settings = {"state": {"seed": seed}, "layout": {}, "comm": Alone(), "report": pytest.fail, "keep": keep}
    return save_checkpoint(folder, step, whole_pieces(random_state(SHAPES, seed)), **{**settings, **changes})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def save_on_ranks(folder: Path, pieces: list[list[Piece]]) -> list[Path | Exception]:
    def one(comm: ThreadCommunicator) -> Path:
        return save_checkpoint(folder, 1, pieces[comm.rank], state={}, layout={}, comm=comm, keep=2, report=pytest.fail)

    return on_ranks(len(pieces), one)


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (10, 200, 30_000_000, 123_456_789):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step-123456789", "step-30000000"]
    assert [step_of(path) for path in list_checkpoints(tmp_path)] == [123_456_789, 30_000_000]


def test_keep_below_two_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep=1"):
        save(tmp_path, 1, keep=1)


def test_a_damaged_one_does_not_count_among_those_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    (tmp_path / "step-00000003" / "manifest.json").write_text("{}")
    save(tmp_path, 4, keep=2)
    assert names(tmp_path) == ["step-00000002", "step-00000003", "step-00000004"]


def test_going_back_ends_the_future_that_was(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        save(tmp_path, step, seed=step, keep=5)
    save(tmp_path, 20, seed=999, keep=5)
    assert names(tmp_path) == ["step-00000010", "step-00000020"]
    assert open_checkpoint(tmp_path / "step-00000020").state == {"seed": 999}


def test_what_killed_saves_left_is_cleared(tmp_path: Path) -> None:
    save(tmp_path, 1, seed=1)
    for leftover in (".writing-step-00000002", ".deleting-step-00000000", ".replaced-step-00000001"):
        (tmp_path / leftover / "inner").mkdir(parents=True)
        (tmp_path / leftover / "manifest.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("mine")
    save(tmp_path, 2, seed=2)
    assert names(tmp_path) == ["notes.txt", "step-00000001", "step-00000002"]
    assert open_checkpoint(tmp_path / "step-00000001").state == {"seed": 1}


def test_the_state_is_untouched_by_a_save(tmp_path: Path) -> None:
    state = random_state(SHAPES, 0)
    save_checkpoint(tmp_path, 1, whole_pieces(state), state={}, layout={}, comm=Alone(), keep=2, report=pytest.fail)
    for key, whole in random_state(SHAPES, 0).items():
        assert torch.equal(state[key], whole)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_gap_is_a_bug_that_every_rank_learns_of(tmp_path: Path, ranks: int) -> None:
    pieces, _ = cut(random_state(SHAPES, 0), ranks, 1)
    holder = next(rank for rank in range(ranks) if any(piece.writes for piece in pieces[rank]))
    index = next(index for index, piece in enumerate(pieces[holder]) if piece.writes)
    lost = pieces[holder][index]
    pieces[holder][index] = replace(lost, writes=False)
    (tmp_path / "step-00000000").mkdir()
    outcomes = save_on_ranks(tmp_path, pieces)
    assert isinstance(outcomes[0], AssertionError)
    assert f"{lost.kind} of {lost.parameter}" in str(outcomes[0])
    assert "is missing" in str(outcomes[0])
    assert all(isinstance(outcome, PeerCrashedError) for outcome in outcomes[1:])
    assert names(tmp_path) == ["step-00000000"]


def test_an_overlap_is_a_bug(tmp_path: Path) -> None:
    whole = whole_pieces(random_state(SHAPES, 0))
    outcomes = save_on_ranks(tmp_path, [whole, [replace(whole[0], start=3, values=whole[0].values[3:5])]])
    assert isinstance(outcomes[0], AssertionError)
    assert "weight of a: elements of the parameter: [3, 5) is there twice" in str(outcomes[0])
    assert names(tmp_path) == []


def test_ranks_that_disagree_about_a_shape_are_a_bug(tmp_path: Path) -> None:
    whole = whole_pieces(random_state(SHAPES, 0))
    outcomes = save_on_ranks(tmp_path, [whole, [replace(whole[0], shape=(4, 6), writes=False)]])
    assert isinstance(outcomes[0], AssertionError)
    assert "rank 1 holds a with shape (4, 6)" in str(outcomes[0])


def test_a_rank_without_anything_to_write_makes_no_file(tmp_path: Path) -> None:
    whole = whole_pieces(random_state(SHAPES, 0))
    outcomes = save_on_ranks(tmp_path, [[replace(piece, writes=False) for piece in whole], whole, []])
    assert outcomes == [tmp_path / "step-00000001"] * 3
    assert names(tmp_path / "step-00000001") == ["manifest.json", "rank-00001.safetensors"]
    open_checkpoint(tmp_path / "step-00000001").verify()


def test_a_folder_that_is_a_file_is_the_users_error_on_two_lines(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(UserError, match="step-00000001 was not saved") as raised:
        save(tmp_path / "checkpoints", 1)
    assert str(raised.value).count("\n") == 1
