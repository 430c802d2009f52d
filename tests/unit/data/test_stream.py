from __future__ import annotations

import itertools
import json
import os
import shutil
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from gptscale.config.schema import CorpusConfig, DataConfig, SourceConfig, TokenizerConfig
from gptscale.config.step_plan import StepPlan
from gptscale.data.block_order import BlockShuffle
from gptscale.data.order import FULL
from gptscale.data.prepare import prepare
from gptscale.data.rows import RowReader
from gptscale.data.stream import StepFeed, TrainingStream, sample_hash
from gptscale.runtime.errors import UserError
from gptscale.topology import BatchSplit, split_batch
from tests.helpers.batches import wide
from tests.helpers.text import documents, write_jsonl

LENGTH = 32


def one(folder: Path, seed: int = 0, length: int = LENGTH) -> TrainingStream:
    return TrainingStream((CorpusConfig(str(folder)),), length, seed)


@pytest.fixture(scope="module")
def second(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other text under the same tokenizer."""
    folder = tmp_path_factory.mktemp("second")
    text = write_jsonl(folder / "text.jsonl", documents(80, seed=5))
    data = DataConfig(sources=(SourceConfig(path=str(text)),), heldout_fraction=0.1)
    prepare(data, TokenizerConfig(path=str(prepared / "tokenizer.model")), folder / "corpus")
    return folder / "corpus"


def feed_of(stream: TrainingStream, split: BatchSplit, rank: int, start: int) -> StepFeed:
    """Steps that are all alike."""
    return StepFeed(stream, StepPlan(split.global_batch, stream.sequence_length), split, rank, start)


def all_rows(folder: Path, length: int = LENGTH) -> np.ndarray:
    """Every sample in the order of the shards, by the definition: tokens[k·L : k·L+L+1] within a shard."""
    rows = []
    for path in sorted((folder / "train").glob("*.tok.npy")):
        tokens = np.load(path)
        rows += [tokens[start : start + length + 1] for start in range(0, len(tokens) - length, length)]
    return np.stack(rows)


def test_an_epoch_holds_every_sample_once_and_the_next_in_another_order(prepared: Path) -> None:
    stream = one(prepared)
    expected = all_rows(prepared)
    count = stream.samples_per_epoch
    assert count == len(expected)
    first, again = stream.rows(np.arange(count)), stream.rows(np.arange(count, 2 * count))
    assert first.dtype == np.uint16
    assert stream.rows(np.arange(0)).shape == (0, LENGTH + 1)
    for rows in (first, again):
        assert sorted(map(bytes, rows)) == sorted(map(bytes, expected))
    assert not np.array_equal(first, again)
    assert not np.array_equal(first, expected)
    assert not np.array_equal(first, one(prepared, seed=1).rows(np.arange(count)))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 9000), max_size=40))
def test_rows_depend_on_the_position_alone(prepared: Path, positions: list[int]) -> None:
    stream = one(prepared)
    rows = stream.rows(np.array(positions, dtype=np.int64))
    assert rows.shape == (len(positions), LENGTH + 1)
    for position, row in zip(positions[:5], rows, strict=False):
        assert np.array_equal(stream.rows(np.array([position]))[0], row)


def test_block_order_reads_every_sample_once_from_few_places_at_a_time(prepared: Path) -> None:
    """Rows of a window lie in `window` blocks of neighbours; the identity says so, and that of the full order is what
    it was before there was another."""
    expected = [bytes(row) for row in all_rows(prepared)]
    stream = TrainingStream((CorpusConfig(str(prepared)),), LENGTH, 0, shuffle=BlockShuffle(8, 3))
    rows = [bytes(row) for row in stream.rows(np.arange(len(expected)))]
    assert sorted(rows) == sorted(expected)
    places = [expected.index(row) // 8 for row in rows[:20]]
    assert len(set(places)) <= 3
    assert rows != [bytes(row) for row in one(prepared).rows(np.arange(len(expected)))]
    assert list(one(prepared).identity) == ["algorithm", "seed", "sequence_length", "corpora"]
    assert one(prepared).identity["algorithm"] == "feistel6-splitmix64-stride65536-v1"


def test_every_sequence_length_reads_the_same_shards(prepared: Path) -> None:
    for length in (7, 1000):
        stream = one(prepared, length=length)
        assert sorted(map(bytes, stream.rows(np.arange(stream.samples_per_epoch)))) == sorted(
            map(bytes, all_rows(prepared, length))
        )


def test_a_mixture_draws_by_weight_and_reads_each_corpus_through(prepared: Path, second: Path) -> None:
    stream = TrainingStream((CorpusConfig(str(prepared), 3.0), CorpusConfig(str(second), 1.0)), LENGTH, 0)
    sizes = [len(all_rows(prepared)), len(all_rows(second))]
    assert stream.samples_per_epoch == sum(sizes)
    rows = stream.rows(np.arange(4 * sizes[1]))
    inside = {bytes(row) for row in all_rows(second)}
    drawn = [bytes(row) for row in rows if bytes(row) in inside]
    assert len(drawn) == sizes[1]
    assert set(drawn) == inside
    assert stream.identity["corpora"][0]["share"] == 0.75


def test_the_hash_is_what_the_contract_says(prepared: Path) -> None:
    positions = np.array([0, 5, 2**40, 7])
    rows = one(prepared).rows(positions)
    total = 0
    for position, row in zip(positions.tolist(), rows.tolist(), strict=True):
        data = position.to_bytes(8, "little") + b"".join(token.to_bytes(4, "little") for token in row)
        total += xxhash.xxh3_64_intdigest(data)
    assert sample_hash(positions, rows) == total % 2**64
    assert sample_hash(positions[::-1], rows[::-1]) == total % 2**64
    assert sample_hash(positions, rows[::-1]) != total % 2**64
    assert sample_hash(positions[:0], rows[:0]) == 0


@pytest.mark.parametrize("world", range(1, 9))
def test_any_number_of_ranks_reads_the_same_global_sequence(prepared: Path, world: int) -> None:
    """840 sequences a step divide by 1…8 ranks; micro-batches differ too; start and steps are the same."""
    stream = one(prepared, length=8)
    reference = stream.rows(np.arange(1000, 1000 + 3 * 840))
    split = split_batch(840, micro_batch=[35, 20, 7, 15, 12, 10, 5, 3][world - 1], data=world)
    feeds = [feed_of(one(prepared, length=8), split, rank, start=1000) for rank in range(world)]
    try:
        for step in range(3):
            steps = [next(feed) for feed in feeds]
            assert {data.start for data in steps} == {1000 + step * 840}
            batches = [wide(batch) for data in steps for batch in data.microbatches]
            assert all(len(batch.inputs_BT) == split.micro_batch for batch in batches)
            inputs = torch.cat([batch.inputs_BT for batch in batches])
            targets = torch.cat([batch.targets_BT for batch in batches])
            expected = torch.from_numpy(reference[step * 840 : (step + 1) * 840].astype(np.int64))
            assert torch.equal(inputs, expected[:, :-1])
            assert torch.equal(targets, expected[:, 1:])
            assert sum(batch.loss_tokens for batch in batches) == 840 * 8
            positions = np.arange(1000 + step * 840, 1000 + (step + 1) * 840)
            assert sum(data.sample_hash for data in steps) % 2**64 == sample_hash(
                positions, reference[step * 840 : (step + 1) * 840]
            )
    finally:
        for feed in feeds:
            feed.close()


def test_a_feed_goes_on_from_any_position(prepared: Path) -> None:
    split = split_batch(12, 3, 2)
    with feed_of(one(prepared), split, 1, 0) as whole:
        steps = [next(whole) for _ in range(10)]
    with feed_of(one(prepared), split, 1, 6 * 12) as later:
        for expected in steps[6:]:
            found = next(later)
            assert (found.start, found.sample_hash) == (expected.start, expected.sample_hash)
            for left, right in zip(found.microbatches, expected.microbatches, strict=True):
                assert torch.equal(left.tokens_BT1, right.tokens_BT1)


def test_the_feed_keeps_ahead_but_not_far(prepared: Path) -> None:
    read: list[int] = []
    stream = one(prepared)
    inner = stream.read
    stream.read = lambda positions: (read.append(int(positions[0])), inner(positions))[1]  # type: ignore[method-assign]
    with feed_of(stream, split_batch(8, 4, 1), 0, 0) as feed:
        next(feed)
        time.sleep(0.3)
        assert 3 <= len(read) <= 8
        waits = []
        for _ in range(30):
            time.sleep(0.01)
            waits.append(next(feed).wait_s)
        assert sorted(waits)[len(waits) // 2] < 0.001


def test_an_error_in_the_thread_reaches_the_training_loop(prepared: Path, tmp_path: Path) -> None:
    shutil.copytree(prepared, tmp_path / "corpus")
    stream = one(tmp_path / "corpus")
    with feed_of(stream, split_batch(8, 4, 1), 0, 0) as feed:
        next(feed)
        for path in (tmp_path / "corpus/train").glob("*.tok.npy"):
            os.truncate(path, 200)
        with pytest.raises(UserError, match=r"tok\.npy: ends before byte \d+") as caught:
            list(itertools.islice(feed, 100))
        with pytest.raises(UserError) as again:
            next(feed)
        assert again.value is caught.value


def test_closing_ends_the_thread(prepared: Path) -> None:
    before = threading.active_count()
    feed = feed_of(one(prepared), split_batch(8, 4, 1), 0, 0)
    next(feed)
    feed.close()
    feed.close()
    assert threading.active_count() == before


def test_the_identity_names_all_that_decides_the_samples(prepared: Path, second: Path) -> None:
    def identity(*corpora: CorpusConfig, length: int = LENGTH, seed: int = 0) -> str:
        return json.dumps(TrainingStream(corpora, length, seed).identity)

    first, other = CorpusConfig(str(prepared)), CorpusConfig(str(second))
    different = [
        identity(first),
        identity(other),
        identity(first, other),
        identity(other, first),
        identity(first, CorpusConfig(other.path, 2.0)),
        identity(first, length=16),
        identity(first, seed=1),
    ]
    assert len(set(different)) == len(different)
    orders = [FULL, BlockShuffle(8, 2), BlockShuffle(8, 3), BlockShuffle(16, 2)]
    assert len({json.dumps(TrainingStream((first,), LENGTH, 0, shuffle=way).identity) for way in orders}) == 4
    assert identity(first, other) == identity(CorpusConfig(first.path, 5.0), CorpusConfig(other.path, 5.0))
    assert identity(first) == identity(CorpusConfig(first.path, 7.0))
    assert str(prepared) not in identity(first)


def test_what_does_not_fit_together_is_refused(prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.sequence_length=100000"):
        one(prepared, length=100_000)
    text = write_jsonl(tmp_path / "text.jsonl", documents(60, seed=2))
    data = DataConfig(sources=(SourceConfig(path=str(text)),), heldout_fraction=0.1)
    prepare(data, TokenizerConfig(vocab_size=450), tmp_path / "foreign")
    with pytest.raises(UserError, match="different tokenizers"):
        TrainingStream((CorpusConfig(str(prepared)), CorpusConfig(str(tmp_path / "foreign"))), LENGTH, 0)
    with pytest.raises(UserError, match="too small a share"):
        TrainingStream((CorpusConfig(str(prepared)), CorpusConfig(str(prepared), 1e-9)), LENGTH, 0)
    with (prepared / "train/shard-00000.tok.npy").open("rb") as file:
        assert file.read(6) == b"\x93NUMPY"


def test_reading_maps_no_files(prepared: Path) -> None:
    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count(".tok.npy")

    before = mapped()  # what a failure of another test still holds
    stream = one(prepared)
    stream.rows(np.arange(stream.samples_per_epoch))
    assert mapped() == before
    opened = sum("tok.npy" in os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _is_link(fd))
    assert opened > 0
    stream.close()


def _is_link(descriptor: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{descriptor}")


@pytest.mark.parametrize("most", [1, 2, 5])
def test_open_files_are_bounded(most: int, prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gptscale.data import rows
    from gptscale.data.corpus import open_split

    monkeypatch.setattr(rows, "_MOST_OPEN_FILES", most)
    before = len(os.listdir("/proc/self/fd"))
    reader = RowReader(open_split(prepared, "train"), LENGTH)
    found, targets = reader.read(np.arange(reader.count))
    assert np.array_equal(found, all_rows(prepared))
    assert (targets == LENGTH).all()
    assert len(os.listdir("/proc/self/fd")) <= before + most
    for seed in range(5):  # a file must not be closed whose rows are still to be read
        numbers = np.random.default_rng(seed).permutation(reader.count)
        assert np.array_equal(reader.read(numbers)[0], all_rows(prepared)[numbers])
        assert len(os.listdir("/proc/self/fd")) <= before + most
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_readers_of_a_mixture_share_the_files_that_may_be_open(
    prepared: Path, second: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gptscale.data import rows

    monkeypatch.setattr(rows, "_MOST_OPEN_FILES", 4)
    before = len(os.listdir("/proc/self/fd"))
    stream = TrainingStream((CorpusConfig(str(prepared)), CorpusConfig(str(second))), LENGTH, 0)
    stream.read(np.arange(300))
    assert len(os.listdir("/proc/self/fd")) == before + 3, "two of many shards, and the only one of the second corpus"
    stream.close()


def test_a_growing_batch_of_growing_sequences_uses_the_same_samples(prepared: Path) -> None:
    """The rows and their hash are those of the order, on any number of ranks; shorter sequences are their cuts."""
    stream = one(prepared)
    plan = StepPlan(8, LENGTH, ramp_from=2, ramp_samples=24, length_from=8, length_samples=40)
    whole, halves = split_batch(8, 4, 1), split_batch(8, 2, 2)
    seen, lengths, batches = [], [], []
    feeds = [(whole, 0), (halves, 0), (halves, 1)]
    with ExitStack() as opened:
        alone, *both = [opened.enter_context(StepFeed(stream, plan, split, rank, 0)) for split, rank in feeds]
        for _ in range(12):
            step, parts = next(alone), [next(feed) for feed in both]
            assert step.start == sum(batches)
            batches.append(plan.batch(step.start))
            inputs = torch.cat([batch.inputs_BT for batch in map(wide, step.microbatches)])
            shared = torch.cat([batch.inputs_BT for part in parts for batch in map(wide, part.microbatches)])
            assert torch.equal(inputs, shared)
            assert step.sample_hash == sum(part.sample_hash for part in parts) % 2**64
            lengths.append(inputs.shape[1])
            seen.append(inputs.reshape(-1, LENGTH))
            targets = torch.cat([batch.targets_BT for batch in map(wide, step.microbatches)]).reshape(-1, LENGTH)
            assert torch.equal(targets[:, :-1], seen[-1][:, 1:]), "a cut loses no target"
    assert batches[:3] == [2, 2, 2]
    assert batches[-1] == 8
    assert sorted(set(lengths)) == [8, 16, 32]
    assert lengths == sorted(lengths)
    expected = stream.rows(np.arange(sum(batches)))[:, :-1].astype(np.int64)
    assert np.array_equal(torch.cat(seen).numpy(), expected)


def test_batches_say_where_documents_begin(prepared: Path) -> None:
    """By definition, token by token; also where growing sequences cut rows. Samples and their hash stay the same."""
    plan = StepPlan(8, LENGTH, length_from=8, length_samples=40)
    split = split_batch(8, 4, 1)
    masked = TrainingStream((CorpusConfig(str(prepared)),), LENGTH, 0, document_mask=True)
    assert masked.identity == one(prepared).identity
    lengths, inside = set(), 0
    with StepFeed(masked, plan, split, 0, 0) as feed, StepFeed(one(prepared), plan, split, 0, 0) as plainly:
        for _ in range(12):
            step, other = next(feed), next(plainly)
            assert step.sample_hash == other.sample_hash
            for batch, without in zip(map(wide, step.microbatches), map(wide, other.microbatches), strict=True):
                assert torch.equal(batch.inputs_BT, without.inputs_BT)
                assert without.starts_BT is None
                assert batch.starts_BT is not None
                assert batch.starts_BT.dtype == torch.int64
                assert batch.starts_BT.tolist() == starts_by_definition(batch.inputs_BT, masked.end_of_text)
                lengths.add(batch.inputs_BT.shape[1])
                inside += int((batch.starts_BT > 0).any())
    assert lengths == {8, 16, 32}
    assert inside > 5, "documents end within rows"


def starts_by_definition(inputs_BT: torch.Tensor, end_of_text: int) -> list[list[int]]:
    found = []
    for row in inputs_BT.tolist():
        begins = [place for place in range(len(row)) if place == 0 or row[place - 1] == end_of_text]
        found.append([max(begin for begin in begins if begin <= place) for place in range(len(row))])
    return found
