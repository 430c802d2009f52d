from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gptscale.data import order
from gptscale.data.mixture import PERIOD, stride_table
from gptscale.data.order import ROUNDS, SampleOrder, permute, round_keys
from gptscale.runtime.errors import UserError

GOLDEN_1000 = [491, 468, 294, 415, 716, 121, 506, 795]
GOLDEN_FAR = [214364908741, 566522849385, 98790782823, 268506297937, 349703074477]
GOLDEN_CORPUS = [0, 2, 1, 0, 0, 2, 0, 0, 1]
GOLDEN_EPOCH = [0, 0, 0, 0, 0, 0, 0, 655, 28570992]
GOLDEN_SAMPLE = [36, 593, 6, 1, 27, 880, 22, 38, 5]
GOLDEN_KEYS = [
    2635072618980576772,
    8565498584995198975,
    8661801837256207805,
    3958620049006050990,
    11564225252920606777,
    14914284865219539909,
]


def test_the_order_of_one_corpus_is_pinned() -> None:
    """Checkpoints name the algorithm; if this fails, every one of them resumes with other samples."""
    assert order.ALGORITHM == "feistel6-splitmix64-stride65536-v1"
    located = SampleOrder((1000,), (1.0,), seed=1234).locate(np.arange(8))
    assert located.sample.tolist() == GOLDEN_1000
    far = SampleOrder((10**12 + 7,), (1.0,), seed=2**63).locate(np.array([0, 1, 10**12 + 6, 10**12 + 7, 10**15]))
    assert far.sample.tolist() == GOLDEN_FAR
    assert far.epoch.tolist() == [0, 0, 0, 1, 999]


def test_the_order_of_a_mixture_is_pinned() -> None:
    located = SampleOrder((50, 7, 1000), (0.5, 0.2, 0.3), seed=7).locate(
        np.array([0, 1, 2, 3, 4, 5, 99, 65_536, 10**9])
    )
    assert located.corpus.tolist() == GOLDEN_CORPUS
    assert located.epoch.tolist() == GOLDEN_EPOCH
    assert located.sample.tolist() == GOLDEN_SAMPLE


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 5000), st.integers(0, 2**64), st.integers(0, 100))
@example(1, 0, 0)
@example(2, 0, 0)
@example(4096, 0, 0)
@example(4097, 0, 0)
def test_every_sample_comes_once_an_epoch(size: int, seed: int, epoch: int) -> None:
    positions = np.arange(epoch * size, (epoch + 1) * size)
    located = SampleOrder((size,), (1.0,), seed).locate(positions)
    assert np.array_equal(np.sort(located.sample), np.arange(size))
    assert (located.epoch == epoch).all()


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 300), st.floats(0.05, 10)), min_size=1, max_size=5),
    st.integers(0, 3 * PERIOD),
    st.integers(0, 2**32),
)
def test_every_corpus_of_a_mixture_is_read_through_before_it_repeats(
    corpora: list[tuple[int, float]], start: int, seed: int
) -> None:
    sizes, weights = zip(*corpora, strict=True)
    mixed = SampleOrder(sizes, weights, seed)
    located = mixed.locate(np.arange(start, start + 2000))
    for number, size in enumerate(sizes):
        mine = located.corpus == number
        seen = np.stack([located.epoch[mine], located.sample[mine]], axis=1)
        assert len(np.unique(seen, axis=0)) == mine.sum()
        assert (np.diff(located.epoch[mine]) >= 0).all()
        for epoch in np.unique(located.epoch[mine])[1:-1]:
            assert (located.epoch[mine] == epoch).sum() == size


def test_any_window_gives_the_same_order() -> None:
    mixed = SampleOrder((1000, 77), (3.0, 1.0), seed=5)
    whole = mixed.locate(np.arange(5000))
    shuffled = np.random.default_rng(0).permutation(5000)
    part = mixed.locate(shuffled)
    for field in ("corpus", "epoch", "sample"):
        assert np.array_equal(getattr(part, field), getattr(whole, field)[shuffled])
    alone = [mixed.locate(np.array([position])).sample[0] for position in range(50)]
    assert alone == whole.sample[:50].tolist()


def test_seeds_epochs_and_corpora_are_read_in_different_orders() -> None:
    size = 10_000
    first = SampleOrder((size,), (1.0,), 0).locate(np.arange(2 * size)).sample
    orders = [
        first[:size],
        first[size:],
        SampleOrder((size,), (1.0,), 1).locate(np.arange(size)).sample,
        permute(np.arange(size), size, round_keys(0, 1, 0)[:, None]),
        np.arange(size),
    ]
    for one in range(len(orders)):
        for other in range(one):
            # Two random orders agree in one place on average (Poisson).
            assert (orders[one] == orders[other]).sum() < 10


def test_a_mixture_follows_its_weights_at_every_moment() -> None:
    weights = tuple(float(weight) for weight in np.random.default_rng(0).dirichlet(np.ones(37)) + 1e-3)
    table = stride_table(weights)
    shares = np.array(weights) / sum(weights)
    drawn = np.zeros(len(weights))
    worst = 0.0
    for slot, corpus in enumerate(table.corpus.tolist()):
        assert table.earlier[slot] == drawn[corpus]
        drawn[corpus] += 1
        if slot % 7 == 0:
            worst = max(worst, float(np.abs(drawn - shares * (slot + 1)).max()))
    assert worst < 1.5
    assert table.draws.sum() == PERIOD
    assert np.array_equal(drawn, table.draws)


def test_a_weight_too_small_to_be_drawn_is_refused() -> None:
    with pytest.raises(UserError, match=r"data\.path\[1\]\.weight"):
        SampleOrder((10, 10), (1.0, 1e-7), 0)
    with pytest.raises(UserError, match=r"data\.path\[0\]\.weight"):
        SampleOrder((10, 10), (0.0, 1.0), 0)


def _bit_correlation(outputs: np.ndarray, bits: int) -> float:
    """Largest |correlation| between an output bit and the parity of one or two neighbouring input bits."""
    inputs = np.arange(len(outputs))
    worst = 0.0
    for i in range(bits):
        for parity in (inputs >> i & 1, (inputs >> i ^ inputs >> (i + 1)) & 1):
            for o in range(bits):
                agree = np.mean((outputs >> o & 1) == parity)
                worst = max(worst, abs(2 * float(agree) - 1))
    return worst


def test_output_bits_do_not_follow_input_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    bits = 16
    keys = round_keys(0, 0, 0)[:, None]
    outputs = permute(np.arange(1 << bits), 1 << bits, keys)
    # 512 correlations of 65,536 fair coins each: the largest is about 3.3 standard deviations, 0.013.
    assert _bit_correlation(outputs, bits) < 5 / math.sqrt(1 << bits)
    # Control: a round that only multiplies and adds passes low bits straight through, and the same test sees it.
    monkeypatch.setattr(order, "splitmix64", lambda z: z * np.uint64(0x9E3779B97F4A7C15))
    assert _bit_correlation(permute(np.arange(1 << bits), 1 << bits, keys), bits) > 0.2


def test_samples_of_a_batch_lie_as_if_drawn_at_random() -> None:
    """Gaps between the sorted samples of a batch are exponential; a lattice would have hardly any small ones."""
    size, batch = 1 << 24, 512
    gaps = []
    for start in range(0, 40 * batch, batch):
        chosen = np.sort(SampleOrder((size,), (1.0,), 3).locate(np.arange(start, start + batch)).sample)
        gaps.append(np.diff(chosen))
    near = np.mean(np.concatenate(gaps) < 0.1 * size / batch)
    assert near == pytest.approx(1 - math.exp(-0.1), rel=0.1)


def test_keys_are_what_numpy_promises() -> None:
    assert round_keys(0, 0, 0).tolist() == GOLDEN_KEYS
    assert len(round_keys(0, 0, 0)) == ROUNDS
