"""Does an order mix like a true permutation? What of its numbers depends on what, counted beside numpy's shuffle.

Every statistic is standardised by its mean and deviation over true permutations, which are known in closed form, and
has to lie within 5 deviations. A true permutation is beyond that once in 1.7 million correlations (normal), in 185,000
tables of pairs (chi-square, 225 degrees of freedom) and in 2,200 tables of gaps (9 degrees). Of the thousands of
correlations, hundreds of tables of pairs and three of gaps here some would be beyond it for about one choice of seeds
in a hundred, and the seeds are fixed. Too small a value is as bad as too large a one: a lattice is more even than
chance. `shuffled` is numpy's own permutation, which has to pass what the orders have to pass, and `lattice` a bijection
that mixes nothing, which must not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from gptscale.data.block_order import BlockShuffle
from gptscale.data.order import FULL, Ints, SampleOrder

DEVIATIONS = 5.0
SIZES = (1 << 16, 60_000, (1 << 16) + 1)
"""A power of two, where no cycle is walked; one that walks few, and one that walks as many as any."""
Make = Callable[[int, int, int], Ints]


def full(size: int, seed: int, epoch: int) -> Ints:
    return SampleOrder((size,), (1.0,), seed, FULL).locate(np.arange(epoch * size, (epoch + 1) * size)).sample


def blocks(size: int, seed: int, epoch: int) -> Ints:
    """How blocks follow one another: those of one sample, each a window of its own."""
    order = SampleOrder((size,), (1.0,), seed, BlockShuffle(1, 1))
    return order.locate(np.arange(epoch * size, (epoch + 1) * size)).sample


def within_window(size: int, seed: int, epoch: int) -> Ints:
    """How samples follow one another in a window: the first one of several, as long as `size`."""
    order = SampleOrder((4 * size,), (1.0,), seed, BlockShuffle(size, 1))
    return order.locate(np.arange(epoch * 4 * size, epoch * 4 * size + size)).sample % size


def next_window(size: int, seed: int, epoch: int) -> Ints:
    """The same of the window after it, for what it has to do with the first."""
    order = SampleOrder((4 * size,), (1.0,), seed, BlockShuffle(size, 1))
    return order.locate(np.arange(size, 2 * size) + epoch * 4 * size).sample % size


def shuffled(size: int, seed: int, epoch: int) -> Ints:
    return np.random.default_rng((seed, epoch)).permutation(size)


def lattice(size: int, seed: int, epoch: int) -> Ints:
    """i ↦ a·i + c: as even as can be, and nothing like chance."""
    return (np.arange(size) * 40_503 + seed + epoch) % size


ORDERS = [full, blocks, within_window, shuffled]


def pairs(first: Ints, second: Ints, size: int, cells: int = 16) -> float:
    """Chi-square of (first, second) over cells × cells equal squares, in deviations from its mean.

    Both take each value once, so that rows and columns hold the same counts in any permutation: (cells - 1)² degrees of
    freedom, whose mean is that and whose variance is twice that.
    """
    table = np.zeros((cells, cells))
    np.add.at(table, (first * cells // size, second * cells // size), 1)
    rows, columns = table.sum(axis=1, keepdims=True), table.sum(axis=0, keepdims=True)
    expected = rows * columns / table.sum()
    freedom = (cells - 1) ** 2
    return float(((table - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("make", ORDERS)
def test_pairs_at_any_distance_are_as_if_drawn(make: Make, size: int) -> None:
    """Neighbours in time, a batch apart, half an epoch apart: what comes now says nothing about what comes then."""
    for seed in (0, 1):
        order = make(size, seed, 0)
        for distance in (1, 2, 3, 16, 255, 256, 4096, size // 2):
            assert abs(pairs(order[:-distance], order[distance:], size)) < DEVIATIONS, (seed, distance)
        assert abs(pairs(np.arange(size), order, size)) < DEVIATIONS, "the time says nothing about the place"


@pytest.mark.parametrize("make", ORDERS)
def test_epochs_seeds_and_windows_have_nothing_to_do_with_one_another(make: Make) -> None:
    size = 60_000
    first = make(size, 0, 0)
    others = [make(size, 0, 1), make(size, 0, 2), make(size, 1, 0), make(size, 2**40, 0)]
    if make is within_window:
        others.append(next_window(size, 0, 0))
    for other in others:
        assert abs(pairs(first, other, size)) < DEVIATIONS
        # As many agree as in a true permutation: 1 on average, Poisson (8 or more: once in 100,000).
        assert (first == other).sum() < 8


def test_a_lattice_is_seen_by_pairs() -> None:
    """Control: the statistic knows what is no permutation drawn at random, by too much and by too little."""
    for size in SIZES:
        order = lattice(size, 0, 0)
        values = [pairs(order[:-distance], order[distance:], size) for distance in (1, 2, 16, 256)]
        assert max(abs(value) for value in values) > 100
        assert abs(pairs(np.arange(size), order, size)) > DEVIATIONS


def bit_correlations(order: Ints, bits: int) -> npt.NDArray[Any]:
    """Of every output bit with every input bit and with the parity of every two input bits, in deviations.

    Over a power of two each bit, and each parity, is one in half of the places; of those that an output bit is one at,
    the number is hypergeometric, and the correlation's deviation 1 / √(n - 1).
    """
    inputs = np.arange(len(order))
    single = [inputs >> i & 1 for i in range(bits)]
    parities = single + [single[i] ^ single[j] for i in range(bits) for j in range(i)]
    left = 1 - 2 * np.stack(parities).astype(np.float32)
    right = 1 - 2 * np.stack([order >> o & 1 for o in range(bits)]).astype(np.float32)
    return (left @ right.T) / len(order) * math.sqrt(len(order) - 1)


@pytest.mark.parametrize("make", [*ORDERS, lattice])
def test_output_bits_follow_no_input_bits(make: Make) -> None:
    """2,176 correlations an order: the largest of so many is about 3.6 deviations, and 5 is passed once in 800."""
    bits = 16
    worst = max(
        float(np.abs(bit_correlations(make(1 << bits, seed, epoch), bits)).max()) for seed, epoch in ((0, 0), (5, 3))
    )
    assert (worst > 100) if make is lattice else (worst < DEVIATIONS)


def gaps(order: Ints, size: int, batch: int, bins: int = 10) -> float:
    """Chi-square of the gaps between the sorted samples of batches, over bins that are as likely, in deviations.

    Of n places drawn at random a gap, as a share of all, is larger than x with probability (1 - x)ⁿ. Of a batch's gaps
    n - 1 are counted, which hang together by less than one in n: too little to be seen here.
    """
    whole = order[: len(order) // batch * batch].reshape(-1, batch)
    found = np.diff(np.sort(whole, axis=1), axis=1).ravel() / size
    edges = 1 - (1 - np.arange(1, bins) / bins) ** (1 / batch)
    counts = np.bincount(np.searchsorted(edges, found), minlength=bins)
    expected = len(found) / bins
    return float(((counts - expected) ** 2 / expected).sum() - (bins - 1)) / math.sqrt(2 * (bins - 1))


@pytest.mark.parametrize("make", [*ORDERS, lattice])
def test_gaps_between_neighbours_of_a_batch_are_as_if_drawn(make: Make) -> None:
    """A batch of few of many samples; neither clustered nor spread out more than chance has it."""
    size, batch = 1 << 22, 64
    value = gaps(part_of(make, size, 256 * batch), size, batch)
    assert (abs(value) > 100) if make is lattice else (abs(value) < DEVIATIONS)


def part_of(make: Make, size: int, count: int) -> Ints:
    """The first `count` of an order of `size`, without the rest where that can be had."""
    if make in (full, blocks):
        shuffle = FULL if make is full else BlockShuffle(1, 1)
        return SampleOrder((size,), (1.0,), 0, shuffle).locate(np.arange(count)).sample
    if make is within_window:
        return SampleOrder((4 * size,), (1.0,), 0, BlockShuffle(size, 1)).locate(np.arange(count)).sample % size
    return make(size, 0, 0)[:count]


def test_blocks_of_a_real_window_are_mixed_evenly() -> None:
    """Of 16 blocks of 256 samples, each quarter of a window holds as many of every block as chance has it.

    A table of 16 blocks × 4 quarters with all margins fixed: 45 degrees of freedom, 200 windows together.
    """
    shuffle, windows = BlockShuffle(256, 16), 200
    order = SampleOrder((4096 * windows,), (1.0,), 0, shuffle).locate(np.arange(4096 * windows)).sample
    total = 0.0
    for window in order.reshape(windows, 4, 1024):
        _, block = np.unique(window // 256, return_inverse=True)
        counts = np.stack([np.bincount(quarter, minlength=16) for quarter in block.reshape(4, 1024)])
        total += float(((counts - 64) ** 2 / 64).sum()) * 4095 / 4096  # drawn without replacement, from 4096
    freedom = 45 * windows
    assert abs(total - freedom) / math.sqrt(2 * freedom) < DEVIATIONS


@pytest.mark.parametrize("shuffle", [FULL, BlockShuffle(4, 3), BlockShuffle(256, 16)])
def test_every_epoch_is_a_permutation_of_many_sizes(shuffle: Any) -> None:
    """All small sizes, and those next to powers of two, where cycle-walking begins and ends; several epochs each."""
    sizes = [*range(1, 40), *(2**bits + near for bits in range(6, 14) for near in (-1, 0, 1)), 10_007, 4095 * 3]
    for size in sizes:
        epochs = 3
        found = SampleOrder((size,), (1.0,), 11, shuffle).locate(np.arange(epochs * size))
        assert np.array_equal(
            np.sort(found.sample.reshape(epochs, size), axis=1), np.tile(np.arange(size), (epochs, 1))
        )
