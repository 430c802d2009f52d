"""Stages of the data: what came before stays, corpora go on where they were, every sample once before any twice."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptscale.config.schema import CorpusConfig, DataConfig, SourceConfig, TokenizerConfig
from gptscale.config.step_plan import StageStart, StepPlan
from gptscale.data.block_order import BlockShuffle
from gptscale.data.order import FULL, Located, SampleOrder, Shuffle
from gptscale.data.prepare import prepare
from gptscale.data.stages import Mixture, StagedOrder, StageText, Track, with_copies
from gptscale.data.stream import StepFeed, TrainingStream, sample_hash
from gptscale.runtime.errors import UserError
from gptscale.topology import split_batch
from tests.helpers.batches import wide
from tests.helpers.text import documents, write_jsonl

LENGTH = 32
TRACKS = [
    Track(f"corpus-{number}", length, seed, size)
    for number, size in enumerate([1, 7, 64, 300])
    for length in (16, 32)
    for seed in (0, 1)
]


def located(order: StagedOrder, start: int, end: int) -> list[tuple[int, int, int]]:
    found = order.locate(np.arange(start, end))
    return list(zip(found.corpus.tolist(), found.epoch.tolist(), found.sample.tolist(), strict=True))


@st.composite
def mixtures(draw: st.DrawFn) -> tuple[Mixture, ...]:
    """Up to five stages of up to four corpora, each stage of one length and seed."""
    found, start = [], 0
    for _ in range(draw(st.integers(1, 5))):
        length, seed = draw(st.sampled_from([16, 32])), draw(st.sampled_from([0, 0, 1]))
        fitting = [track for track in TRACKS if (track.sequence_length, track.seed) == (length, seed)]
        tracks = with_copies(draw(st.lists(st.sampled_from(fitting), min_size=1, max_size=4)))
        weights = tuple(draw(st.floats(0.05, 10)) for _ in tracks)
        found.append(Mixture(start, tracks, weights))
        start += draw(st.integers(1, 2000))
    return tuple(found)


@settings(max_examples=60, deadline=None)
@given(mixtures(), st.sampled_from([FULL, BlockShuffle(8, 3)]))
def test_every_track_is_read_through_before_it_repeats_across_stages(
    stages: tuple[Mixture, ...], shuffle: Shuffle
) -> None:
    """However stages come and go, a track's draws are 0, 1, 2, …: epoch after epoch, each sample once in each."""
    order = StagedOrder(stages, shuffle)
    found = order.locate(np.arange(stages[-1].start + 500))
    for track, number in order.numbers.items():
        mine = found.corpus == number
        epochs = found.epoch[mine]
        assert (np.diff(epochs) >= 0).all()
        assert np.array_equal(epochs, np.arange(len(epochs)) // track.size)
        of_epoch = np.stack([epochs, found.sample[mine]], axis=1)
        assert len(np.unique(of_epoch, axis=0)) == len(of_epoch)
        assert (found.sample[mine] < track.size).all()


@settings(max_examples=60, deadline=None)
@given(mixtures(), st.data())
def test_a_later_stage_changes_nothing_before_it(stages: tuple[Mixture, ...], data: st.DataObject) -> None:
    """Left out, moved to a later start or replaced by any other: all positions before its start stay as they are."""
    number = data.draw(st.integers(0, len(stages) - 1))
    kept = stages[: number + 1]
    end = stages[number + 1].start if number + 1 < len(stages) else kept[-1].start + 700
    expected = located(StagedOrder(stages, FULL), 0, end)
    assert located(StagedOrder(kept, FULL), 0, end) == expected
    other = [replace(mixture, start=mixture.start + end) for mixture in data.draw(mixtures())]
    assert located(StagedOrder([*kept, *other], FULL), 0, end) == expected


@settings(max_examples=30, deadline=None)
@given(mixtures(), st.lists(st.integers(0, 12_000), max_size=50))
def test_any_positions_in_any_order(stages: tuple[Mixture, ...], positions: list[int]) -> None:
    order = StagedOrder(stages, FULL)
    found = order.locate(np.array(positions, dtype=np.int64))
    for index, position in enumerate(positions[:8]):
        alone = order.locate(np.array([position]))
        assert [alone.corpus[0], alone.epoch[0], alone.sample[0]] == [
            found.corpus[index],
            found.epoch[index],
            found.sample[index],
        ]


def test_one_stage_is_the_sample_order_itself() -> None:
    sizes, weights = (50, 7, 1000), (0.5, 0.2, 0.3)
    tracks = tuple(Track(str(size), 8, 7, size) for size in sizes)
    plain = SampleOrder(sizes, weights, seed=7).locate(np.arange(9000))
    staged = StagedOrder([Mixture(0, tracks, weights)], FULL).locate(np.arange(9000))
    for field in Located.__dataclass_fields__:
        assert np.array_equal(getattr(plain, field), getattr(staged, field))


GOLDEN_STAGED = [
    (1, 0, 41),
    (0, 1, 2),
    (2, 0, 593),
    (1, 0, 13),
    (2, 0, 880),
    (1, 0, 7),
    (1, 0, 9),
    (3, 0, 22),
    (3, 0, 10),
]


def test_the_order_over_stages_is_pinned() -> None:
    """Track 1 goes on with its 30th draw in the second stage, and begins anew where sequences are longer."""
    a, b, c = (Track(name, 8, 7, size) for name, size in (("a", 50), ("b", 70), ("c", 1000)))
    longer = replace(b, sequence_length=16, size=35)
    order = StagedOrder(
        [Mixture(0, (a, b), (0.7, 0.3)), Mixture(100, (c, b), (0.5, 0.5)), Mixture(140, (longer,), (1.0,))], FULL
    )
    assert order.numbers == {a: 0, b: 1, c: 2, longer: 3}
    assert located(order, 98, 104) + located(order, 139, 142) == GOLDEN_STAGED


def test_stages_are_found_at_once_however_far() -> None:
    """Nothing is walked over: a stage of 10^17 samples costs as much as one of ten."""
    tracks = (Track("a", 8, 0, 10**14 + 3), Track("b", 8, 0, 10**13))
    order = StagedOrder([Mixture(0, tracks, (2.0, 1.0)), Mixture(10**17, tracks[:1], (1.0,))], FULL)
    first, then = order.locate(np.array([10**17 - 1, 10**17])).epoch.tolist()
    # Two of three draws were of the first corpus, a whole number of periods of the stride table aside.
    assert then == int(2 / 3 * 10**17 / (10**14 + 3))
    assert first >= 0


@pytest.fixture(scope="module")
def second(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other text under the same tokenizer."""
    folder = tmp_path_factory.mktemp("second")
    text = write_jsonl(folder / "text.jsonl", documents(80, seed=5))
    data = DataConfig(sources=(SourceConfig(path=str(text)),), heldout_fraction=0.1)
    prepare(data, TokenizerConfig(path=str(prepared / "tokenizer.model")), folder / "corpus")
    return folder / "corpus"


def corpus(folder: Path, weight: float = 1.0) -> CorpusConfig:
    return CorpusConfig(str(folder), weight)


def stream(folder: Path, *stages: StageText) -> TrainingStream:
    return TrainingStream((corpus(folder),), LENGTH, 0, stages=stages)


def test_a_corpus_goes_on_in_a_mixture_and_gives_the_rest_of_its_epoch(prepared: Path, second: Path) -> None:
    """As an annealing mixture does: no row of the first corpus comes twice before each has come once."""
    plain = stream(prepared)
    count = plain.samples_per_epoch
    begins = count // 3
    staged = stream(prepared, StageText(begins, (corpus(second), corpus(prepared, 3.0)), LENGTH, 0))
    assert np.array_equal(staged.rows(np.arange(begins)), plain.rows(np.arange(begins)))
    everything = Counter(bytes(row) for row in plain.rows(np.arange(count)))
    ours = Counter(bytes(row) for row in staged.rows(np.arange(begins + 4 * (count - begins) // 3 + 1)))
    assert all(ours[row] >= times for row, times in everything.items())
    assert sum(ours[row] for row in everything) <= count + 2
    rest = [bytes(row) for row in plain.rows(np.arange(begins, count))]
    assert [row for row in map(bytes, staged.rows(np.arange(begins, begins + 60))) if row in everything] == rest[:45]


def test_longer_sequences_and_other_seeds_begin_anew(prepared: Path) -> None:
    longer = StageText(64, (corpus(prepared),), 4 * LENGTH, 0)
    again = StageText(80, (corpus(prepared),), LENGTH, 9)
    staged = stream(prepared, longer, again)
    alone = TrainingStream((corpus(prepared),), 4 * LENGTH, 0)
    assert staged.rows(np.arange(64, 80)).shape == (16, 4 * LENGTH + 1)
    everything = {bytes(row) for row in alone.rows(np.arange(alone.samples_per_epoch))}
    assert {bytes(row) for row in staged.rows(np.arange(64, 80))} <= everything
    base = stream(prepared)
    ours = staged.rows(np.arange(80, 80 + base.samples_per_epoch))
    theirs = base.rows(np.arange(base.samples_per_epoch))
    assert sorted(map(bytes, ours)) == sorted(map(bytes, theirs))
    assert not np.array_equal(ours[:64], theirs[:64])
    with pytest.raises(AssertionError, match="at once"):
        staged.rows(np.arange(60, 70))


def test_the_identity_of_stages(prepared: Path, second: Path) -> None:
    text = StageText(64, (corpus(second),), LENGTH, 0)
    base = stream(prepared).identity
    staged = stream(prepared, text).identity
    assert {key: value for key, value in staged.items() if key != "stages"} == base
    assert list(staged["stages"][0]) == ["start", "seed", "sequence_length", "corpora"]
    different = [
        replace(text, start=65),
        replace(text, seed=1),
        replace(text, sequence_length=16),
        replace(text, corpora=(corpus(prepared),)),
        replace(text, corpora=(corpus(second), corpus(prepared))),
    ]
    assert len({json.dumps(stream(prepared, one).identity) for one in (text, *different)}) == 6
    assert stream(prepared, replace(text, corpora=(corpus(second, 5.0),))).identity == staged


def test_what_a_stage_cannot_read_is_refused_before_the_first_step(
    prepared: Path, second: Path, tmp_path: Path
) -> None:
    setting = "data.stages[1]"
    with pytest.raises(UserError, match=r"data\.stages\[1\]\.sequence_length=100000"):
        stream(prepared, StageText(8, (corpus(prepared),), 100_000, 0, setting))
    with pytest.raises(UserError, match=r"data\.stages\[1\]\.path\[1\]\.weight"):
        stream(prepared, StageText(8, (corpus(prepared), corpus(second, 1e-9)), LENGTH, 0, setting))
    with pytest.raises(UserError, match="no such folder"):
        stream(prepared, StageText(8, (corpus(tmp_path / "none"),), LENGTH, 0, setting))
    text = write_jsonl(tmp_path / "text.jsonl", documents(60, seed=2))
    data = DataConfig(sources=(SourceConfig(path=str(text)),), heldout_fraction=0.1)
    prepare(data, TokenizerConfig(vocab_size=450), tmp_path / "foreign")
    with pytest.raises(UserError, match="different tokenizers"):
        stream(prepared, StageText(8, (corpus(tmp_path / "foreign"),), LENGTH, 0, setting))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_feed_crosses_stages_alike_on_any_number_of_ranks(prepared: Path, second: Path, ranks: int) -> None:
    """A step's rows are of one stage; its tokens stay as many; its hash is that of the global order."""
    plan = StepPlan(8, LENGTH, stages=(StageStart(24, 2 * LENGTH), StageStart(32, LENGTH // 2)))
    both = (corpus(prepared), corpus(second))
    texts = StageText(24, both, 2 * LENGTH, 0), StageText(32, both[1:], LENGTH // 2, 0)
    reference = stream(prepared, *texts)
    split = split_batch(8, 8 // ranks // 2 or 1, ranks)
    feeds = [StepFeed(stream(prepared, *texts), plan, split, rank, 0) for rank in range(ranks)]
    try:
        for step in range(8):
            parts = [next(feed) for feed in feeds]
            start = parts[0].start
            assert start == plan.samples_after(step)
            positions = np.arange(start, start + plan.batch(start))
            rows_NT = reference.rows(positions)
            inputs = np.concatenate([wide(batch).inputs_BT.numpy() for part in parts for batch in part.microbatches])
            assert np.array_equal(inputs, rows_NT[:, :-1])
            assert inputs.size == 8 * LENGTH
            assert sum(part.sample_hash for part in parts) % 2**64 == sample_hash(positions, rows_NT)
            most = max(wide(batch).inputs_BT.numel() for part in parts for batch in part.microbatches)
            assert most <= max(split.micro_batch * LENGTH, 2 * LENGTH)
    finally:
        for feed in feeds:
            feed.close()
