"""Rows as batches: packed or cut, with and without loss at the boundaries of documents."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from gptscale.config.schema import CorpusConfig
from gptscale.config.step_plan import StepPlan
from gptscale.data.corpus import open_split
from gptscale.data.heldout import HeldoutBatches
from gptscale.data.packed_rows import packed_row_reader
from gptscale.data.packing import ALGORITHM, ensure_packed
from gptscale.data.stream import StepFeed, TrainingStream
from gptscale.flow import IGNORED_TARGET
from gptscale.tokenizer import Tokenizer
from gptscale.topology import split_batch
from tests.helpers.batches import wide

LENGTH = 32


def stored(folder: Path) -> list[list[int]]:
    """The documents of the training split, with the token that closes each."""
    found = []
    for path in sorted((folder / "train").glob("*.tok.npy")):
        tokens = np.load(path).tolist()
        ends = np.load(str(path).replace(".tok.", ".end.")).tolist()
        found += [tokens[start:end] for start, end in pairwise([0, *ends])]
    return found


def stream_of(folder: Path, **more: bool) -> TrainingStream:
    return TrainingStream((CorpusConfig(str(folder)),), LENGTH, 0, **more)  # type: ignore[arg-type]


def test_an_epoch_of_packed_rows_predicts_every_token_of_every_document_once(prepared: Path) -> None:
    """But its first one, and each from the token before it, which is in sight with a document mask."""
    stream = stream_of(prepared, packed=True, document_mask=True)
    wanted = sorted(pair for document in stored(prepared) for pair in pairwise(document))
    found, inside = [], 0
    for first in range(0, stream.samples_per_epoch, 64):
        rows = stream.read(np.arange(first, min(first + 64, stream.samples_per_epoch)))
        batch = wide(*stream.batches.make(rows, LENGTH, [len(rows.tokens)]))
        assert batch.starts_BT is not None
        carries = batch.targets_BT != IGNORED_TARGET
        assert batch.loss_tokens == int(carries.sum())
        closing = (batch.inputs_BT == stream.end_of_text) & carries
        within = carries & ~closing
        found += zip(batch.inputs_BT[within].tolist(), batch.targets_BT[within].tolist(), strict=True)
        begins = batch.starts_BT == np.arange(LENGTH)
        inside += int(begins[:, 1:].sum())
        # A target is in its input's own piece, or the first of the next piece, which a closed document comes before.
        next_begins = begins[:, 1:]
        assert not (next_begins & carries[:, :-1] & ~closing[:, :-1]).any()
    assert sorted(found) == wanted
    assert inside > 100, "rows hold several pieces"


def test_packed_rows_fill_up_with_what_is_no_target(prepared: Path) -> None:
    corpus = open_split(prepared, "train")
    reader = packed_row_reader(corpus, LENGTH)
    assert reader.count == ensure_packed(corpus, LENGTH).rows
    rows = reader.rows(np.arange(reader.count))
    assert rows.used is not None
    short = np.flatnonzero(rows.used < LENGTH + 1)
    assert 0 < len(short) < reader.count / 4
    for row in short.tolist():
        assert set(rows.tokens[row, rows.used[row] :].tolist()) == {corpus.manifest.end_of_text}
    stream = stream_of(prepared, packed=True)
    batch = wide(*stream.batches.make(rows, LENGTH, [len(rows.tokens)]))
    for row in short.tolist():
        assert set(batch.targets_BT[row, rows.used[row] - 1 :].tolist()) <= {IGNORED_TARGET}
    assert batch.starts_BT is None


@pytest.mark.parametrize("packed", [False, True])
def test_without_boundary_loss_nothing_is_predicted_from_the_end_of_a_document(prepared: Path, packed: bool) -> None:
    plan, split = StepPlan(8, LENGTH, length_from=8, length_samples=40), split_batch(8, 4, 1)
    with_it, without = (stream_of(prepared, packed=packed, boundary_loss=loss) for loss in (True, False))
    assert with_it.identity == without.identity
    differing = 0
    with StepFeed(with_it, plan, split, 0, 0) as one, StepFeed(without, plan, split, 0, 0) as other:
        for _ in range(12):
            a, b = next(one), next(other)
            assert a.sample_hash == b.sample_hash
            for left, right in zip(map(wide, a.microbatches), map(wide, b.microbatches), strict=True):
                ends = left.inputs_BT == with_it.end_of_text
                expected = left.targets_BT.masked_fill(ends, IGNORED_TARGET)
                assert right.targets_BT.equal(expected)
                assert right.loss_tokens == int((expected != IGNORED_TARGET).sum())
                differing += int(ends.sum())
    assert differing > 5


def test_cut_rows_are_what_they_were(prepared: Path) -> None:
    (batch,) = stream_of(prepared).batches.make(stream_of(prepared).read(np.arange(16)), LENGTH, [16])
    rows = stream_of(prepared).rows(np.arange(16))
    assert batch.tokens_BT1.dtype == torch.uint16, "a quarter of the bytes to the device"
    assert wide(batch).inputs_BT.dtype == wide(batch).targets_BT.dtype == torch.int64
    assert np.array_equal(wide(batch).inputs_BT.numpy(), rows[:, :-1])
    assert np.array_equal(wide(batch).targets_BT.numpy(), rows[:, 1:])
    assert batch.loss_tokens == rows[:, 1:].size


def test_packing_is_part_of_a_runs_data_identity(prepared: Path) -> None:
    assert "packing" not in stream_of(prepared).identity
    assert stream_of(prepared, packed=True).identity["packing"] == ALGORITHM


def test_starts_of_packed_rows_follow_growing_sequences(prepared: Path) -> None:
    stream = stream_of(prepared, packed=True, document_mask=True)
    rows = stream.read(np.arange(16))
    assert rows.starts is not None
    (whole,), (cut,) = stream.batches.make(rows, LENGTH, [16]), stream.batches.make(rows, 8, [16])
    assert whole.starts_BT is not None
    assert cut.starts_BT is not None
    for row in range(16):
        for place in range(LENGTH):
            piece = max(int(whole.starts_BT[row, place]), place // 8 * 8)
            assert int(cut.starts_BT[row * 4 + place // 8, place % 8]) == piece - place // 8 * 8


def test_evaluation_leaves_out_the_same_targets(prepared: Path) -> None:
    whole = HeldoutBatches(prepared, 64, 4, 0, 0, 1)
    inner = HeldoutBatches(prepared, 64, 4, 0, 0, 1, boundary_loss=False)
    lengths = Tokenizer.load(prepared / "tokenizer.model").byte_lengths()
    loss_tokens = text_bytes = 0
    for a, b in zip(map(wide, whole), map(wide, inner), strict=True):
        closing = a.inputs_BT == whole._reader.corpus.manifest.end_of_text
        expected = a.targets_BT.masked_fill(closing, IGNORED_TARGET)
        assert b.targets_BT.equal(expected)
        real = expected[expected != IGNORED_TARGET].numpy()
        assert b.loss_tokens == len(real)
        loss_tokens += len(real)
        text_bytes += int(lengths[real].sum())
    assert (inner.loss_tokens, inner.text_bytes) == (loss_tokens, text_bytes)
    assert whole.loss_tokens - inner.loss_tokens > 0
