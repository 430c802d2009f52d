"""Which sample comes at which position: a pure function, so that nothing but one integer has to be saved to resume.

A position (0, 1, 2, … over the whole run) is mapped in two steps, both without any array that grows with the corpus:

1. The *stride table* says which corpus the position draws from, and how many times that corpus was drawn before.
   It repeats every 65,536 positions, and within them spreads every corpus as evenly as its weight allows
   (the Sainte-Laguë order: the k-th draw of a corpus of weight w is due at time (k + ½) / w).
2. A corpus of N samples is read in another order each epoch: a *Feistel network* permutes the b bits of the draw's
   number, 2^b being the power of two next above N; results ≥ N are permuted again until they fall below N
   ("cycle-walking": Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002).

The order depends on (seed, corpus, epoch, position) alone: not on ranks, micro-batch, or the length of the run.
Golden vectors in the tests pin it, and `ALGORITHM` is part of a run's data identity. To change the order is to add a
new algorithm beside this one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from gptscale.runtime.errors import UserError

ALGORITHM = "feistel6-splitmix64-stride65536-v1"
PERIOD = 65_536
"""Positions after which the stride table repeats."""
ROUNDS = 6

Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Located:
    """Where positions lead, each [positions]: which corpus, which epoch of it, which of its samples."""

    corpus: Ints
    epoch: Ints
    sample: Ints

    def take(self, indices: Ints) -> Located:
        return Located(self.corpus[indices], self.epoch[indices], self.sample[indices])


@dataclass(frozen=True)
class SampleOrder:
    """The order of samples drawn from corpora of the given `sizes` (in samples) and `weights`."""

    sizes: tuple[int, ...]
    weights: tuple[float, ...]
    seed: int

    def __post_init__(self) -> None:
        assert len(self.sizes) == len(self.weights) > 0
        assert all(0 < size < 2**62 for size in self.sizes), self.sizes
        for number, drawn in enumerate(self._table.draws.tolist()):
            if drawn == 0:
                raise UserError(
                    f"data.path[{number}].weight={self.weights[number]} is too small a share to be drawn\n"
                    f"give it a weight > 0 of at least 1/{PERIOD} of the sum of weights, or leave the corpus out"
                )

    @cached_property
    def _table(self) -> StrideTable:
        return stride_table(self.weights)

    def locate(self, positions: Ints) -> Located:
        """Where each of `positions` [n] leads. Cheap for windows (85 ns a position), dear one at a time."""
        period, slot = np.divmod(np.asarray(positions, dtype=np.int64), PERIOD)
        corpus = self._table.corpus[slot]
        draw = period * self._table.draws[corpus] + self._table.earlier[slot]
        size = np.array(self.sizes, dtype=np.int64)[corpus]
        epoch, sample = np.divmod(draw, size)
        for number in np.unique(corpus).tolist():
            of_corpus = corpus == number
            epochs, which = np.unique(epoch[of_corpus], return_inverse=True)
            keys = np.stack([round_keys(self.seed, number, e) for e in epochs.tolist()], axis=1)
            sample[of_corpus] = permute(sample[of_corpus], self.sizes[number], keys[:, which])
        return Located(corpus=corpus, epoch=epoch, sample=sample)


@dataclass(frozen=True)
class StrideTable:
    """One period of the mixture: for each slot its corpus, and that corpus's earlier slots in the period."""

    corpus: Ints
    earlier: Ints
    draws: Ints
    """Slots each corpus has in the period, [corpora]."""


def stride_table(weights: tuple[float, ...]) -> StrideTable:
    """Spread corpora over `PERIOD` slots by weight; before any slot each has its share to within about one draw."""
    total = sum(weights)
    due, owner = [], []
    for number, weight in enumerate(weights):
        draws = np.arange(int(PERIOD * max(weight, 0.0) / total) + 2) if weight > 0 else np.arange(0)
        due.append((draws + 0.5) / (weight / total if weight > 0 else 1.0))
        owner.append(np.full(len(draws), number, dtype=np.int64))
    corpus = np.concatenate(owner)[np.argsort(np.concatenate(due), kind="stable")][:PERIOD]
    earlier = np.zeros(PERIOD, dtype=np.int64)
    for number in range(len(weights)):
        slots = np.flatnonzero(corpus == number)
        earlier[slots] = np.arange(len(slots))
    return StrideTable(corpus, earlier, np.bincount(corpus, minlength=len(weights)).astype(np.int64))


def permute(numbers: Ints, size: int, keys: Words) -> Ints:
    """A bijection of 0…size-1 for each key: `numbers` [n], `keys` [ROUNDS, n] or [ROUNDS, 1]."""
    bits = (size - 1).bit_length()
    values = numbers.astype(np.uint64)
    keys = np.broadcast_to(keys, (ROUNDS, len(values)))
    values = _feistel(values, bits, keys)
    outside = np.flatnonzero(values >= size)
    while len(outside):
        values[outside] = _feistel(values[outside], bits, keys[:, outside])
        outside = outside[values[outside] >= size]
    return values.astype(np.int64)


def _feistel(values: Words, bits: int, keys: Words) -> Words:
    """Six rounds over `bits` bits: each round xors one half with a hash of the other half and the round's key."""
    low_bits = bits // 2
    low_mask, high_mask = np.uint64((1 << low_bits) - 1), np.uint64((1 << (bits - low_bits)) - 1)
    low, high = values & low_mask, values >> np.uint64(low_bits)
    for number in range(0, ROUNDS, 2):
        high = high ^ (_splitmix64(low + keys[number]) & high_mask)
        low = low ^ (_splitmix64(high + keys[number + 1]) & low_mask)
    return (high << np.uint64(low_bits)) | low


def _splitmix64(z: Words) -> Words:
    """The finaliser of splitmix64 (Steele, Lea, Flood, OOPSLA 2014): every output bit depends on every input bit."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@lru_cache(maxsize=4096)
def round_keys(seed: int, corpus: int, epoch: int) -> npt.NDArray[Any]:
    """Six independent keys, uint64 [ROUNDS]. `SeedSequence` promises the same words in every numpy version."""
    return np.random.SeedSequence(seed, spawn_key=(corpus, epoch)).generate_state(ROUNDS, np.uint64)
