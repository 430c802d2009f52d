"""The order of a run's samples over all its stages, still a pure function of the position.

A stage draws from its own mixture, counted from its own start: `SampleOrder` of the position less that of its first
sample. What it draws from are *tracks*: the samples of one corpus, cut to one length, in the order of one seed. A track
that an earlier stage drew from goes on where that left it, so that no sample of it comes a second time before all have
come once, as people expect of an annealing mixture that holds some of the pretraining text. How often it was drawn
before follows from the earlier stages' stride tables and lengths, without a look at any sample.

A track begins anew with another sequence length, because its samples are other ones: those already read lie all over
the corpus, and what is left of it is no set of longer rows. Tracks are numbered as stages name them, and the number
goes into the keys of their order. So what a position gives depends on its own stage and the ones before it, and never
on a later one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gptscale.config.schema import CorpusConfig
from gptscale.data.order import Ints, Located, SampleOrder, Shuffle


@dataclass(frozen=True)
class StageText:
    """What is read from the position `start` on."""

    start: int
    corpora: tuple[CorpusConfig, ...]
    sequence_length: int
    seed: int
    setting: str = "data"
    """Whose `path` and `sequence_length` these are."""


@dataclass(frozen=True)
class Track:
    """Samples that are all read before any is read again."""

    corpus: str
    """Identity of its manifest, so that it does not matter where it lies."""
    sequence_length: int
    seed: int
    size: int
    """Samples."""
    copy: int = 0
    """Which one of several times that one stage names the same corpus."""


@dataclass(frozen=True)
class Mixture:
    """The tracks of one stage, and their weights."""

    start: int
    """Position of its first sample."""
    tracks: tuple[Track, ...]
    weights: tuple[float, ...]
    exact: bool = True
    setting: str = "data.path"


class StagedOrder:
    """Where each position of a run leads. `Located.corpus` is the number of a track: `numbers[track]`."""

    def __init__(self, mixtures: Sequence[Mixture], shuffle: Shuffle) -> None:
        """`mixtures` begin at 0 and ascend; the last one has no end."""
        assert mixtures[0].start == 0
        self._starts = np.array([mixture.start for mixture in mixtures], dtype=np.int64)
        assert (np.diff(self._starts) > 0).all(), self._starts
        self.numbers: dict[Track, int] = {}
        self._orders: list[SampleOrder] = []
        drawn: dict[Track, int] = {}
        for mixture, end in zip(mixtures, [*(later.start for later in mixtures[1:]), None], strict=True):
            for track in mixture.tracks:
                self.numbers.setdefault(track, len(self.numbers))
            order = SampleOrder(
                tuple(track.size for track in mixture.tracks),
                mixture.weights,
                mixture.tracks[0].seed,
                shuffle,
                numbers=tuple(self.numbers[track] for track in mixture.tracks),
                earlier=tuple(drawn.get(track, 0) for track in mixture.tracks),
                exact=mixture.exact,
                setting=mixture.setting,
            )
            self._orders.append(order)
            if end is not None:
                for track, draws in zip(mixture.tracks, order.draws(end - mixture.start), strict=True):
                    drawn[track] = drawn.get(track, 0) + draws

    def locate(self, positions: Ints) -> Located:
        """Where each of `positions` [n] leads."""
        positions = np.asarray(positions, dtype=np.int64)
        first, last = 0, 0
        if len(positions):
            first, last = map(int, self._stage(np.array([positions.min(), positions.max()])))
        if first == last:  # nearly always
            return self._orders[first].locate(positions - self._starts[first])
        stage = self._stage(positions)
        found = Located(*(np.empty_like(positions) for _ in range(3)))
        for number in np.unique(stage).tolist():
            here = stage == number
            located = self._orders[number].locate(positions[here] - self._starts[number])
            found.corpus[here], found.epoch[here] = located.corpus, located.epoch
            found.sample[here] = located.sample
        return found

    def _stage(self, positions: Ints) -> Ints:
        return np.searchsorted(self._starts, positions, side="right") - 1


def with_copies(tracks: Sequence[Track]) -> tuple[Track, ...]:
    """Tracks of one stage, told apart where the same corpus is named more than once."""
    return tuple(
        Track(track.corpus, track.sequence_length, track.seed, track.size, tracks[:number].count(track))
        for number, track in enumerate(tracks)
    )
