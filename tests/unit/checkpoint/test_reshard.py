"""Whatever ranks wrote a state, whatever ranks read it: every value arrives, bit for bit."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptscale.checkpoint.read import open_checkpoint
from gptscale.checkpoint.restore import restore_newest
from gptscale.checkpoint.write import save_checkpoint
from tests.helpers.checkpoints import ThreadCommunicator, cut, on_ranks, random_state

SHAPES = st.dictionaries(
    st.sampled_from(["embedding.weight", "blocks.0.out.weight", "blocks.0.experts.up", "norm.weight", "scale", "é"]),
    st.lists(st.integers(1, 7), min_size=0, max_size=3).map(tuple),
    min_size=1,
)


@settings(max_examples=50, deadline=None)
@given(
    shapes=SHAPES,
    writers=st.integers(1, 7),
    readers=st.integers(1, 7),
    seed=st.integers(0, 2**32),
    chunk_bytes=st.sampled_from([4, 40, 256, 2**24]),
)
def test_any_partition_is_read_by_any_other(
    shapes: dict[str, tuple[int, ...]], writers: int, readers: int, seed: int, chunk_bytes: int
) -> None:
    state = random_state(shapes, seed)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        written, _ = cut(state, writers, seed)

        def save(comm: ThreadCommunicator) -> Path:
            return save_checkpoint(
                folder,
                7,
                written[comm.rank],
                state={"seed": seed},
                layout={"ranks": writers},
                comm=comm,
                keep=2,
                report=print,
                chunk_bytes=chunk_bytes,
            )

        assert on_ranks(writers, save) == [folder / "step-00000007"] * writers

        wanted, truths = cut(state, readers, seed + 1)
        for pieces in wanted:
            for piece in pieces:
                piece.values.fill_(float("nan"))
        loaded = on_ranks(readers, lambda comm: restore_newest(folder, wanted[comm.rank], comm, print))
        for checkpoint, pairs in zip(loaded, truths, strict=True):
            assert not isinstance(checkpoint, Exception), checkpoint
            assert checkpoint is not None
            assert checkpoint.state == {"seed": seed}
            assert checkpoint.shapes == shapes
            for found, truth in pairs:
                assert torch.equal(found, truth)

        checkpoint = open_checkpoint(folder / "step-00000007")
        checkpoint.verify()
        for (name, kind), whole in state.items():
            assert torch.equal(checkpoint.read_parameter(name, kind), whole)
