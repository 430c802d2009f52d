from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from gptscale.checkpoint.agreement import Alone, tell_number
from gptscale.checkpoint.folder import list_checkpoints
from gptscale.checkpoint.read import Checkpoint
from gptscale.checkpoint.restore import restore_from, restore_newest
from gptscale.checkpoint.write import save_checkpoint
from gptscale.runtime.errors import PeerCrashedError, PeerFailedError, UserError
from tests.helpers.checkpoints import ThreadCommunicator, cut, empty_state, on_ranks, random_state, whole_pieces

SHAPES = {"a": (60, 40), "b": (50,)}


def save(folder: Path, *steps: int, ranks: int = 1) -> None:
    for step in steps:
        pieces, _ = cut(random_state(SHAPES, step), ranks, step)

        def one(comm: ThreadCommunicator, step: int = step, pieces: list = pieces) -> Path:
            settings = {"state": {"step": step}, "layout": {}, "keep": 9, "report": pytest.fail}
            return save_checkpoint(folder, step, pieces[comm.rank], comm=comm, chunk_bytes=1024, **settings)

        assert all(isinstance(path, Path) for path in on_ranks(ranks, one))


def flip(path: Path, position: int = -1) -> None:
    raw = bytearray(path.read_bytes())
    raw[position] ^= 0x10
    path.write_bytes(raw)


def load(folder: Path, reports: list[str]) -> int | None:
    """Step of the newest valid checkpoint, once every value of it is known to be right."""
    state = empty_state(SHAPES)
    checkpoint = restore_newest(folder, whole_pieces(state), Alone(), reports.append)
    if checkpoint is None:
        return None
    for key, whole in random_state(SHAPES, checkpoint.step).items():
        assert torch.equal(state[key], whole)
    return checkpoint.step


def test_newest_is_by_step_not_by_file_time(tmp_path: Path) -> None:
    save(tmp_path, 9, 10, 100_000_000)
    for age, path in enumerate(list_checkpoints(tmp_path)):
        os.utime(path, (age * 1000, age * 1000))
    assert load(tmp_path, []) == 100_000_000


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert load(tmp_path, []) is None
    assert load(tmp_path / "missing", []) is None
    (tmp_path / "step-1").mkdir()
    (tmp_path / "step-00000001.txt").mkdir()
    (tmp_path / ".writing-step-00000001").mkdir()
    (tmp_path / "step-00000001").write_text("a file")
    assert load(tmp_path, []) is None


def test_a_damaged_one_is_named_and_the_next_older_taken(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3)
    flip(tmp_path / "step-00000003" / "rank-00000.safetensors")
    flip(tmp_path / "step-00000002" / "manifest.json")
    reports: list[str] = []
    assert load(tmp_path, reports) == 1
    assert len(reports) == 2
    assert "step-00000003/rank-00000.safetensors: bytes" in reports[0]
    assert "step-00000002/manifest.json: does not match its own checksum" in reports[1]
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000003", "step-00000002", "step-00000001"]


def test_only_damaged_ones_are_an_error_not_a_fresh_start(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    for path in list_checkpoints(tmp_path):
        (path / "manifest.json").unlink()
    reports: list[str] = []
    with pytest.raises(UserError, match="none of its 2 checkpoints is whole"):
        load(tmp_path, reports)
    assert len(reports) == 2


@pytest.mark.parametrize("damaged_rank", range(3))
def test_what_one_rank_finds_all_ranks_follow(tmp_path: Path, damaged_rank: int) -> None:
    save(tmp_path, 1, 2)
    # Each reader wants one third of `a`, and so other chunks of the file than its peers.
    target = tmp_path / "step-00000002" / "rank-00000.safetensors"
    wanted = []
    reports: list[list[str]] = [[], [], []]
    for rank in range(3):
        piece = whole_pieces(empty_state({"a": SHAPES["a"]}, ["weight"]))[0]
        wanted.append(
            [type(piece)("a", "weight", SHAPES["a"], rank * 800, piece.values[rank * 800 : rank * 800 + 800])]
        )
    whole = random_state(SHAPES, 2)["a", "weight"].view(-1)
    middle = whole[damaged_rank * 800 + 400 : damaged_rank * 800 + 402].numpy().tobytes()
    flip(target, target.read_bytes().index(middle))
    loaded = on_ranks(3, lambda comm: restore_newest(tmp_path, wanted[comm.rank], comm, reports[comm.rank].append))
    for rank, checkpoint in enumerate(loaded):
        assert isinstance(checkpoint, Checkpoint)
        assert checkpoint.step == 1
        assert torch.equal(
            wanted[rank][0].values, random_state(SHAPES, 1)["a", "weight"].view(-1)[rank * 800 : rank * 800 + 800]
        )
    assert [len(texts) for texts in reports] == [int(rank == damaged_rank) for rank in range(3)]


def test_damage_that_all_see_is_reported_once(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    (tmp_path / "step-00000002" / "manifest.json").unlink()
    reports: list[str] = []
    wanted = [whole_pieces(empty_state(SHAPES)) for _ in range(3)]
    on_ranks(3, lambda comm: restore_newest(tmp_path, wanted[comm.rank], comm, reports.append))
    assert len(reports) == 1


def test_ranks_that_see_another_folder_state_take_what_all_of_them_see(tmp_path: Path) -> None:
    # As over a network file system whose listing is late on one host.
    views = [tmp_path / "fresh", tmp_path / "late"]
    save(views[0], 1, 2)
    save(views[1], 1)
    wanted = [whole_pieces(empty_state(SHAPES)) for _ in views]
    loaded = on_ranks(2, lambda comm: restore_newest(views[comm.rank], wanted[comm.rank], comm, lambda _: None))
    assert [checkpoint.step for checkpoint in loaded if isinstance(checkpoint, Checkpoint)] == [1, 1]


def test_another_model_on_one_rank_stops_all(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    wanted = [whole_pieces(empty_state(shapes)) for shapes in (SHAPES, {"a": (60, 41)})]
    outcomes = on_ranks(2, lambda comm: restore_newest(tmp_path, wanted[comm.rank], comm, pytest.fail))
    assert isinstance(outcomes[0], PeerFailedError)
    assert isinstance(outcomes[1], UserError)
    assert "another model" in str(outcomes[1])


def test_that_none_is_whole_is_told_once(tmp_path: Path) -> None:
    save(tmp_path, 1)
    flip(tmp_path / "step-00000001" / "rank-00000.safetensors")
    wanted = [whole_pieces(empty_state(SHAPES)) for _ in range(2)]
    outcomes = on_ranks(2, lambda comm: restore_newest(tmp_path, wanted[comm.rank], comm, lambda _: None))
    assert [type(outcome) for outcome in outcomes] == [UserError, PeerFailedError]
    assert "none of its 1 checkpoints is whole" in str(outcomes[0])


def test_a_bug_on_one_rank_is_no_mistake_of_the_users_on_the_others(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)

    def check(comm: ThreadCommunicator) -> None:
        if comm.rank == 1:
            raise ZeroDivisionError

    outcomes = on_ranks(
        2,
        lambda comm: restore_newest(
            tmp_path, whole_pieces(empty_state(SHAPES)), comm, pytest.fail, lambda _: check(comm)
        ),
    )
    assert [type(outcome) for outcome in outcomes] == [PeerCrashedError, ZeroDivisionError]


def test_a_check_refuses_before_anything_is_copied(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    state = empty_state(SHAPES)

    def check(checkpoint: Checkpoint) -> None:
        raise UserError(f"step {checkpoint.step} has another configuration")

    with pytest.raises(UserError, match="step 2 has another configuration"):
        restore_newest(tmp_path, whole_pieces(state), Alone(), pytest.fail, check)
    assert all(whole.isnan().all() for whole in state.values())


def test_the_checkpoint_that_was_asked_for_is_taken_or_nothing(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    state = empty_state(SHAPES)
    assert restore_from(tmp_path / "step-00000001", whole_pieces(state), Alone(), pytest.fail).step == 1
    assert torch.equal(state["b", "weight"], random_state(SHAPES, 1)["b", "weight"])
    flip(tmp_path / "step-00000002" / "rank-00000.safetensors")
    with pytest.raises(UserError, match="step-00000002: is damaged"):
        restore_from(tmp_path / "step-00000002", whole_pieces(state), Alone(), lambda _: None)


@pytest.mark.parametrize("number", [0, 1, 123_456_789, 2**40 - 1])
def test_rank_0_tells_a_number(number: int) -> None:
    assert on_ranks(3, lambda comm: tell_number(comm, number if comm.rank == 0 else 77)) == [number] * 3
