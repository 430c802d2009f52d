"""The published sizes are what was published, and the modern ones what the rules give."""

from __future__ import annotations

import math

import pytest

from gptscale.config.compose import compose, group_options
from gptscale.config.depth import TOKENS_PER_PARAMETER, batch_tokens, learning_rate
from gptscale.config.rules import check
from gptscale.config.schema import TrainRoot
from gptscale.config.step_plan import tokens_per_step
from gptscale.model.count import flops_per_token, parameter_count
from gptscale.runtime.errors import UserError
from gptscale.train.check import check_text

# Brown et al. 2020, arXiv 2005.14165, table 2.1: layers, width, heads, features of a head, tokens a step in millions,
# learning rate. 1.3b: the table has 24 heads, which do not fit its own width; 13b: a width of 5140, likewise.
PAPER = {
    "gpt3-125m": (12, 768, 12, 64, 0.5, 6.0e-4),
    "gpt3-350m": (24, 1024, 16, 64, 0.5, 3.0e-4),
    "gpt3-760m": (24, 1536, 16, 96, 0.5, 2.5e-4),
    "gpt3-1.3b": (24, 2048, 16, 128, 1.0, 2.0e-4),
    "gpt3-2.7b": (32, 2560, 32, 80, 1.0, 1.6e-4),
    "gpt3-6.7b": (32, 4096, 32, 128, 2.0, 1.2e-4),
    "gpt3-13b": (40, 5120, 40, 128, 2.0, 1.0e-4),
    "gpt3-175b": (96, 12288, 96, 128, 3.2, 0.6e-4),
}


def composed(*overrides: str) -> TrainRoot:
    return compose("train", TrainRoot, overrides).settings


def test_all_eight_sizes_are_there() -> None:
    for group in ("model", "experiment"):
        assert {name for name in group_options(group) if name.startswith("gpt3-")} == PAPER.keys()


@pytest.mark.parametrize("name", PAPER)
def test_gpt3_is_as_published(name: str) -> None:
    layers, width, heads, head_width, batch_millions, rate = PAPER[name]
    settings = composed(f"experiment={name}")
    model, optimizer, schedule = settings.model, settings.optimizer, settings.schedule
    assert model == composed(f"model={name}", "train.steps=1").model
    assert (model.layers, model.width, model.heads, model.width // model.heads) == (layers, width, heads, head_width)
    # Section 2.1: GPT-2's block, with alternating dense and banded attention.
    assert (model.positions, model.norm, model.feedforward) == ("learned", "layernorm", "gelu")
    assert model.bias
    assert model.tied_embeddings
    assert (model.attention_pattern, model.window) == (("full", "window"), 256)
    # Section 2.1 and appendix B.
    assert settings.data.sequence_length == 2048
    assert settings.train.tokens == 300e9
    assert optimizer.learning_rate == rate
    assert (optimizer.beta1, optimizer.beta2, optimizer.epsilon) == (0.9, 0.95, 1e-8)
    assert (optimizer.clip_norm, optimizer.weight_decay) == (1.0, 0.1)
    assert (schedule.name, schedule.warmup_tokens, schedule.final_ratio) == ("cosine", 375e6, 0.1)
    assert schedule.decay_tokens == 260e9
    assert (settings.train.ramp_from or 0) * 2048 == pytest.approx(32e3, rel=0.05)
    assert 4e9 <= (settings.train.ramp_tokens or 0) <= 12e9
    # Tokens a step are rounded to sequences that can be cut: 2^19 for half a million, and so on. 5 % covers it.
    assert tokens_per_step(settings) == pytest.approx(batch_millions * 1e6, rel=0.05)
    for ranks in (1, 8, 16):
        check(settings, ranks)


MODERN = [name for name in group_options("experiment") if name.startswith("modern-")]


@pytest.mark.parametrize("name", MODERN)
def test_modern_runs_follow_the_rules_of_the_dial(name: str) -> None:
    settings = composed(f"experiment={name}")
    check(settings, 8)
    model, vocab_size, length = settings.model, settings.tokenizer.vocab_size, settings.data.sequence_length
    assert model == composed(f"model={name}", "train.steps=1").model
    parameters = parameter_count(model, vocab_size, length)
    tokens = settings.train.tokens or 0
    compute = flops_per_token(model, vocab_size, length) * tokens
    assert tokens == pytest.approx(TOKENS_PER_PARAMETER * parameters, rel=0.03)
    assert settings.schedule.warmup_tokens == pytest.approx(parameters, rel=0.07)
    assert settings.optimizer.learning_rate == pytest.approx(learning_rate(compute), rel=0.03)
    assert abs(math.log2(tokens_per_step(settings) / batch_tokens(compute))) <= 0.5  # the nearest power of two


@pytest.mark.parametrize("name", ["gpt3-125m", "modern-8b"])
def test_text_of_ones_own_has_to_be_named(name: str) -> None:
    with pytest.raises(UserError, match=r"data\.path=corpora/mine") as refused:
        check_text(composed(f"experiment={name}").data)
    assert len(str(refused.value).splitlines()) == 2
    check_text(composed(f"experiment={name}", "data.path=corpora/mine").data)
    check_text(composed(f"experiment={name}", "data.sources=[{path: mine}]").data)


def test_modern_shapes_are_made_of_whole_tiles() -> None:
    """Widths of whole heads, and of 128 wherever a tensor core would notice."""
    for name in (name for name in group_options("model") if name.startswith("modern-")):
        model = composed(f"model={name}", "train.steps=1").model
        assert model.width % 128 == 0, name
        assert model.feedforward_width is not None
        assert model.feedforward_width % (32 if model.width < 768 else 128) == 0, name
        assert (model.head_width or model.width // model.heads) in (64, 128), name
