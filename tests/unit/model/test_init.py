"""Initial weights depend on the seed and the canonical name, and on nothing else."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from gptscale.model.gpt import GPT
from gptscale.model.init import initial_value, initialise
from tests.helpers.plain_gpt import GPT3, ROTARY


def built(seed: int, layers: int = 2) -> dict[str, torch.Tensor]:
    model = GPT(replace(GPT3, layers=layers), 75, 16, torch.float32)
    initialise(model, seed)
    return {name: p.detach() for name, p in model.named_parameters()}


def test_the_same_whatever_was_drawn_before_or_beside() -> None:
    first = built(1)
    torch.manual_seed(99)
    torch.randn(7)
    again = built(1)
    for name in sorted(first, reverse=True):
        assert torch.equal(first[name], again[name])
        assert torch.equal(first[name], initial_value(name, first[name].shape, GPT3, 1))
    deeper = built(1, layers=3)
    assert torch.equal(first["blocks.1.attention.q.weight"], deeper["blocks.1.attention.q.weight"])


def test_seeds_and_names_give_different_values() -> None:
    first, other = built(1), built(2)
    assert not torch.equal(first["embedding.weight"], other["embedding.weight"])
    assert not torch.equal(first["blocks.0.attention.q.weight"], first["blocks.0.attention.k.weight"])
    assert not torch.equal(first["blocks.0.attention.q.weight"], first["blocks.1.attention.q.weight"])


@pytest.mark.parametrize("config", [GPT3, ROTARY], ids=["gpt3", "rotary"])
def test_spread(config) -> None:  # type: ignore[no-untyped-def]
    config = replace(config, width=96, layers=8, init_std=0.05)
    model = GPT(config, 200, 64, torch.float32)
    initialise(model, 0)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert p.abs().max() == 0, name
        elif "norm" in name:
            assert p.min() == p.max() == 1, name
        else:
            residual = "attention.o" in name or "feedforward.down" in name
            expected = 0.05 / math.sqrt(16) if residual else 0.05
            assert p.std().item() == pytest.approx(expected, rel=0.05), name
            assert abs(p.mean().item()) < 0.1 * expected, name


def test_the_loss_of_a_new_model_is_that_of_a_guess() -> None:
    model = GPT(GPT3, 75, 16, torch.float32)
    initialise(model, 0)
    ids = torch.randint(0, 75, (8, 17))
    assert model(ids[:, :-1], ids[:, 1:]).item() / 128 == pytest.approx(math.log(75), rel=0.02)


def test_a_vector_is_a_scale_or_a_bias_whatever_its_name() -> None:
    """A block of one's own may call its norm as it likes."""
    assert initial_value("blocks.0.ln_1.weight", (8,), GPT3, seed=0).tolist() == [1.0] * 8
    assert initial_value("blocks.0.gamma", (8,), GPT3, seed=0).tolist() == [1.0] * 8
    assert initial_value("blocks.0.ln_1.bias", (8,), GPT3, seed=0).tolist() == [0.0] * 8
