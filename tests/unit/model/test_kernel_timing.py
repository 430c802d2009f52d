"""Kernels timed against each other: what is measured, what is left out, and what it takes to be chosen."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from gptscale.model.documents import Documents
from gptscale.model.kernel_timing import LEAST_ROUNDS, WORTH_IT, Heads, _Inputs, fastest, time_kernels
from gptscale.model.kernels import KERNELS, Case
from tests.helpers.attention import packed

CASE = Case(torch.device("cpu"), torch.float32, 64, 16, 0.0, None, False)
HEADS = Heads(4, 2, 16)


def timed(reports: list[str], case: Case = CASE, budget_s: float = 0.5, **options: Any) -> dict[str, float]:
    names = options.pop("names", ["sdpa", "blocked"])
    asked = {"heads": HEADS, "sequences": 3, "starts_BT": None} | options
    return dict(time_kernels(names, case, budget_s=budget_s, report=reports.append, **asked))


def test_every_kernel_is_timed_within_the_budget() -> None:
    torch.manual_seed(5)
    before, reports = torch.get_rng_state(), []
    began_s = time.monotonic()
    times_s = timed(reports)
    assert time.monotonic() - began_s < 5
    assert set(times_s) == {"sdpa", "blocked"}
    assert all(0 < seconds < 0.5 for seconds in times_s.values())
    assert not reports
    assert torch.equal(torch.get_rng_state(), before)
    # Dropout too, with the generator left alone; and documents, of which there may be fewer rows than sequences.
    starts_BT = packed([30, 34], [64])
    assert set(timed(reports, CASE._replace(dropout=0.1), names=["blocked"])) == {"blocked"}
    assert set(timed(reports, CASE._replace(documents=True), names=["blocked"], starts_BT=starts_BT)) == {"blocked"}
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("turn_s", "q_shape", "k_shape"),
    [
        (0.001, (3, 64, 4, 16), (3, 64, 2, 16)),  # the whole micro-batch fits
        (0.02, (1, 64, 4, 16), (1, 64, 2, 16)),  # one sequence does
        (0.05, (1, 64, 2, 16), (1, 64, 1, 16)),  # one group of heads
        (0.2, None, None),  # nothing
    ],
)
def test_what_is_timed_is_the_shape_or_a_part_of_it(
    turn_s: float,
    q_shape: tuple[int, ...] | None,
    k_shape: tuple[int, ...] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a clock of our own: one sequence with one group of heads takes `turn_s`, out of 0.5 s for everything."""
    shapes = []

    def seconds(inputs: _Inputs, name: str) -> float:
        shapes.append([tuple(x.shape) for x in inputs.qkv])
        return turn_s

    monkeypatch.setattr(_Inputs, "seconds", seconds)
    times_s = timed([])
    if q_shape is None:
        assert times_s == {}
    else:
        assert times_s == {"sdpa": turn_s, "blocked": turn_s}
        assert shapes[-1] == [q_shape, k_shape, k_shape]
        assert shapes.count(shapes[-1]) >= 2 * LEAST_ROUNDS


def test_a_kernel_that_fails_or_computes_something_else_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Tensor:
        raise RuntimeError("no compiler on this machine")

    def one_token_further(
        q: Tensor, k: Tensor, v: Tensor, dropout: float, window: int | None, documents: Documents | None
    ) -> Tensor:
        return KERNELS["blocked"].attend(q, k, v, dropout, 63, documents)  # a window one short of the whole sequence

    monkeypatch.setitem(KERNELS, "flex", replace(KERNELS["flex"], attend=broken))
    monkeypatch.setitem(KERNELS, "flash", replace(KERNELS["flash"], attend=one_token_further))
    reports: list[str] = []
    times_s = timed(reports, names=["sdpa", "blocked", "flex", "flash"])
    assert set(times_s) == {"sdpa", "blocked"}
    assert len(reports) == 2
    assert "flex fails here" in reports[0]
    assert "no compiler" in reports[0]
    assert "flash is off by" in reports[1]


def test_the_rules_kernel_is_kept_unless_another_is_clearly_faster() -> None:
    assert fastest({"sdpa": 1.0, "blocked": 1.0 / WORTH_IT * 0.99}, "sdpa") == "blocked"
    assert fastest({"sdpa": 1.0, "blocked": 1.0 / WORTH_IT * 1.01}, "sdpa") == "sdpa"
    assert fastest({"sdpa": 1.0, "blocked": 2.0, "flex": 0.5, "flash": 0.4}, "sdpa") == "flash"
    assert fastest({"blocked": 1.0}, "blocked") == "blocked"
