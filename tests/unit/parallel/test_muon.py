"""Muon's mathematics against independent oracles; the same on ranks is shown by tests/parity."""

from __future__ import annotations

import math

import pytest
import torch

from gptscale.config.schema import ModelConfig, OptimizerConfig
from gptscale.model.gpt import GPT
from gptscale.model.init import initialise
from gptscale.parallel.muon import COEFFICIENTS, Part, choose_owners, newton_schulz, orthogonalised, update_scale
from gptscale.train.optimizer import build_optimizer


def through_svd(matrix: torch.Tensor, steps: int) -> torch.Tensor:
    """The iteration as it acts on singular values, in float64: X = U S Vᵀ gives U p(S) Vᵀ, p the polynomial in S."""
    u, s, vh = torch.linalg.svd(matrix.double() / torch.linalg.norm(matrix.double()), full_matrices=False)
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ vh


@pytest.mark.parametrize("shape", [(64, 64), (48, 160), (160, 48)])
def test_newton_schulz_acts_on_singular_values_alone(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape) * 1e-3
    found = newton_schulz(matrix[None], 5)[0]
    # fp32 rounds at 6e-8; five steps raise what is near zero by up to 3.44⁵ = 485.
    assert (found - through_svd(matrix, 5)).abs().max() < 485 * 6e-8 * 4
    assert (found - through_svd(matrix, 4)).abs().max() > 1e-2
    values = torch.linalg.svdvals(found)
    # Where the iteration ends: from 1e-2 of the norm on, within the band of its coefficients.
    assert 0.6 < float(values[values > 0.3].min()) < float(values.max()) < 1.3


def test_matrices_of_many_shapes_come_back_in_their_order() -> None:
    torch.manual_seed(0)
    matrices = [torch.randn(8, 16), torch.randn(16, 8), torch.zeros(8, 16), torch.randn(8, 16)]
    found = orthogonalised(matrices, 5)
    for matrix, update in zip(matrices, found, strict=True):
        assert update.shape == matrix.shape
        expected = through_svd(matrix, 5) if matrix.any() else matrix.double()
        assert (update - expected).abs().max() < 1e-4


def test_an_update_has_the_size_that_is_asked_for() -> None:
    torch.manual_seed(0)
    for shape in [(64, 64), (64, 256), (256, 64)]:
        update = newton_schulz(torch.randn(1, *shape), 30)[0] * update_scale(shape, 0.2)
        assert 0.15 < float(update.square().mean().sqrt()) < 0.25, shape


def test_steps_are_those_of_the_formula_written_out() -> None:
    """Three steps against the textbook loop in float64, with torch's AdamW for the rest of the model."""
    torch.manual_seed(0)
    config = OptimizerConfig("muon", learning_rate=0.01, weight_decay=0.1, momentum=0.9, update_rms=0.3)
    model = GPT(ModelConfig(layers=2, width=32, heads=4), 100, 16, torch.float32)
    twin = GPT(ModelConfig(layers=2, width=32, heads=4), 100, 16, torch.float32)
    initialise(model, 0)
    initialise(twin, 0)
    optimizer = build_optimizer(model, config)
    adam = build_optimizer(twin, OptimizerConfig(learning_rate=0.01, weight_decay=0.1))
    matrices = {n for n, p in model.named_parameters() if n.startswith("blocks.") and p.dim() == 2}
    assert len(matrices) == 12
    momentum = {name: torch.zeros_like(dict(model.named_parameters())[name], dtype=torch.float64) for name in matrices}
    expected = {name: dict(model.named_parameters())[name].detach().double() for name in matrices}
    for _ in range(3):
        for (name, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
            parameter.grad = torch.randn_like(parameter)
            other.grad = parameter.grad.clone()
            if name in matrices:
                gradient = parameter.grad.double()
                momentum[name] = 0.9 * momentum[name] + 0.1 * gradient
                update = through_svd(0.1 * gradient + 0.9 * momentum[name], 5) * 0.3 * math.sqrt(max(gradient.shape))
                expected[name] = expected[name] * (1 - 0.01 * 0.1) - 0.01 * update
        optimizer.step()
        adam.step()
    others = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        if name in matrices:
            # Rounding of the iteration (see above) times rate, scale and three steps.
            assert (parameter - expected[name]).abs().max() < 3 * 0.01 * 0.3 * 12 * 1e-4, name
        else:
            assert torch.equal(parameter, others[name]), name


def test_groups_cover_every_parameter_once() -> None:
    model = GPT(ModelConfig(layers=2, width=32, heads=4), 100, 16, torch.float32)
    optimizer = build_optimizer(model, OptimizerConfig("muon"))
    held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {id(parameter) for parameter in model.parameters()}


def test_what_has_no_gradient_stays_as_it_is() -> None:
    model = GPT(ModelConfig(layers=1, width=32, heads=4), 100, 16, torch.float32)
    initialise(model, 0)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = build_optimizer(model, OptimizerConfig("muon"))
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert not any("step" in state for state in optimizer.state.values())


def test_work_is_spread_and_stays_where_the_data_is() -> None:
    whole = [Part(f"w{i}", (8, 8), 0, 64) for i in range(4)]
    assert choose_owners([whole[:3], whole[3:]]) == {"w0": 0, "w1": 0, "w2": 0, "w3": 1}
    halves = [[Part(p.matrix, p.shape, start, 32) for p in whole] for start in (0, 32)]
    owners = choose_owners(halves)
    assert sorted(owners.values()) == [0, 0, 1, 1]
    uneven = [[Part("w", (8, 8), 0, 20)], [Part("w", (8, 8), 20, 44)], []]
    assert choose_owners(uneven) == {"w": 1}
    with pytest.raises(AssertionError, match="not the whole"):
        choose_owners([[Part("w", (8, 8), 0, 20)]])
