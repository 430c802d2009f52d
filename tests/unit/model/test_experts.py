"""A mixture of experts is what it says it is, token by token."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gptscale.config.schema import ModelConfig
from gptscale.model.experts import ExpertFeedForward
from gptscale.model.gpt import GPT
from gptscale.model.init import initialise
from gptscale.model.linear import grouped_linear, grouped_outer_product, grouped_product
from tests.helpers.plain_gpt import large_weights, random_batch

ROWS, TOKENS, WIDTH = 3, 10, 16
SWIGLU = ModelConfig(
    layers=2,
    width=WIDTH,
    heads=2,
    feedforward="swiglu",
    bias=False,
    experts=4,
    expert_width=12,
    balance_loss=0.3,
    router_z_loss=0.07,
    vocab_multiple=1,
)
VARIANTS = {
    "swiglu": SWIGLU,
    "gelu, one each": replace(SWIGLU, feedforward="gelu", experts_per_token=1),
    "relu2, all": replace(SWIGLU, feedforward="relu2", experts_per_token=4),
    "shared": replace(SWIGLU, shared_experts=2),
    "capacity": replace(SWIGLU, expert_capacity=0.6),
    "room for one": replace(SWIGLU, expert_capacity=0.01, experts_per_token=1),
}


def layer(config: ModelConfig) -> ExpertFeedForward:
    built = ExpertFeedForward(config).double()
    generator = torch.Generator().manual_seed(1)
    for parameter in built.parameters():
        parameter.data.normal_(0.0, 0.5, generator=generator)
    return built


def inputs() -> Tensor:
    return torch.randn(ROWS, TOKENS, WIDTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def plainly(built: ExpertFeedForward, config: ModelConfig, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
    """One token after the other, and the auxiliary losses as their papers write them."""

    def feedforward(x_D: Tensor, up: Tensor, gate: Tensor | None, down: Tensor) -> Tensor:
        if gate is not None:
            return down @ (F.silu(gate @ x_D) * (up @ x_D))
        hidden = up @ x_D
        return down @ (F.gelu(hidden, approximate="tanh") if config.feedforward == "gelu" else hidden.relu() ** 2)

    chosen = config.experts_per_token
    room = math.ceil(config.expert_capacity * chosen * TOKENS / config.experts) if config.expert_capacity else TOKENS
    rows, losses = [], []
    for x_TD in x_BTD:
        taken, share, probability = [0] * config.experts, torch.zeros(config.experts), 0
        for x_D in x_TD:
            scores = built.router.scores.weight @ x_D
            probability = probability + scores.softmax(0) / TOKENS
            losses.append(config.router_z_loss * scores.logsumexp(0) ** 2)
            best = sorted(range(config.experts), key=lambda e: -float(scores[e].detach()))[:chosen]
            total = sum(scores.softmax(0)[e] for e in best) if chosen > 1 else 1
            y_D = torch.zeros_like(x_D)
            for e in best:
                share[e] += 1 / (chosen * TOKENS)
                taken[e] += 1
                if taken[e] <= room:
                    experts = built.experts
                    gate = None if experts.gate is None else experts.gate[e]
                    y_D = y_D + scores.softmax(0)[e] / total * feedforward(x_D, experts.up[e], gate, experts.down[e])
            if built.shared is not None:
                gate = None if built.shared.gate is None else built.shared.gate.weight
                y_D = y_D + feedforward(x_D, built.shared.up.weight, gate, built.shared.down.weight)
            rows.append(y_D)
        losses.append(config.balance_loss * TOKENS * config.experts * (share * probability).sum())
    return torch.stack(rows).view_as(x_BTD), torch.stack(losses).sum()


@pytest.mark.parametrize("name", VARIANTS)
def test_a_layer_is_its_formula(name: str) -> None:
    """Outputs, losses, and gradients of both, in float64 but for the router's scores, which are fp32."""
    config = VARIANTS[name]
    ours, reference, x_BTD = layer(config), layer(config), inputs()
    for built in (ours, reference):
        built.router.float()
    reference.router.double()  # of the same values: exact to fp32's last bit
    heard: list[Tensor] = []
    ours.heard = heard
    (mine, theirs) = x_BTD.clone().requires_grad_(), x_BTD.clone().requires_grad_()
    y_BTD, (expected_BTD, loss) = ours(mine), plainly(reference, config, theirs)
    weights_BTD = torch.linspace(-1, 1, y_BTD.numel(), dtype=torch.float64).view_as(y_BTD)
    ((y_BTD * weights_BTD).sum() + heard[0]).backward()
    ((expected_BTD * weights_BTD).sum() + loss).backward()
    assert_near(y_BTD, expected_BTD)
    assert_near(heard[0], loss)
    assert mine.grad is not None
    assert theirs.grad is not None
    assert_near(mine.grad, theirs.grad)
    for (parameter, one), other in zip(ours.named_parameters(), reference.parameters(), strict=True):
        assert one.grad is not None, parameter
        assert other.grad is not None, parameter
        assert float(other.grad.abs().max()) > 0, parameter
        assert_near(one.grad, other.grad)


def assert_near(one: Tensor, other: Tensor) -> None:
    """fp32 scores have 24 bits: weights differ by some 1e-7, and what comes of them by little more."""
    assert float((one.double() - other.double()).abs().max() / other.abs().max()) < 3e-6


def test_one_that_is_full_takes_the_first_and_evaluation_takes_all() -> None:
    """What a token gets is of its past alone: a later token changes nothing before it."""
    built, x_BTD = layer(VARIANTS["capacity"]), inputs()
    built.router.float()
    before = built(x_BTD)
    x_BTD[:, 7:] *= -3
    after = built(x_BTD)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.equal(before[:, 7:], after[:, 7:])
    free = layer(replace(VARIANTS["capacity"], expert_capacity=0.0))
    free.router.float()
    assert not torch.equal(free(x_BTD), after)
    assert torch.equal(free(x_BTD), built.eval()(x_BTD))


@pytest.mark.parametrize("name", ["swiglu", "capacity"])
def test_rows_know_nothing_of_each_other(name: str) -> None:
    """So that micro-batches and ranks may share them out as they like."""
    built, x_BTD = layer(VARIANTS[name]), inputs()
    built.router.float()
    heard: list[Tensor] = []
    built.heard = heard
    together = built(x_BTD)
    apart = torch.cat([built(x_1TD) for x_1TD in x_BTD.split(1)])
    assert_near(apart, together)
    whole, *parts = heard
    assert_near(torch.stack(parts).sum(), whole)


@pytest.mark.parametrize("ends", [[2, 2, 6], [0, 0, 6], [6, 6, 6], [0, 0, 0]])
def test_groups_of_rows(ends: list[int]) -> None:
    """An expert without tokens has a gradient of zero, not none. What a GPU calls gives the same."""
    rows = ends[-1]
    x_NI = torch.randn(rows, 8, requires_grad=True)
    weight_EOI, y_NO = torch.randn(3, 16, 8, requires_grad=True), torch.randn(rows, 16)
    ends_E = torch.tensor(ends, dtype=torch.int32)
    found_NO = grouped_linear(x_NI, weight_EOI, ends_E)
    found_NO.backward(y_NO)
    bounds = [slice(first, last) for first, last in zip([0, *ends], ends, strict=False)]
    assert x_NI.grad is not None
    assert weight_EOI.grad is not None
    for e, rows_of in enumerate(bounds):
        assert torch.allclose(found_NO[rows_of], x_NI[rows_of] @ weight_EOI[e].T, atol=1e-6)
        assert torch.allclose(x_NI.grad[rows_of], y_NO[rows_of] @ weight_EOI[e], atol=1e-6)
        assert torch.allclose(weight_EOI.grad[e], y_NO[rows_of].T @ x_NI[rows_of], atol=1e-6)
    with torch.no_grad():
        kernel_NO = grouped_product(x_NI, weight_EOI.transpose(1, 2), ends_E, kernel=True)
        kernel_EOI = grouped_outer_product(y_NO, x_NI, ends_E, kernel=True)
    assert torch.allclose(kernel_NO, found_NO, atol=1e-6)
    assert torch.allclose(kernel_EOI, weight_EOI.grad, atol=1e-6)


def test_the_loss_that_is_shown_is_the_tokens_alone() -> None:
    """Auxiliary losses are in the gradient, in training; with activation checkpointing they count once."""
    ids_BT, targets_BT = random_batch(50, ROWS, TOKENS)
    gradients, losses = [], []
    for weight, recompute in ((0.3, False), (0.3, True), (0.0, False)):
        config = replace(SWIGLU, balance_loss=weight, router_z_loss=weight, expert_layers=("dense", "experts"))
        model = large_weights(GPT(config, 50, TOKENS, torch.float32))
        model.activation_checkpointing = "full" if recompute else "none"
        loss = model(ids_BT, targets_BT)
        loss.backward()
        losses.append(float(loss))
        gradients.append(model.get_parameter("blocks.1.feedforward.router.scores.weight").grad)
    assert losses[0] == losses[1] == losses[2]
    with_losses, again, without = gradients
    assert torch.equal(with_losses, again)
    assert float((with_losses - without).abs().max()) > 0.01 * float(without.abs().max())


def test_the_balance_loss_balances() -> None:
    """A router that sends nearly all tokens to one expert learns to spread them, of this loss alone."""

    def largest_share(balance_loss: float) -> float:
        config = replace(SWIGLU, experts_per_token=1, balance_loss=balance_loss, router_z_loss=0.0)
        built, x_BTD = layer(config).float(), inputs().float() + 0.5
        built.router.scores.weight.data.mul_(0.01)[0] += 1.0
        optimizer = torch.optim.Adam(built.router.parameters(), lr=0.003)
        shares = []
        for _ in range(1500):
            routes, loss = built.router(x_BTD)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            shares.append(float(routes.counts_E.max() / routes.counts_E.sum()))
        return sum(shares[-200:]) / 200  # tokens on the edge go to and fro

    assert largest_share(0.0) > 0.9
    assert largest_share(1.0) < 0.6  # even is 0.25


def test_initial_experts_differ_and_those_that_add_to_the_stream_are_small() -> None:
    model = GPT(replace(SWIGLU, layers=8, shared_experts=1, width=64), 50, TOKENS, torch.float32)
    initialise(model, 0)
    experts = model.blocks[0].feedforward.experts
    assert not torch.equal(experts.up[0], experts.up[1])
    assert float(experts.up.std()) == pytest.approx(0.02, rel=0.05)
    for down in (experts.down, model.blocks[0].feedforward.shared.down.weight):
        assert float(down.std()) == pytest.approx(0.02 / 4, rel=0.05)
