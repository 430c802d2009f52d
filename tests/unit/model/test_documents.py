"""Rows of several documents give what each document gives alone: the proof of masks and positions together."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gptscale.config.schema import ModelConfig
from gptscale.model.documents import Documents
from gptscale.model.gpt import GPT
from tests.helpers.attention import packed
from tests.helpers.memory import peak_bytes
from tests.helpers.plain_gpt import GPT3, ROTARY, large_weights, random_batch

VOCAB, TOKENS = 75, 300
LENGTHS = ([7, 1, 130, 162], [300], [1, 1, 2, 96, 200])

CONFIGS = {
    "learned": GPT3,
    "learned, banded": replace(GPT3, attention_pattern=("full", "window"), window=20),
    "rotary": ROTARY,
    "rotary, windows": replace(ROTARY, attention_pattern=("window",), window=20, qk_norm=True),
}


def losses_and_gradients(
    model: GPT, parts: list[tuple[Tensor, Tensor, Documents | None]]
) -> tuple[Tensor, list[Tensor]]:
    """The loss of each part, and the gradients of their sum."""
    model.zero_grad()
    losses = [model(*part) for part in parts]
    torch.stack(losses).sum().backward()
    return torch.stack(losses).detach(), [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_packed_row_gives_what_its_documents_give_alone(name: str, recompute: str) -> None:
    model = large_weights(GPT(CONFIGS[name], VOCAB, TOKENS, torch.float32))
    model.activation_checkpointing = recompute  # type: ignore[assignment]
    inputs_BT, targets_BT = random_batch(VOCAB, len(LENGTHS), TOKENS)
    documents = Documents(packed(*LENGTHS), "cpu")
    found, gradients = losses_and_gradients(model, [(inputs_BT, targets_BT, documents)])

    pieces = []
    for row, lengths in enumerate(LENGTHS):
        for inputs_T, targets_T in zip(inputs_BT[row].split(lengths), targets_BT[row].split(lengths), strict=True):
            pieces.append((inputs_T.unsqueeze(0), targets_T.unsqueeze(0), None))
    alone, expected = losses_and_gradients(model, pieces)
    assert found.item() == pytest.approx(alone.sum().item(), rel=2e-6)
    assert worst(gradients, expected) < 2e-5  # as every comparison of this model in fp32: another order of sums

    # Document by document: a row's loss where only the targets of that document count.
    start = 0
    for number, length in enumerate(LENGTHS[0]):
        marked_BT = torch.full_like(targets_BT[:1], -100)
        marked_BT[:, start : start + length] = targets_BT[:1, start : start + length]
        only = model(inputs_BT[:1], marked_BT, Documents(packed(*LENGTHS[:1]), "cpu"))
        assert only.item() == pytest.approx(alone[number].item(), rel=2e-6, abs=1e-5)
        start += length

    # Controls: no documents, and documents that begin one token late.
    late = Documents(torch.minimum(packed(*LENGTHS) + 1, torch.arange(TOKENS)), "cpu")
    for wrong in (None, late):
        losses, off = losses_and_gradients(model, [(inputs_BT, targets_BT, wrong)])
        assert worst(off, expected) > 0.01
        assert losses.item() != pytest.approx(found.item(), rel=2e-5)


def worst(gradients: list[Tensor], expected: list[Tensor]) -> float:
    """Largest difference, as a share of the largest gradient of all: the true one of a key's bias is zero."""
    largest = max(e.abs().max().item() for e in expected)
    return max((g - e).abs().max().item() for g, e in zip(gradients, expected, strict=True)) / largest


def test_positions_alone_matter_with_learned_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks without restarting positions are not enough for these; for rotary ones they are."""
    inputs_BT, targets_BT = random_batch(VOCAB, len(LENGTHS), TOKENS)
    for config, same in ((GPT3, False), (ROTARY, True)):
        model = large_weights(GPT(config, VOCAB, TOKENS, torch.float32))
        right = model(inputs_BT, targets_BT, Documents(packed(*LENGTHS), "cpu")).item()
        with monkeypatch.context() as patched:
            patched.setattr(Documents, "positions", torch.arange(TOKENS).expand(len(LENGTHS), -1))
            going_on = model(inputs_BT, targets_BT, Documents(packed(*LENGTHS), "cpu")).item()
        assert (going_on == pytest.approx(right, rel=1e-6)) == same


def test_a_model_with_documents_holds_nothing_of_length_squared() -> None:
    config: ModelConfig = replace(GPT3, width=32, heads=8)
    peaks = []
    for tokens in (256, 1024):
        model = large_weights(GPT(config, VOCAB, tokens, torch.float32))
        inputs_BT, targets_BT = random_batch(VOCAB, 1, tokens)
        documents = Documents(packed([tokens // 16] * 8 + [tokens // 2]), "cpu")
        peaks.append(peak_bytes(lambda m=model, i=inputs_BT, t=targets_BT, d=documents: m(i, t, d).backward()))  # type: ignore[misc]
    assert peaks[1] < 6 * peaks[0]
    assert peaks[1] < config.layers * 8 * 1024 * 1024 * 4
