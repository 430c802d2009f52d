"""Which sample comes at which position: a pure function, so that nothing but one integer has to be saved to resume.

A position (0, 1, 2, … over the whole run) is mapped in two steps, both without any array that grows with the corpus:

1. The *stride table* says which corpus the position draws from, and how many times that corpus was drawn before.
   It repeats every 65,536 positions, and within them spreads every corpus as evenly as its weight allows (`mixture`).
2. A corpus of N samples is read in another order each epoch: a *Feistel network* permutes the b bits of the draw's
   number, 2^b being the power of two next above N; results ≥ N are permuted again until they fall below N
   ("cycle-walking": Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002).

The order depends on (seed, corpus, epoch, position) alone: not on ranks, micro-batch, or the length of the run.
Golden vectors in the tests pin it, and the algorithm's name is part of a run's data identity. To change the order is to
add a new algorithm beside this one, as `block_order` does: a `Shuffle` is how an epoch is read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from numpy.random import SeedSequence

from gptscale.data.mixture import PERIOD, MixtureTable, mixture_table
from gptscale.data.mixture import Ints as Ints  # where those who ask for an order look for it
from gptscale.runtime.errors import UserError

ALGORITHM = "feistel6-splitmix64-stride65536-v1"
ROUNDS = 6

Words = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Located:
    """Where positions lead, each [positions]: which corpus, which epoch of it, which of its samples."""

    corpus: Ints
    epoch: Ints
    sample: Ints

    def take(self, indices: Ints | slice) -> Located:
        return Located(self.corpus[indices], self.epoch[indices], self.sample[indices])


class Shuffle(Protocol):
    """In which order an epoch of one corpus is read. A frozen value, so that equal ones mean equal orders."""

    @property
    def identity(self) -> dict[str, Any]:
        """All that decides the order, as JSON, for a run's data identity."""
        ...

    def permute(self, draws: Ints, epochs: Ints, size: int, seed: int, corpus: int) -> Ints:
        """The samples that these draws of a corpus of `size` samples read, [n]: a bijection of 0…size-1 an epoch."""
        ...


@dataclass(frozen=True)
class FullShuffle:
    """Every order of all samples of a corpus is possible: for local disks, where any place is as near as any other."""

    @property
    def identity(self) -> dict[str, Any]:
        return {"algorithm": ALGORITHM}

    def permute(self, draws: Ints, epochs: Ints, size: int, seed: int, corpus: int) -> Ints:
        if epochs.min() == epochs.max():
            return permute(draws, size, keys_of_epochs(epochs[:1], seed, corpus))
        different, which = np.unique(epochs, return_inverse=True)
        return permute(draws, size, keys_of_epochs(different, seed, corpus)[:, which])


FULL = FullShuffle()


@dataclass(frozen=True)
class SampleOrder:
    """The order of samples drawn from corpora of the given `sizes` (in samples) and `weights`.

    A stage of a run goes on with corpora of earlier stages: `numbers` are what keys know them by (by default 0, 1, …),
    `earlier` how often each was drawn before (by default never).
    """

    sizes: tuple[int, ...]
    weights: tuple[float, ...]
    seed: int
    shuffle: Shuffle = FULL
    numbers: tuple[int, ...] = ()
    earlier: tuple[int, ...] = ()
    exact: bool = True
    """Of their mixture; see `mixture_table`."""
    setting: str = "data.path"
    """What the settings call these corpora."""

    def __post_init__(self) -> None:
        assert len(self.sizes) == len(self.weights) > 0
        assert all(0 < size < 2**62 for size in self.sizes), self.sizes
        assert all(len(given) in (0, len(self.sizes)) for given in (self.numbers, self.earlier))
        for number, drawn in enumerate(self._table.draws.tolist()):
            if drawn == 0:
                raise UserError(
                    f"{self.setting}[{number}].weight={self.weights[number]} is too small a share to be drawn\n"
                    f"give it a weight > 0 of at least 1/{PERIOD} of the sum of weights, or leave the corpus out"
                )

    @cached_property
    def _table(self) -> MixtureTable:
        return mixture_table(self.weights, self.exact)

    def locate(self, positions: Ints) -> Located:
        """Where each of `positions` [n] leads. Cheap for windows (85 ns a position), dear one at a time."""
        period, slot = np.divmod(np.asarray(positions, dtype=np.int64), PERIOD)
        mine = self._table.corpus[slot]
        earlier = np.array(self.earlier or [0] * len(self.sizes), dtype=np.int64)
        draw = earlier[mine] + period * self._table.draws[mine] + self._table.earlier[slot]
        epoch, sample = np.divmod(draw, np.array(self.sizes, dtype=np.int64)[mine])
        numbers = np.array(self.numbers or range(len(self.sizes)), dtype=np.int64)
        for index in np.flatnonzero(np.bincount(mine, minlength=len(self.sizes))).tolist():
            of_corpus = mine == index if len(self.sizes) > 1 else slice(None)
            sample[of_corpus] = self.shuffle.permute(
                sample[of_corpus], epoch[of_corpus], self.sizes[index], self.seed, int(numbers[index])
            )
        return Located(corpus=numbers[mine], epoch=epoch, sample=sample)

    def draws(self, positions: int) -> tuple[int, ...]:
        """How often each corpus is drawn by the first `positions` positions, those `earlier` not counted."""
        period, slot = divmod(positions, PERIOD)
        begun = np.bincount(self._table.corpus[:slot], minlength=len(self.sizes))
        return tuple((period * self._table.draws + begun).tolist())


def permute(numbers: Ints, size: int, keys: Words) -> Ints:
    """A bijection of 0…size-1 for each key: `numbers` [n], `keys` [ROUNDS, n] or [ROUNDS, 1]."""
    return _cycle_walk(_feistel, numbers, size, keys)


def unpermute(numbers: Ints, size: int, keys: Words) -> Ints:
    """The inverse of `permute`, which walks the same cycles the other way."""
    return _cycle_walk(_feistel_back, numbers, size, keys)


def _cycle_walk(network: Callable[[Words, int, Words], Words], numbers: Ints, size: int, keys: Words) -> Ints:
    bits = (size - 1).bit_length()
    values = numbers.astype(np.uint64)
    values = network(values, bits, keys)
    outside = np.flatnonzero(values >= size)
    while len(outside):
        values[outside] = network(values[outside], bits, keys if keys.shape[1] == 1 else keys[:, outside])
        outside = outside[values[outside] >= size]
    return values.astype(np.int64)


def _feistel(values: Words, bits: int, keys: Words) -> Words:
    """Six rounds over `bits` bits: each round xors one half with a hash of the other half and the round's key."""
    low, high, low_mask, high_mask = _halves(values, bits)
    for number in range(0, ROUNDS, 2):
        high = high ^ (splitmix64(low + keys[number]) & high_mask)
        low = low ^ (splitmix64(high + keys[number + 1]) & low_mask)
    return (high << np.uint64(bits // 2)) | low


def _feistel_back(values: Words, bits: int, keys: Words) -> Words:
    """The rounds in reverse: an xor undoes itself."""
    low, high, low_mask, high_mask = _halves(values, bits)
    for number in range(ROUNDS - 2, -1, -2):
        low = low ^ (splitmix64(high + keys[number + 1]) & low_mask)
        high = high ^ (splitmix64(low + keys[number]) & high_mask)
    return (high << np.uint64(bits // 2)) | low


def _halves(values: Words, bits: int) -> tuple[Words, Words, np.uint64, np.uint64]:
    """Low and high bits, and the masks of each."""
    low_bits = bits // 2
    low_mask, high_mask = np.uint64((1 << low_bits) - 1), np.uint64((1 << (bits - low_bits)) - 1)
    return values & low_mask, values >> np.uint64(low_bits), low_mask, high_mask


def splitmix64(z: Words) -> Words:
    """The finaliser of splitmix64 (Steele, Lea, Flood, OOPSLA 2014): every output bit depends on every input bit."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@lru_cache(maxsize=4096)
def round_keys(seed: int, corpus: int, epoch: int, *purpose: int) -> npt.NDArray[Any]:
    """Six independent keys, uint64 [ROUNDS]. `SeedSequence` promises the same words in every numpy version."""
    return SeedSequence(seed, spawn_key=(corpus, epoch, *purpose)).generate_state(ROUNDS, np.uint64)


def keys_of_epochs(epochs: Ints, seed: int, corpus: int, *purpose: int) -> Words:
    """The keys of each of `epochs` [n], which are best few: [ROUNDS, n]."""
    return np.stack([round_keys(seed, corpus, epoch, *purpose) for epoch in epochs.tolist()], axis=1)
