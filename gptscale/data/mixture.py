"""Which corpus each position of a mixture draws from: a table that repeats, exact in every prefix.

Before any position a corpus has been drawn its share of times, to within less than two samples. The *stride* table is
the Sainte-Laguë order: the k-th draw of a corpus of weight w is due at time (k + ½) / w. It is within about one sample
where weights differ; but corpora of equal weights are due all at once, and while they wait a larger one is drawn in
their place (1 of weight 0.5 beside 10 of 0.05: two and a half samples; beside 1000 of 0.0005: 250). A mixture that it
would spread so takes the *quota* table: Tijdeman's solution of the chairman assignment problem (Discrete Mathematics
32, 1980), within less than one sample for any weights. It takes longer to make, 0.1 s.

Shares are whole slots of the period, and the table's own are what its prefixes are exact in, however far a run goes.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

PERIOD = 65_536
"""Positions after which a table repeats."""
MOST_ERROR = 2
"""Samples: no prefix may be off by so many."""
QUOTA = "quota65536-v1"
"""What the data identity of a mixture with a quota table says."""


@dataclass(frozen=True)
class MixtureTable:
    """One period of the mixture: for each slot its corpus, and that corpus's earlier slots in the period."""

    corpus: Ints
    earlier: Ints
    draws: Ints
    """Slots each corpus has in the period, [corpora]."""
    algorithm: str | None = None
    """None: the stride table, which was there before there was another."""

    @property
    def prefix_error(self) -> float:
        """The most samples by which any corpus, before any slot, is ahead of its share of the table or behind it."""
        slot = np.arange(PERIOD)
        before = self.earlier * PERIOD - slot * self.draws[self.corpus]  # at its lowest just before a draw
        after = before + PERIOD - self.draws[self.corpus]  # at its highest just after one
        return float(max(np.abs(before).max(), np.abs(after).max())) / PERIOD


def stride_table(weights: tuple[float, ...]) -> MixtureTable:
    """Spread corpora over `PERIOD` slots by weight, each draw at the middle of its time."""
    total = sum(weights)
    due, owner = [], []
    for number, weight in enumerate(weights):
        draws = np.arange(int(PERIOD * max(weight, 0.0) / total) + 2) if weight > 0 else np.arange(0)
        due.append((draws + 0.5) / (weight / total if weight > 0 else 1.0))
        owner.append(np.full(len(draws), number, dtype=np.int64))
    return _table(np.concatenate(owner)[np.argsort(np.concatenate(due), kind="stable")][:PERIOD], len(weights))


def quota_table(draws: Ints) -> MixtureTable:
    """Spread corpora over `PERIOD` slots, `draws` [corpora] of them to each: Tijdeman's order, in whole numbers.

    With n corpora no prefix is off by more than 1 - 1 / (2n - 2) samples, if the k-th draw of each comes no earlier and
    no later than that allows. Such an order there is, and it is found by drawing, at any slot, what may be drawn and
    has to be first.
    """
    assert draws.sum() == PERIOD
    corpora = np.repeat(np.arange(len(draws)), draws)
    number = np.arange(PERIOD) - np.repeat(np.cumsum(draws) - draws, draws)
    # In units of 1 / (2n - 2) samples; slots count from 1.
    unit, of_corpus = max(2, 2 * len(draws) - 2), draws[corpora]
    first = -(-(number * unit + 1) * PERIOD // (unit * of_corpus))
    last = (number * unit + unit - 1) * PERIOD // (unit * of_corpus) + 1
    by_release = np.argsort(first, kind="stable")
    waiting: list[tuple[int, int]] = []
    corpus = np.empty(PERIOD, dtype=np.int64)
    jobs = zip(first[by_release].tolist(), last[by_release].tolist(), corpora[by_release].tolist(), strict=True)
    release, deadline, owner = next(jobs)
    for slot in range(1, PERIOD + 1):
        while release <= slot:
            heapq.heappush(waiting, (deadline, owner))
            release, deadline, owner = next(jobs, (PERIOD + 1, 0, 0))
        corpus[slot - 1] = heapq.heappop(waiting)[1]
    return _table(corpus, len(draws), QUOTA)


@lru_cache(maxsize=16)
def mixture_table(weights: tuple[float, ...], exact: bool = True) -> MixtureTable:
    """The table of these weights; without `exact` always the stride table, as runs had it before there was another.

    One with a corpus that is never drawn is no mixture; its caller refuses it.
    """
    if len(weights) == 1:
        return _table(np.zeros(PERIOD, dtype=np.int64), 1)
    table = stride_table(weights)
    if exact and table.draws.all() and table.prefix_error >= MOST_ERROR:
        return quota_table(whole_slots(weights))
    return table


def whole_slots(weights: tuple[float, ...]) -> Ints:
    """Each corpus's slots, [corpora]: its share of the period rounded down, and one more where most was cut off."""
    slots = np.array(weights) / sum(weights) * PERIOD
    draws = np.floor(slots).astype(np.int64)
    draws[np.argsort(draws - slots, kind="stable")[: PERIOD - draws.sum()]] += 1
    return draws


def _table(corpus: Ints, corpora: int, algorithm: str | None = None) -> MixtureTable:
    earlier = np.zeros(PERIOD, dtype=np.int64)
    for number in range(corpora):
        slots = np.flatnonzero(corpus == number)
        earlier[slots] = np.arange(len(slots))
    return MixtureTable(corpus, earlier, np.bincount(corpus, minlength=corpora).astype(np.int64), algorithm)
