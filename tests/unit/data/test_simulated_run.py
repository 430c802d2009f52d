"""A run of ten million samples, from restart to restart on other ranks: every sample of every epoch exactly once.

All that decides which rank reads which row is what a training uses: the order over stages, the step plan, the split of
batches, the topology, the rows of shards. Only text, model and processes are left out.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from gptscale.config.step_plan import StageStart, StepPlan
from gptscale.data.block_order import BlockShuffle
from gptscale.data.corpus import Corpus
from gptscale.data.order import FULL, Shuffle
from gptscale.data.rows import RowReader
from gptscale.data.shards import Manifest
from gptscale.data.stages import Mixture, StagedOrder, Track
from gptscale.data.stream import rank_positions
from gptscale.flow import Shard
from gptscale.topology import BatchSplit, Topology, split_batch

LENGTH = 128
BATCH = 10_080
"""5040, which the ramp begins with and the longest sequences leave of it, has 26 divisors up to 48."""
STEPS_AHEAD = 4


def corpus(name: str, shard_tokens: list[int]) -> Corpus:
    """Shards of so many tokens, of which nothing is ever read."""
    shards = tuple(Shard(f"shard-{n:05d}", tokens, 1, 0, 0, "", "") for n, tokens in enumerate(shard_tokens))
    total = sum(shard_tokens)
    return Corpus(Path(name), "train", Manifest("train", "", 1000, 0, "<u2", total, len(shards), 0, shards, ()))


def corpora(generator: np.random.Generator) -> list[Corpus]:
    """From a small one that is read a hundred times to one that is not read through, of shards of any sizes."""
    return [
        corpus(name, generator.integers(LENGTH // 2, 2 * tokens // shards, shards).tolist())
        for name, tokens, shards in (
            ("web", 900_000_000, 40),
            ("code", 70_000_000, 7),
            ("books", 20_000_000, 23),
            ("notes", 600_000, 3),
        )
    ]


def rows_by_definition(text: Corpus, length: int) -> npt.NDArray[np.int64]:
    """Where in the corpus each sample begins: tokens[k·L : k·L+L+1] within a shard."""
    begins, places = 0, []
    for shard in text.manifest.shards:
        places.append(begins + np.arange(0, max(0, shard.tokens - length), length))
        begins += shard.tokens
    return np.concatenate(places)


@dataclass
class Run:
    """Where it stands as its checkpoints tell, and what was read at each position by whoever read it first."""

    order: StagedOrder
    plan: StepPlan
    samples: int
    generator: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def __post_init__(self) -> None:
        self.position = 0
        self.used = np.zeros(self.samples + 2 * BATCH, dtype=np.int8)
        self.track = np.full(len(self.used), -1, dtype=np.int8)
        self.sample = np.zeros(len(self.used), dtype=np.int32)
        self.epoch = np.zeros(len(self.used), dtype=np.int32)
        self.again = 0
        self.worlds: set[int] = set()
        self.cuts: set[tuple[int, int]] = set()

    def session(self) -> None:
        """One start of the run: on any world size, killed anywhere between checkpoints."""
        topology, split = self.layout()
        self.worlds.add(topology.world_size)
        self.cuts.add((topology.data, split.micro_batch))
        every, steps = int(self.generator.integers(1, 12)), int(self.generator.integers(1, 40))
        start = saved = self.position
        read = []
        for step in range(1, steps + 1 + STEPS_AHEAD):
            if start >= self.samples:
                break
            read.append(self.step(topology, split, start))
            start += self.plan.batch(start)
            if step <= steps and step % every == 0:  # what is only prefetched is in no checkpoint
                saved = start
        if start >= self.samples and step <= steps:
            saved = start  # the last step of a run is saved
        self.record(np.concatenate(read))
        self.used[self.position : saved] += 1
        self.position = saved

    def layout(self) -> tuple[Topology, BatchSplit]:
        """Of what a world of 1 to 48 ranks may be: any data axis that can share the smallest batch, the rest tensor."""
        world = int(self.generator.integers(1, 49))
        data = int(self.generator.choice([n for n in range(1, world + 1) if world % n == 0 and (BATCH // 2) % n == 0]))
        micro = int(self.generator.choice([n for n in (1, 2, 3, 5, 8, 14, 30, 105) if BATCH // data % n == 0]))
        return Topology(world, tensor=world // data), split_batch(BATCH, micro, data)

    def step(self, topology: Topology, split: BatchSplit, start: int) -> npt.NDArray[np.int64]:
        """Positions that all ranks read together; tensor peers the same, each data rank its own."""
        end = start + self.plan.batch(start)
        parts: list[npt.NDArray[np.int64]] = []
        for rank in range(0, topology.world_size, topology.tensor):
            at, peer = topology.coordinates(rank), topology.coordinates(rank + topology.tensor - 1)
            assert at.data == peer.data == len(parts)
            mine, counts = rank_positions(self.plan, split, at.data, start)
            assert sum(counts) == len(mine)
            assert max(counts) * self.plan.row_length(start) <= max(
                split.micro_batch * LENGTH, self.plan.row_length(start)
            )
            parts.append(mine)
        positions = np.concatenate(parts)
        assert np.array_equal(positions, np.arange(start, end))
        return positions

    def record(self, positions: npt.NDArray[np.int64]) -> None:
        """What is read a second time, after a kill, is what was read the first time."""
        found = self.order.locate(positions)
        before = self.track[positions] >= 0
        self.again += int(before.sum())
        for recorded, now in ((self.track, found.corpus), (self.sample, found.sample), (self.epoch, found.epoch)):
            assert np.array_equal(recorded[positions[before]], now[before])
            recorded[positions] = now


@pytest.mark.parametrize(("shuffle", "samples"), [(FULL, 10_000_000), (BlockShuffle(256, 16), 2_000_000)])
def test_every_sample_of_every_epoch_once_over_any_restarts(shuffle: Shuffle, samples: int) -> None:
    began_s = time.perf_counter()
    generator = np.random.default_rng(7)
    texts = corpora(generator)
    weights = (0.55, 0.25, 0.15, 0.05), (0.1, 0.3, 0.6), (1.0,)
    readers = {(text.folder.name, length): RowReader(text, length) for text in texts for length in (LENGTH, 2 * LENGTH)}

    def track(name: str, length: int = LENGTH) -> Track:
        return Track(name, length, 3, readers[name, length].count)

    # The batch grows first; then half of the text at other weights; then code alone in sequences of twice the length.
    plan = StepPlan(BATCH, LENGTH, ramp_from=BATCH // 2, ramp_samples=samples // 20)
    starts = []
    for share, length in ((0.6, LENGTH), (0.9, 2 * LENGTH)):
        starts.append(plan.samples_after(plan.steps_to(int(share * samples))))
        plan = StepPlan(BATCH, LENGTH, BATCH // 2, samples // 20, stages=(*plan.stages, StageStart(starts[-1], length)))
    mixtures = [
        Mixture(0, tuple(track(name) for name in ("web", "code", "books", "notes")), weights[0]),
        Mixture(starts[0], tuple(track(name) for name in ("notes", "code", "books")), weights[1]),
        Mixture(starts[1], (track("code", 2 * LENGTH),), weights[2]),
    ]
    run = Run(StagedOrder(mixtures, shuffle), plan, samples)
    sessions = 0
    while run.position < samples:
        run.session()
        sessions += 1
    end = run.position

    # Every position once in what counts, whatever was lost and read again.
    assert (run.used[:end] == 1).all()
    assert not run.used[end:].any()
    assert run.again > samples // 50, "too little was lost for this to show anything"
    if samples >= 10_000_000:
        assert sessions > 50
        assert len(run.worlds) > 25
        assert len(run.cuts) > 30

    # The same global sequence as one rank reads that is never stopped.
    for first in range(0, end, 1 << 20):
        straight = run.order.locate(np.arange(first, min(end, first + (1 << 20))))
        assert np.array_equal(straight.corpus, run.track[first : first + (1 << 20)][: len(straight.corpus)])
        assert np.array_equal(straight.sample, run.sample[first : first + (1 << 20)][: len(straight.sample)])

    # Every sample of every completed epoch exactly once, and where its shard has it.
    epochs = {}
    for one, number in run.order.numbers.items():
        mine = run.track[:end] == number
        draw = run.epoch[:end][mine].astype(np.int64) * one.size + run.sample[:end][mine]
        completed, begun = divmod(len(draw), one.size)
        epochs[one.corpus, one.sequence_length] = completed
        seen = np.bincount(draw, minlength=completed * one.size)
        assert (seen[: completed * one.size] == 1).all()
        assert seen.max() == 1
        assert (seen[completed * one.size :].sum()) == begun
        reader = readers[one.corpus, one.sequence_length]
        if completed:
            once = run.sample[:end][mine][: one.size].astype(np.int64)
            places = np.sort(reader.places(once))
            assert np.array_equal(places, rows_by_definition(reader.corpus, one.sequence_length))
    if samples >= 10_000_000:
        assert epochs["web", LENGTH] == 0, "one source is not read through"
        assert epochs["notes", LENGTH] > 50
        assert epochs["code", LENGTH] >= 2
        assert epochs["code", 2 * LENGTH] >= 1

    # And each source as often as its weight says, in each stage.
    for mixture, until in zip(mixtures, [*starts, end], strict=True):
        here = run.track[mixture.start : until]
        for one, weight in zip(mixture.tracks, mixture.weights, strict=True):
            drawn = int((here == run.order.numbers[one]).sum())
            # Two samples of the table's own shares, which are whole slots of 65,536.
            assert abs(drawn - weight * len(here)) < 2 + 2 * len(here) / 65_536
    assert time.perf_counter() - began_s < 60  # 8 s on an idle core
