"""The whole model against a plain float64 one, and the promises that engines and checkpoints build on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gptscale.config.schema import ModelConfig
from gptscale.flow import IGNORED_TARGET
from gptscale.model.attention import Attention
from gptscale.model.gpt import GPT
from gptscale.model.init import initialise
from gptscale.model.linear import Linear
from tests.helpers.memory import peak_bytes
from tests.helpers.plain_gpt import (
    GPT3,
    ROTARY,
    VARIANTS,
    large_weights,
    plain_logits,
    plain_loss,
    plain_parameters,
    random_batch,
)

VOCAB = 75
TOKENS = 40


def build(config: ModelConfig, dtype: torch.dtype = torch.float32) -> GPT:
    return large_weights(GPT(config, VOCAB, TOKENS, dtype))


def worst_gradient(model: GPT, reference: dict[str, Tensor]) -> float:
    """Largest difference of any gradient, as a share of its tensor's largest value (a key bias has none: absolute)."""
    worst = 0.0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        expected = reference[name].grad
        assert expected is not None, name
        scale = 1.0 if name.endswith("k.bias") else expected.abs().max().item()
        worst = max(worst, (parameter.grad.double() - expected).abs().max().item() / scale)
    return worst


@pytest.mark.parametrize("kernel", ["blocked", "sdpa"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_gradients_equal_the_plain_model(variant: str, kernel: str) -> None:
    config = VARIANTS[variant]
    model = build(config)
    model.use_attention(kernel)  # type: ignore[arg-type]
    inputs_BT, targets_BT = random_batch(VOCAB, 3, TOKENS)
    loss = model(inputs_BT, targets_BT)
    (loss * 0.125).backward()

    reference = plain_parameters(model)
    logits_BTV = plain_logits(reference, config, VOCAB, inputs_BT)
    expected = plain_loss(logits_BTV, targets_BT)
    (expected * 0.125).backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=2e-6)
    assert worst_gradient(model, reference) < 2e-5
    assert (model.logits(inputs_BT) - logits_BTV).abs().max().item() < 2e-4

    # Controls: a comparison that lets these through would prove nothing.
    for error in ({"causal": False}, {"scaled": False}):
        wrong = plain_parameters(model)
        (plain_loss(plain_logits(wrong, config, VOCAB, inputs_BT, **error), targets_BT) * 0.125).backward()
        assert worst_gradient(model, wrong) > 0.05, error


@pytest.mark.parametrize("kernel", ["blocked", "sdpa"])
@pytest.mark.parametrize("config", [GPT3, ROTARY], ids=["gpt3", "rotary"])
def test_no_token_sees_a_later_one(config: ModelConfig, kernel: str) -> None:
    model = build(config)
    model.use_attention(kernel)  # type: ignore[arg-type]
    inputs_BT, _ = random_batch(VOCAB, 2, TOKENS)
    before = model.logits(inputs_BT)
    for changed in (0, 17, TOKENS - 1):
        other_BT = inputs_BT.clone()
        other_BT[:, changed] = (other_BT[:, changed] + 1) % VOCAB
        moved_T = (model.logits(other_BT) - before).abs().amax((0, 2)) > 1e-6
        assert not moved_T[:changed].any()
        assert moved_T[changed:].all()


def test_canonical_names() -> None:
    names = [name for name, _ in GPT(replace(GPT3, layers=1), VOCAB, TOKENS, torch.float32).named_parameters()]
    block = [
        *("attention_norm.weight", "attention_norm.bias"),
        *(f"attention.{part}.{kind}" for part in "qkvo" for kind in ("weight", "bias")),
        *("feedforward_norm.weight", "feedforward_norm.bias"),
        *(f"feedforward.{part}.{kind}" for part in ("up", "down") for kind in ("weight", "bias")),
    ]
    assert names == [
        *("embedding.weight", "embedding.positions"),
        *(f"blocks.0.{name}" for name in block),
        *("head.norm.weight", "head.norm.bias"),
    ]
    rotary = dict(GPT(replace(ROTARY, layers=11), VOCAB, TOKENS, torch.float32).named_parameters())
    assert rotary["blocks.10.feedforward.gate.weight"].shape == (128, 48)
    assert rotary["blocks.10.attention.k.weight"].shape == (24, 48)
    assert rotary["head.weight"].shape == rotary["embedding.weight"].shape == (80, 48)
    assert not [name for name in rotary if name.endswith("bias") or "positions" in name]


def test_the_sequence_is_what_forward_runs() -> None:
    model = build(GPT3)
    inputs_BT, targets_BT = random_batch(VOCAB, 2, TOKENS)
    names = [name for name, _ in model.sequence()]
    assert names == ["embedding", "blocks.0", "blocks.1", "head"]
    x = inputs_BT
    for _, module in model.sequence()[:-1]:
        x = module(x)
    assert torch.equal(model.sequence()[-1][1](x, targets_BT), model(inputs_BT, targets_BT))
    listed = {id(p) for name, module in model.sequence() for p in module.parameters()}
    assert listed == {id(p) for p in model.parameters()}


def test_heads_are_counted_from_the_projections() -> None:
    # What a tensor-parallel rank does: it holds some of the heads, and its outputs add up with those of the others.
    torch.manual_seed(0)
    whole = Attention(ROTARY, 0, None)
    for p in whole.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x_BTD = torch.randn(2, 9, 48)
    parts = []
    for rank in range(2):
        part = Attention(ROTARY, 0, None)
        for name in ("q", "k", "v"):
            half = getattr(whole, name).weight.chunk(2, 0)[rank]
            layer = Linear(48, len(half), bias=False)
            layer.weight = torch.nn.Parameter(half.detach())
            setattr(part, name, layer)
        part.o = Linear(24, 48, bias=False)
        part.o.weight = torch.nn.Parameter(whole.o.weight.chunk(2, 1)[rank].detach())
        parts.append(part(x_BTD))
    assert torch.allclose(parts[0] + parts[1], whole(x_BTD), atol=1e-5)


def test_ignored_targets_and_padding_columns_do_not_count() -> None:
    model = build(GPT3)
    inputs_BT, targets_BT = random_batch(VOCAB, 2, TOKENS)
    alone = model(inputs_BT[:1], targets_BT[:1]) + model(inputs_BT[1:], targets_BT[1:])
    assert model(inputs_BT, targets_BT).item() == pytest.approx(alone.item(), rel=1e-6)
    assert model(inputs_BT, torch.full_like(targets_BT, IGNORED_TARGET)).item() == 0.0
    assert model.logits(inputs_BT).shape == (2, TOKENS, VOCAB)
    expected = model(inputs_BT, targets_BT)
    with torch.no_grad():
        model.embedding.weight[VOCAB:] = 50.0
    assert torch.equal(model(inputs_BT, targets_BT), expected)
    model(inputs_BT, targets_BT).backward()
    assert model.embedding.weight.grad is not None
    assert model.embedding.weight.grad[VOCAB:].abs().max() == 0


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("name", ["gpt3", "rotary", "modern", "wide_heads", "experts"])
def test_activation_checkpointing_changes_no_bit(name: str, dropout: float) -> None:
    experts = replace(ROTARY, experts=4, shared_experts=1, expert_layers=("dense", "experts"))
    config = experts if name == "experts" else VARIANTS[name]
    inputs_BT, targets_BT = random_batch(VOCAB, 2, TOKENS)
    outcomes = []
    for mode, interval in (("none", 1), ("full", 1), ("full", 2), ("selective", 1), ("selective", 2)):
        model = build(replace(config, dropout=dropout))
        model.activation_checkpointing = mode  # type: ignore[assignment]
        model.checkpoint_interval = interval
        torch.manual_seed(5)
        loss = model(inputs_BT, targets_BT)
        loss.backward()
        outcomes.append([loss.detach(), *(p.grad for p in model.parameters())])
    for kept, *recomputed in zip(*outcomes, strict=True):
        assert all(torch.equal(kept, other) for other in recomputed)


def test_memory_follows_tokens_not_length_and_checkpointing_saves_it() -> None:
    vocab, longest = 2000, 1024

    def peak(batch: int, tokens: int, mode: str = "none", loss_chunk: int = 64, interval: int = 1) -> int:
        config = replace(ROTARY, layers=6, tied_embeddings=True, loss_chunk=loss_chunk)
        model = GPT(config, vocab, longest, torch.float32)
        initialise(model, 0)
        model.activation_checkpointing = mode  # type: ignore[assignment]
        model.checkpoint_interval = interval
        inputs_BT, targets_BT = random_batch(vocab, batch, tokens)
        model(inputs_BT, targets_BT).backward()
        return peak_bytes(lambda: model(inputs_BT, targets_BT).backward())

    long = peak(1, 1024)
    assert long == pytest.approx(peak(8, 128), rel=0.02)
    assert long < 2.05 * peak(1, 512)
    least = peak(1, 1024, mode="full")
    assert least < 0.4 * long
    # Every second of six layers is computed again: what it would have kept is half of what all would have.
    assert peak(1, 1024, mode="full", interval=2) == pytest.approx((long + least) / 2, rel=0.1)
    # Without the norms' two widths, of 8, and the activation's 2.7, of 8: of layers alone 29 %, and some of it is not.
    assert peak(1, 1024, mode="selective") < 0.85 * long
    # Control: logits that are all there show.
    assert peak(1, 1024, loss_chunk=1024) > long + 0.5 * (1024 * vocab * 4)


def test_dropout_acts_in_training_only() -> None:
    inputs_BT, targets_BT = random_batch(VOCAB, 2, TOKENS)
    model, plain = build(replace(GPT3, dropout=0.3)), build(GPT3)
    assert torch.equal(model.eval()(inputs_BT, targets_BT), plain(inputs_BT, targets_BT))
    model.train()
    assert not torch.equal(model(inputs_BT, targets_BT), model(inputs_BT, targets_BT))


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_made_on_the_meta_device_is_the_same(tied: bool) -> None:
    config = replace(GPT3, tied_embeddings=tied)
    with torch.device("meta"):
        model = GPT(config, VOCAB, TOKENS, torch.float32)
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    initialise(model, 3)
    assert (model.head.weight is model.embedding.weight) == tied
    direct = GPT(config, VOCAB, TOKENS, torch.float32)
    initialise(direct, 3)
    for (name, made), (same_name, expected) in zip(model.named_parameters(), direct.named_parameters(), strict=True):
        assert name == same_name
        assert torch.equal(made, expected)
    assert model.to(torch.device("cpu")).head.weight.data_ptr() == model.head.weight.data_ptr()


def test_sizes_that_do_not_fit_are_refused() -> None:
    for config, key in [
        (replace(GPT3, width=50), "model.width"),
        (replace(GPT3, kv_heads=2), "model.heads"),
        (replace(ROTARY, width=60, heads=4), "model.positions"),
    ]:
        with pytest.raises(ValueError, match=key):
            GPT(config, VOCAB, TOKENS, torch.float32)
