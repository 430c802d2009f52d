"""The parts that engines' steps are made of: durations, and updates that the kernel skips by itself."""

from __future__ import annotations

import time

import pytest
import torch

from gptscale.parallel.clock import Clock
from gptscale.parallel.gradients import gradient_norm, prepare_update, release_kernel


def test_laps_follow_one_another() -> None:
    started_s = time.perf_counter()
    clock = Clock(torch.device("cpu"))
    time.sleep(0.02)
    first = clock.lap()
    second = clock.lap()
    assert 0.02 <= first.seconds() <= time.perf_counter() - started_s
    assert 0 <= second.seconds() < first.seconds()


def parameters() -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    made = [torch.nn.Parameter(torch.randn(5, 3)), torch.nn.Parameter(torch.randn(7))]
    for parameter in made:
        parameter.grad = torch.randn_like(parameter)
    return made


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("limit", "factor"), [(0.0, 1.0), (0.5, 1.0), (0.5, 64.0), (0.0, 64.0), (1e6, 64.0)])
def test_an_update_is_unscaled_and_clipped(fused: bool, limit: float, factor: float) -> None:
    expected, made = parameters(), parameters()
    if limit:
        torch.nn.utils.clip_grad_norm_(expected, limit)
    torch.optim.AdamW(expected, lr=0.1, foreach=True).step()
    for parameter in made:
        assert parameter.grad is not None
        parameter.grad *= factor
    optimizer = torch.optim.AdamW(made, lr=0.1, fused=fused)
    assert prepare_update(optimizer, made, gradient_norm(made) / factor, limit, factor)
    optimizer.step()
    release_kernel(optimizer)
    for one, other in zip(expected, made, strict=True):
        assert torch.allclose(one, other, atol=1e-6)
        state = optimizer.state[other]
        assert float(state["step"]) == 1
    assert getattr(optimizer, "grad_scale", None) is None
    assert getattr(optimizer, "found_inf", None) is None


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_changes_neither_weights_nor_state(bad: float) -> None:
    made = parameters()
    optimizer = torch.optim.AdamW(made, lr=0.1, fused=True)
    optimizer.step()
    before = [p.detach().clone() for p in made] + [v.clone() for p in made for v in optimizer.state[p].values()]
    assert made[0].grad is not None
    made[0].grad[0, 0] = bad
    assert prepare_update(optimizer, made, gradient_norm(made), 1.0)
    optimizer.step()
    release_kernel(optimizer)
    after = [p.detach() for p in made] + [v for p in made for v in optimizer.state[p].values()]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    slow = torch.optim.AdamW(made, lr=0.1, foreach=True)
    assert not prepare_update(slow, made, gradient_norm(made), 1.0), "it has to be told not to step"
