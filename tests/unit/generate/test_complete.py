"""Cached, uncached, batched and single generation give the same text, before the window's end and past it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from gptscale.config.schema import GenerateConfig, ModelConfig
from gptscale.generate import complete
from gptscale.generate.complete import generate, window_start
from gptscale.model.gpt import GPT
from gptscale.runtime.errors import UserError
from tests.helpers.plain_gpt import GPT3, ROTARY, large_weights

ALPHABET = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,"
LENGTH = 24
CONFIGS = {
    "gpt3": GPT3,
    "gpt3_banded": replace(GPT3, attention_pattern=("full", "window"), window=3),
    "rotary": ROTARY,
    "rotary_mqa": replace(ROTARY, kv_heads=1, tied_embeddings=True),
    "rotary_windows": replace(ROTARY, attention_pattern=("window",), window=4, qk_norm=True, logit_softcap=5.0),
}
GREEDY = GenerateConfig(max_new_tokens=12, temperature=0.0)
PROMPTS = ["hello", "a", "the quick brown fox jumps", "", "Zz,.0"]


class Letters:
    """One token a character, and one more that ends a text."""

    def __init__(self, end_of_text: int = len(ALPHABET)) -> None:
        self.end_of_text = end_of_text
        self.vocab_size = len(ALPHABET) + 1

    def encode(self, text: str) -> np.ndarray[Any, np.dtype[np.uint32]]:
        return np.array([ALPHABET.index(c) for c in text.replace(" ", "")], dtype=np.uint32)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return "".join((ALPHABET + "!")[i] for i in ids).encode()


def build(config: ModelConfig, length: int = LENGTH) -> GPT:
    model = large_weights(GPT(config, len(ALPHABET) + 1, length, torch.float32))
    with torch.no_grad():  # Never end by chance: what ends a text is tested on its own.
        model.head.weight[len(ALPHABET)] = model.head.weight[:-1].mean(0) * 0
    return model


def by_hand(model: GPT, prompt: str, new_tokens: int, window: int) -> str:
    """Greedy, one prompt, the whole window read for every token."""
    tokenizer = Letters()
    tokens = [int(i) for i in tokenizer.encode(prompt)] or [tokenizer.end_of_text]
    before = len(tokens)
    model.eval()
    for _ in range(new_tokens):
        visible = tokens[window_start(len(tokens), window) :]
        with torch.no_grad():
            tokens.append(int(model.logits(torch.tensor([visible]))[0, -1].argmax()))
    return tokenizer.decode_bytes(tokens[before:]).decode()


@pytest.mark.parametrize("new_tokens", [1, 30])
@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_text_is_the_same_with_and_without_cache(name: str, new_tokens: int) -> None:
    model = build(CONFIGS[name])
    expected = [by_hand(model, prompt, new_tokens, LENGTH) for prompt in PROMPTS]
    assert len(set(expected)) > 2 or new_tokens == 1
    for cache in (True, False):
        config = replace(GREEDY, max_new_tokens=new_tokens, cache=cache)
        assert generate(model, Letters(), PROMPTS, config) == expected
    assert [generate(model, Letters(), [prompt], replace(config, cache=True))[0] for prompt in PROMPTS] == expected


@pytest.mark.parametrize("name", CONFIGS)
def test_cached_logits_equal_those_of_the_whole_text(name: str) -> None:
    model = build(CONFIGS[name]).eval()
    rows = [list(range(3, 3 + length)) for length in (9, 4, 1)]
    texts = [complete._Row(i, "", Letters(), replace(GREEDY, max_new_tokens=8)) for i in range(3)]
    for text, row in zip(texts, rows, strict=True):
        text.tokens = row
    reader = complete._Reader(model, LENGTH, use_cache=True)
    with torch.no_grad():
        for step in range(6):
            made = reader.next_logits(texts)
            for text, logits in zip(texts, made, strict=True):
                expected = model.logits(torch.tensor([text.tokens]))[0, -1]
                assert (logits - expected).abs().max().item() < 1e-4
                text.tokens.append(step)


def test_sampled_text_does_not_depend_on_the_batch() -> None:
    model = build(GPT3)
    for config in (
        GenerateConfig(max_new_tokens=25, temperature=1.3, seed=4),
        GenerateConfig(max_new_tokens=25, temperature=0.7, top_k=9, top_p=0.8, seed=4),
    ):
        together = generate(model, Letters(), PROMPTS, config)
        assert together == [generate(model, Letters(), [prompt], config)[0] for prompt in PROMPTS]
        assert together[::-1] == generate(model, Letters(), PROMPTS[::-1], config)
        assert together == generate(model, Letters(), PROMPTS, replace(config, cache=False))
        assert together != generate(model, Letters(), PROMPTS, replace(config, seed=5))
        assert len(set(together)) == len(PROMPTS)


def test_more_prompts_than_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(ROTARY)
    expected = generate(model, Letters(), PROMPTS, GREEDY)
    monkeypatch.setattr(complete, "BATCH_PROMPTS", 2)
    assert generate(model, Letters(), PROMPTS, GREEDY) == expected
    assert generate(model, Letters(), [], GREEDY) == []


@pytest.mark.parametrize("window", [5, 40])
def test_a_window_other_than_the_trained_length(window: int) -> None:
    model = build(ROTARY)
    config = replace(GREEDY, max_new_tokens=50, window=window)
    longer = build(ROTARY, length=64)  # the same weights: rotary positions have none
    prompts = PROMPTS[:2]
    expected = [by_hand(longer, prompt, 50, window) for prompt in prompts]
    assert generate(model, Letters(), prompts, config) == expected
    if window == 40:
        assert expected[0] != by_hand(longer, prompts[0], 50, LENGTH)
        with pytest.raises(UserError, match="24 learned positions"):
            generate(build(GPT3), Letters(), PROMPTS, config)


def test_window_start() -> None:
    assert [window_start(n, 8) for n in (1, 8, 9, 12, 13, 16, 17)] == [0, 0, 4, 4, 8, 8, 12]
    assert [window_start(n, 1) for n in (1, 2, 3)] == [0, 1, 2]
    for window in (1, 2, 3, 7, 24):
        for tokens in range(1, 100):
            seen = tokens - window_start(tokens, window)
            assert min(tokens, window - window // 2) <= seen <= window


def test_the_cache_reads_one_token_at_a_time() -> None:
    model = build(GPT3)
    read: list[int] = []
    model.embedding.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].shape[1]))
    generate(model, Letters(), ["abcd"], replace(GREEDY, max_new_tokens=LENGTH + 10))
    # Until the window is full one token each; then half of it once, and on.
    assert read == [4] + [1] * (LENGTH - 4) + [LENGTH // 2 + 1] + [1] * 11 + [LENGTH // 2 + 1]


def test_streamed_pieces_join_to_the_completion() -> None:
    model = build(GPT3)
    pieces: dict[int, list[str]] = {}
    config = replace(GREEDY, max_new_tokens=20, stop=("ab", "Q.", "zzz"))
    texts = generate(model, Letters(), PROMPTS, config, lambda at, piece: pieces.setdefault(at, []).append(piece))
    assert ["".join(pieces[at]) for at in range(len(PROMPTS))] == texts
    assert all(piece for of_prompt in pieces.values() for piece in of_prompt)


def test_a_text_ends_before_a_stop_and_others_go_on() -> None:
    model = build(GPT3)
    config = replace(GREEDY, max_new_tokens=30)
    free = generate(model, Letters(), PROMPTS, config)
    stop = free[0][10:13]
    stopped = generate(model, Letters(), PROMPTS, replace(config, stop=(stop,)))
    assert stopped == [text.split(stop)[0] for text in free]
    assert len(stopped[0]) <= 10


def test_a_long_text_that_ends_early_leaves_room_for_a_short_one() -> None:
    model = build(GPT3)
    prompts = ["abcdefghijklmnopqrstuv", "ab"]
    config = replace(GREEDY, max_new_tokens=40)
    free = generate(model, Letters(), prompts, config)
    stop = free[0][0]
    stopped = generate(model, Letters(), prompts, replace(config, stop=(stop,)))
    assert stopped == ["", free[1].split(stop)[0]]
    assert len(free[1].split(stop)[0]) >= 4, "the short text has to outlive the long one for this to prove anything"


def test_a_text_ends_at_end_of_text() -> None:
    model = build(GPT3)
    free = generate(model, Letters(), ["hello"], replace(GREEDY, max_new_tokens=30))[0]
    ends_at = 7
    ender = ALPHABET.index(free[ends_at])
    ended = generate(model, Letters(end_of_text=ender), ["hello"], replace(GREEDY, max_new_tokens=30))[0]
    assert ended == free[: free.index(free[ends_at])]


def test_generating_leaves_the_model_as_it_was() -> None:
    model = build(replace(GPT3, dropout=0.5)).train()
    quiet = build(GPT3)
    assert generate(model, Letters(), PROMPTS, GREEDY) == generate(quiet, Letters(), PROMPTS, GREEDY)
    assert model.training
    assert model.blocks[0].training
    ids = torch.randint(0, 60, (2, 9))
    model(ids[:, :-1], ids[:, 1:]).backward()


def test_no_new_tokens_no_text() -> None:
    assert generate(build(GPT3), Letters(), ["abc"], replace(GREEDY, max_new_tokens=0)) == [""]


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": -1},
        {"temperature": -0.1},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"stop": ("",)},
        {"window": 0},
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"generate.{next(iter(wrong))}"):
        generate(build(GPT3), Letters(), ["abc"], replace(GREEDY, **wrong))


def test_another_tokenizer_is_refused() -> None:
    other = Letters()
    other.vocab_size += 1
    with pytest.raises(UserError, match="66 tokens, the model was trained with 65"):
        generate(build(GPT3), other, ["abc"], GREEDY)
