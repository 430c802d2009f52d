"""A mixture keeps its shares at every moment, however unequal or alike its weights are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gptscale.config.schema import CorpusConfig
from gptscale.data.mixture import (
    MOST_ERROR,
    PERIOD,
    QUOTA,
    MixtureTable,
    mixture_table,
    quota_table,
    stride_table,
    whole_slots,
)
from gptscale.data.order import SampleOrder
from gptscale.data.stream import TrainingStream

WEIGHTS = st.one_of(
    st.lists(st.floats(0.01, 10), min_size=1, max_size=40),
    st.lists(st.integers(1, 4).map(float), min_size=1, max_size=60),
    st.tuples(st.floats(0.5, 100), st.integers(1, 80)).map(lambda one: [one[0], *[1.0] * one[1]]),
)
GOLDEN_QUOTA = [0, 1, 0, 2, 0, 3, 0, 4, 0, 5, 0, 6]


def drawn_by_definition(table: MixtureTable, until: int) -> np.ndarray:
    """How often each corpus was drawn by each of the first slots, one by one: [until + 1, corpora]."""
    one_hot = table.corpus[:until, None] == np.arange(len(table.draws))
    return np.concatenate([np.zeros((1, len(table.draws)), dtype=np.int64), np.cumsum(one_hot, axis=0)])


@settings(max_examples=60, deadline=None)
@given(WEIGHTS.map(tuple))
@example((10.0, *[1.0] * 10))
@example((0.5, *[0.0005] * 1000))
@example((1.0,))
def test_no_prefix_is_off_by_two_samples(weights: tuple[float, ...]) -> None:
    table = mixture_table(weights)
    share = np.array(weights) / sum(weights)
    assert table.draws.sum() == PERIOD
    # A period is a prefix too; the quota table rounds shares to whole slots and is off by less than that.
    assert np.abs(table.draws - share * PERIOD).max() < (MOST_ERROR if table.algorithm is None else 1)
    assert table.prefix_error < MOST_ERROR
    until = 3000
    drawn = drawn_by_definition(table, until)
    error = np.abs(drawn - np.arange(until + 1)[:, None] * (table.draws / PERIOD)).max()
    assert error < MOST_ERROR
    assert error <= table.prefix_error + 1e-9
    assert np.array_equal(table.earlier[:until], drawn[np.arange(until), table.corpus[:until]])


@settings(max_examples=40, deadline=None)
@given(WEIGHTS.map(tuple))
def test_the_quota_table_keeps_tijdemans_bound(weights: tuple[float, ...]) -> None:
    """1 - 1 / (2n - 2) for n corpora: the best that any order can promise (Tijdeman 1980, theorem 1)."""
    draws = whole_slots(weights)
    table = quota_table(draws)
    assert np.array_equal(table.draws, draws)
    n = len(draws)
    assert table.prefix_error <= (1 - 1 / (2 * n - 2) if n > 1 else 0) + 1e-12


def test_the_error_is_found_where_it_is_largest() -> None:
    """Against every prefix of a table, in plain arithmetic."""
    weights = (5.0, 1.0, 1.0, 1.0, 2.5)
    table = stride_table(weights)
    drawn = drawn_by_definition(table, PERIOD)
    worst = np.abs(drawn * PERIOD - np.arange(PERIOD + 1)[:, None] * table.draws).max() / PERIOD
    assert table.prefix_error == pytest.approx(worst, abs=1e-12)


def test_equal_weights_beside_a_large_one_are_what_the_stride_table_spreads_badly() -> None:
    """Control: without the other table the bound is broken. Where it holds, nothing has changed."""
    weights = (10.0, *[1.0] * 10)
    assert stride_table(weights).prefix_error > 4
    assert mixture_table(weights, exact=False).algorithm is None
    assert mixture_table(weights).algorithm == QUOTA
    assert mixture_table(weights).corpus[:12].tolist() == GOLDEN_QUOTA
    kept = (0.5, 0.2, 0.3)
    assert mixture_table(kept).algorithm is None
    assert np.array_equal(mixture_table(kept).corpus, stride_table(kept).corpus)


def test_shares_are_kept_however_far_a_run_goes() -> None:
    """Nothing adds up from period to period: after a million of them the prefix is as exact as in the first."""
    weights = (7.0, *[1.0] * 13)
    order = SampleOrder((1000,) * 14, weights, 0)
    table = mixture_table(weights)
    for position in (PERIOD * 10**6 + 12_345, 7 * PERIOD - 1, 777):
        drawn = np.array(order.draws(position))
        assert drawn.sum() == position
        assert np.abs(drawn * PERIOD - position * table.draws).max() / PERIOD < 1


def test_the_identity_says_which_table_it_is(prepared: Path) -> None:
    """Of a mixture as it always was, nothing; so runs that began before go on."""
    few = tuple(CorpusConfig(str(prepared), weight) for weight in (3.0, 1.0))
    many = tuple(CorpusConfig(str(prepared), weight) for weight in (10.0, *[1.0] * 10))
    assert "mixture" not in TrainingStream(few, 32, 0).identity
    exact, stride = TrainingStream(many, 32, 0), TrainingStream(many, 32, 0, exact=False)
    assert exact.identity["mixture"] == QUOTA
    assert {key: value for key, value in exact.identity.items() if key != "mixture"} == stride.identity
    assert json.dumps(stride.identity) != json.dumps(exact.identity)
