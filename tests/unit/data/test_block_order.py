"""Block order: exact once an epoch, near in time what lies near, pinned."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gptscale.config.schema import DataConfig
from gptscale.data.block_order import BLOCK_ALGORITHM, BlockShuffle, shuffle_of
from gptscale.data.order import FULL, Ints, SampleOrder, Shuffle, permute, round_keys, unpermute

GOLDEN_1000 = [914, 28, 293, 300, 0, 901, 722, 18]
GOLDEN_FAR = [282750804455, 465459225562, 221125403927, 691772676122, 451850516131]
GOLDEN_MIXED = [13, 170, 4, 30, 14, 766, 42, 16, 6]


def order(size: int, block: int, window: int, seed: int = 0) -> SampleOrder:
    return SampleOrder((size,), (1.0,), seed, BlockShuffle(block, window))


def test_the_block_order_is_pinned() -> None:
    """Checkpoints name the algorithm; if this fails, every one of them resumes with other samples."""
    shuffle = BlockShuffle(256, 16)
    assert shuffle.identity == {
        "algorithm": "block-feistel6-splitmix64-stride65536-v1",
        "block_sequences": 256,
        "window_blocks": 16,
    }
    assert order(1000, 32, 4, seed=1234).locate(np.arange(8)).sample.tolist() == GOLDEN_1000
    far = order(10**12 + 7, 256, 16, seed=2**63).locate(np.array([0, 1, 10**12 + 6, 10**12 + 7, 10**15]))
    assert far.sample.tolist() == GOLDEN_FAR
    assert far.epoch.tolist() == [0, 0, 0, 1, 999]
    mixed = SampleOrder((50, 7, 1000), (0.5, 0.2, 0.3), 7, BlockShuffle(8, 2)).locate(
        np.array([0, 1, 2, 3, 4, 5, 99, 65_536, 10**9])
    )
    assert mixed.sample.tolist() == GOLDEN_MIXED


def test_the_default_is_the_full_order() -> None:
    assert shuffle_of(DataConfig()) == FULL
    assert shuffle_of(DataConfig(order="block", block_sequences=8, window_blocks=2)) == BlockShuffle(8, 2)
    assert FULL.identity["algorithm"] != BLOCK_ALGORITHM


SIZES = [1, 2, 3, 4, 5, 7, 8, 9, 255, 256, 257, 511, 512, 513, 1023, 1024, 1025, 4095, 4096, 4097]


@settings(max_examples=60, deadline=None)
@given(
    st.one_of(st.sampled_from(SIZES), st.integers(1, 5000)),
    st.integers(1, 600),
    st.integers(1, 20),
    st.integers(0, 2**64),
    st.integers(0, 100),
)
@example(1, 256, 16, 0, 0)
@example(4096, 256, 16, 0, 0)
@example(4097, 256, 16, 0, 0)
@example(4095, 256, 16, 0, 0)
@example(5000, 1, 1, 0, 0)
def test_every_sample_comes_once_an_epoch_and_near_its_neighbours(
    size: int, block: int, window: int, seed: int, epoch: int
) -> None:
    """Every epoch is a permutation; the draws of a window are those of whole blocks, so that no block is fetched twice,
    and no more than `window` blocks have to be at hand."""
    located = order(size, block, window, seed).locate(np.arange(epoch * size, (epoch + 1) * size))
    assert np.array_equal(np.sort(located.sample), np.arange(size))
    assert (located.epoch == epoch).all()
    of_block = located.sample // block
    first, last = first_and_last(of_block)
    assert ((last - first) < block * window).all()
    # Windows begin where every block before has ended; there are as many as whole windows of blocks, in any order.
    begins = [draw for draw in range(size) if draw == first_open(first, last, draw)]
    blocks = -(-size // block)
    assert len(begins) >= -(-blocks // window)


def first_and_last(of_block: Ints) -> tuple[Ints, Ints]:
    """The draws at which each block is first and last read."""
    blocks = int(of_block.max()) + 1
    first, last = np.full(blocks, len(of_block)), np.zeros(blocks, dtype=np.int64)
    np.minimum.at(first, of_block, np.arange(len(of_block)))
    np.maximum.at(last, of_block, np.arange(len(of_block)))
    return first, last


def first_open(first: Ints, last: Ints, draw: int) -> int:
    """The first draw of any block that is not read to its end before `draw`."""
    return int(first[last >= draw].min())


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 10**12), st.integers(0, 2**40), st.integers(0, 2**64))
def test_the_inverse_undoes_the_permutation(size: int, number: int, seed: int) -> None:
    numbers = np.array([number % size, 0, size - 1])
    keys = round_keys(seed, 0, 0)[:, None]
    assert np.array_equal(unpermute(permute(numbers, size, keys), size, keys), numbers)
    assert np.array_equal(permute(unpermute(numbers, size, keys), size, keys), numbers)


def test_any_window_of_positions_gives_the_same_order() -> None:
    mixed = SampleOrder((1000, 77), (3.0, 1.0), 5, BlockShuffle(16, 3))
    whole = mixed.locate(np.arange(5000))
    shuffled = np.random.default_rng(0).permutation(5000)
    part = mixed.locate(shuffled)
    for field in ("corpus", "epoch", "sample"):
        assert np.array_equal(getattr(part, field), getattr(whole, field)[shuffled])
    alone = [mixed.locate(np.array([position])).sample[0] for position in range(50)]
    assert alone == whole.sample[:50].tolist()


def test_the_short_last_block_comes_anywhere() -> None:
    """11 blocks of 8, the last one of 3: over 400 epochs it begins at each of 11 places about as often.

    Bound: 36 of 400 are expected at a place; ± 5 standard deviations of a binomial is ± 29.
    """
    size, block, epochs = 83, 8, 400
    located = order(size, block, 1).locate(np.arange(size * epochs)).sample.reshape(epochs, size)
    at = (located == 82).argmax(axis=1) // block
    counts = np.bincount(at, minlength=11)
    assert len(counts) == 11
    assert np.abs(counts - epochs / 11).max() < 29


def test_windows_epochs_and_corpora_are_mixed_differently() -> None:
    """Within a window of 8192 two random orders agree at one place on average (Poisson)."""
    window = 8192
    shuffle = BlockShuffle(window, 1)
    draws, none = np.arange(2 * window), np.zeros(2 * window, dtype=np.int64)
    inside = [
        shuffle.permute(draws, none + epoch, 4 * window, seed, corpus) % window
        for epoch, seed, corpus in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))
    ]
    orders = [part for one in inside for part in (one[:window], one[window:])]
    orders += [np.arange(window), permute(np.arange(window), window, round_keys(0, 0, 0)[:, None])]
    for one in range(len(orders)):
        for other in range(one):
            assert (orders[one] == orders[other]).sum() < 10


@pytest.mark.parametrize("shuffle", [FULL, BlockShuffle(256, 16)])
def test_a_place_far_away_is_found_as_fast_as_the_first(shuffle: Shuffle) -> None:
    """No array grows with the corpus or the position: the order of a petabyte's samples fits in a fresh object."""
    huge = SampleOrder((2**50 + 3, 2**44), (0.9, 0.1), 0, shuffle)
    located = huge.locate(np.arange(2**60, 2**60 + 4096))
    assert located.sample.min() >= 0
    assert (located.sample < np.array(huge.sizes)[located.corpus]).all()
    assert len({*zip(located.corpus.tolist(), located.sample.tolist(), strict=True)}) == 4096
