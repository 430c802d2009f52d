from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gptscale.checkpoint.agreement import Alone
from gptscale.checkpoint.manifest import DamagedError
from gptscale.checkpoint.read import Checkpoint, open_checkpoint
from gptscale.checkpoint.write import save_checkpoint
from gptscale.flow import Piece, TensorShard
from gptscale.runtime.errors import UserError
from tests.helpers.checkpoints import State, random_state, whole_pieces

SHAPES = {"a": (100, 64), "b": (50,)}
CHUNK_BYTES = 4096
FILE = "rank-00000.safetensors"


def saved(folder: Path, state: State) -> Checkpoint:
    path = save_checkpoint(
        folder,
        1,
        whole_pieces(state),
        state={},
        layout={},
        comm=Alone(),
        keep=2,
        report=print,
        chunk_bytes=CHUNK_BYTES,
    )
    return open_checkpoint(path)


def flip(path: Path, position: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[position] ^= 1
    path.write_bytes(raw)


def read_bytes_so_far() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def test_a_range_reads_its_chunks_alone_and_each_once(tmp_path: Path) -> None:
    state = random_state(SHAPES, 0)
    checkpoint = saved(tmp_path, state)
    values = torch.empty(1000)
    overhead = -read_bytes_so_far() + read_bytes_so_far()
    before = read_bytes_so_far()
    checkpoint.fill([Piece("a", "weight", SHAPES["a"], 2000, values)])
    # 4000 bytes touch two chunks of 4096 at most.
    assert read_bytes_so_far() - before - overhead <= 2 * CHUNK_BYTES + 512
    assert torch.equal(values, state["a", "weight"].view(-1)[2000:3000])

    before = read_bytes_so_far()
    rows = [Piece("a", "weight", SHAPES["a"], start, torch.empty(64)) for start in range(0, 6400, 64)]
    checkpoint.fill(rows)
    assert read_bytes_so_far() - before - overhead <= 6400 * 4 + 2 * CHUNK_BYTES + 512


def test_damage_elsewhere_in_the_file_does_not_stop_a_fill(tmp_path: Path) -> None:
    state = random_state(SHAPES, 0)
    checkpoint = saved(tmp_path, state)
    flip(checkpoint.path / FILE, 3 * CHUNK_BYTES)
    values = torch.empty(100)
    checkpoint.fill([Piece("a", "weight", SHAPES["a"], 0, values)])
    assert torch.equal(values, state["a", "weight"].view(-1)[:100])
    with pytest.raises(DamagedError, match=r"rank-00000\.safetensors: bytes 12,288 to 16,384 do not match"):
        checkpoint.fill(whole_pieces(state))
    with pytest.raises(DamagedError, match=FILE):
        checkpoint.verify()


def test_verify_finds_damage_where_no_value_lies(tmp_path: Path) -> None:
    """A header that fills whole chunks is read by nobody but other programs; still it is under a checksum."""
    state = random_state({f"a{number:03d}": (2,) for number in range(100)}, 0)
    checkpoint = saved(tmp_path, state)
    flip(checkpoint.path / FILE, 100)
    checkpoint.fill(whole_pieces(state))
    with pytest.raises(DamagedError, match="bytes 0 to 4,096 do not match"):
        checkpoint.verify()


def test_a_band_that_misses_a_chunk_does_not_read_it(tmp_path: Path) -> None:
    # Rows of 16 KiB, four chunks each: the first columns lie in every fourth chunk.
    state = random_state({"wide": (3, 4096)}, 0, kinds=["weight"])
    checkpoint = saved(tmp_path, state)
    flip(checkpoint.path / FILE, 2 * CHUNK_BYTES)
    values = torch.empty(3 * 100)
    checkpoint.fill([Piece("wide", "weight", (3, 4096), 0, values, TensorShard(1, 0, 100))])
    assert torch.equal(values.view(3, 100), state["wide", "weight"][:, :100])


def test_a_piece_may_be_a_view_within_larger_storage(tmp_path: Path) -> None:
    state = random_state(SHAPES, 0)
    checkpoint = saved(tmp_path, state)
    flat = torch.full((7000,), -1.0, requires_grad=True)
    view = flat.data[300:6700]
    checkpoint.fill([Piece("a", "exp_avg", SHAPES["a"], 0, view, TensorShard(1, 0, 64))])
    assert torch.equal(flat[300:6700].view(100, 64), state["a", "exp_avg"])
    assert (flat[:300] == -1).all()
    assert (flat[6700:] == -1).all()


def test_files_hold_the_pieces_under_readable_keys(tmp_path: Path) -> None:
    state = random_state(SHAPES, 0)
    loaded = load_file(saved(tmp_path, state).path / FILE)
    assert loaded.keys() == {f"{name}:{kind}@0" for name, kind in state}
    assert torch.equal(loaded["b:exp_avg_sq@0"], state["b", "exp_avg_sq"])


def test_only_the_named_files_are_there(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, random_state(SHAPES, 0))
    assert sorted(path.name for path in checkpoint.path.iterdir()) == ["manifest.json", FILE]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


@pytest.mark.parametrize(
    ("shapes", "problem"),
    [
        ({**SHAPES, "c": (3,)}, r"is of another model: the checkpoint lacks it, where this model has c \[3\]"),
        ({**SHAPES, "b": (51,)}, r"is of another model: the checkpoint has \[50\], where this model has b \[51\]"),
    ],
)
def test_another_model_is_refused(tmp_path: Path, shapes: dict[str, tuple[int, ...]], problem: str) -> None:
    checkpoint = saved(tmp_path, random_state(SHAPES, 0))
    for refusal in (
        lambda: checkpoint.fill(whole_pieces(random_state(shapes, 1))),
        lambda: checkpoint.require_shapes(shapes),
    ):
        with pytest.raises(UserError, match=problem) as raised:
            refusal()
        assert not isinstance(raised.value, DamagedError)
        assert str(raised.value).count("\n") == 1


def test_a_parameter_that_nobody_asks_for_is_found_by_require_shapes(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, random_state(SHAPES, 0))
    with pytest.raises(UserError, match="this model has no b"):
        checkpoint.require_shapes({"a": SHAPES["a"]})
    checkpoint.require_shapes({name: list(shape) for name, shape in SHAPES.items()})


def test_moments_that_are_not_there_are_asked_for_in_vain(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, random_state(SHAPES, 0, kinds=["weight"]))
    with pytest.raises(UserError, match=r"holds no exp_avg of a, only weight\n.*cannot go on from it"):
        checkpoint.fill(whole_pieces(random_state(SHAPES, 0)))
    assert checkpoint.read_parameter("a").shape == (100, 64)


def test_read_parameter_names_what_is_not_there(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, random_state(SHAPES, 0))
    with pytest.raises(UserError, match="no parameter c"):
        checkpoint.read_parameter("c")


@pytest.mark.parametrize("change", ["truncate", "lengthen", "remove", "folder"])
def test_a_file_of_another_size_is_seen_before_anything_is_read(tmp_path: Path, change: str) -> None:
    path = saved(tmp_path, random_state(SHAPES, 0)).path
    file = path / FILE
    raw = file.read_bytes()
    file.unlink()
    if change == "truncate":
        file.write_bytes(raw[:-1])
    elif change == "lengthen":
        file.write_bytes(raw + b"\0")
    elif change == "folder":
        file.mkdir()
    with pytest.raises(DamagedError, match=FILE):
        open_checkpoint(path)


def test_a_file_that_shrinks_after_it_was_opened_is_damage(tmp_path: Path) -> None:
    state = random_state(SHAPES, 0)
    checkpoint = saved(tmp_path, state)
    with (checkpoint.path / FILE).open("r+b") as file:
        file.truncate(5000)
    with pytest.raises(DamagedError, match="ends at byte 5,000"):
        checkpoint.fill(whole_pieces(state))
