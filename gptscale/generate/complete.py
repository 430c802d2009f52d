"""Prompts → completions.

The model looks back on a window of at most its trained length. A text that outgrows it is cut back to about half of
it and read again: the window moves in steps, not with every token, so that a cache stays of use. Where it starts is a
function of the number of tokens alone, and so cached, uncached, batched and single generation see the same.

Shape legend: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from gptscale.config.schema import GenerateConfig
from gptscale.generate.cache import KVCache
from gptscale.generate.sampler import Sampler
from gptscale.generate.text import TextStream
from gptscale.model.gpt import GPT
from gptscale.runtime.errors import UserError
from gptscale.runtime.seeds import derive_seed

BATCH_PROMPTS = 16
"""Prompts completed at one time. Changes speed and memory, not the result beyond float order."""


class TextTokenizer(Protocol):
    """What generation needs of a tokenizer."""

    @property
    def end_of_text(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    def encode(self, text: str) -> npt.NDArray[Any]: ...

    def decode_bytes(self, ids: Iterable[int] | npt.NDArray[Any]) -> bytes:
        """Bytes of the tokens; those of a sequence are those of its parts, joined."""


OnText = Callable[[int, str], None]
"""Called with a prompt's index and the next piece of its completion, never empty."""


def generate(
    model: GPT,
    tokenizer: TextTokenizer,
    prompts: Sequence[str],
    config: GenerateConfig,
    on_text: OnText | None = None,
) -> list[str]:
    """The completion of each prompt, without the prompt.

    A completion ends at `max_new_tokens`, at the tokenizer's end_of_text, or before a stop string. An empty prompt
    starts a document: the model is given end_of_text. Every prompt draws from its own generator, seeded by
    (config.seed, prompt): the same prompt gives the same text whatever else is in the batch, up to ties within float
    order. Pieces given to `on_text` are valid text and join to the completion; prompts of a batch take turns.

    Raises UserError for settings that mean nothing, or a window that learned positions do not reach.
    """
    window = _checked_window(model, tokenizer, config)
    if model.rotary is not None:
        model.rotary.reserve(window)
    rows = [_Row(index, prompt, tokenizer, config) for index, prompt in enumerate(prompts)]
    by_length = sorted(rows, key=lambda row: len(row.tokens))
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for first in range(0, len(rows), BATCH_PROMPTS):
                _complete(model, tokenizer, by_length[first : first + BATCH_PROMPTS], config, window, on_text)
    finally:
        model.train(was_training)
    return [row.stream.text for row in rows]


def window_start(tokens: int, window: int) -> int:
    """First token that the model still sees of a text of `tokens`: moves by half a window when the window is full."""
    step = max(1, window // 2)
    return max(0, -(-(tokens - window) // step) * step)


class _Row:
    """One prompt and its completion so far."""

    def __init__(self, index: int, prompt: str, tokenizer: TextTokenizer, config: GenerateConfig) -> None:
        self.index = index
        self.seed = derive_seed(config.seed, "generate", prompt)
        self.tokens: list[int] = np.asarray(tokenizer.encode(prompt)).tolist() or [tokenizer.end_of_text]
        self.budget = config.max_new_tokens
        """New tokens it may still have."""
        self.stream = TextStream(config.stop)


def _complete(
    model: GPT,
    tokenizer: TextTokenizer,
    rows: list[_Row],
    config: GenerateConfig,
    window: int,
    on_text: OnText | None,
) -> None:
    sampler = Sampler([row.seed for row in rows], config.temperature, config.top_k, config.top_p)
    live = [place for place, row in enumerate(rows) if row.budget > 0]
    reader = _Reader(model, window, config.cache)
    while live:
        logits_BV = reader.next_logits([rows[place] for place in live])
        finished = []
        for at, (place, token) in enumerate(zip(live, sampler.sample(logits_BV, live), strict=True)):
            row = rows[place]
            row.tokens.append(token)
            row.budget -= 1
            ended = token == tokenizer.end_of_text
            shown = "" if ended else row.stream.push(tokenizer.decode_bytes([token]))
            if ended or row.stream.stopped or row.budget == 0:
                finished.append(at)
                shown += row.stream.finish()
            if shown and on_text is not None:
                on_text(row.index, shown)
        if finished:
            reader.drop(finished)
            live = [place for at, place in enumerate(live) if at not in finished]


class _Reader:
    """Has the model read rows and gives the logits of what comes next, with as little reading as the cache allows."""

    def __init__(self, model: GPT, window: int, use_cache: bool) -> None:
        self.model = model
        self.window = window
        self.use_cache = use_cache
        self.device = model.embedding.weight.device
        self._cache: KVCache | None = None
        self._starts: list[int] = []

    def next_logits(self, rows: Sequence[_Row]) -> torch.Tensor:
        """fp32 logits [B, V] of the token after each row; rows are those of the last call and one token longer."""
        starts = [window_start(len(row.tokens), self.window) for row in rows]
        if self._cache is not None and starts == self._starts:
            inputs_B1 = torch.tensor([row.tokens[-1:] for row in rows], device=self.device)
            return self.model.logits(inputs_B1, self._cache)[:, -1]
        self._starts = starts
        return self._read_again([row.tokens[start:] for row, start in zip(rows, starts, strict=True)], rows)

    def drop(self, finished: Sequence[int]) -> None:
        """Forgets rows, by their place in the last call."""
        kept = [at for at in range(len(self._starts)) if at not in finished]
        self._starts = [self._starts[at] for at in kept]
        if self._cache is not None and kept:
            self._cache.keep(kept)

    def _read_again(self, texts: Sequence[list[int]], rows: Sequence[_Row]) -> torch.Tensor:
        lengths = [len(text) for text in texts]
        longest = max(lengths)
        # Padding stands to the right, where causality hides it from the tokens that count.
        inputs_BT = torch.tensor([text + [0] * (longest - len(text)) for text in texts], device=self.device)
        if self.use_cache:
            furthest = max(length + row.budget - 1 for length, row in zip(lengths, rows, strict=True))
            slots = min(self.window, max(longest, furthest))
            self._cache = KVCache(self.model.config, len(rows), slots, self.model.compute_dtype, self.device)
        last_B = torch.tensor(lengths, device=self.device) - 1
        logits_BV = self.model.logits(inputs_BT, self._cache, last_B)[:, 0]
        if self._cache is not None:
            self._cache.truncate(lengths)
        return logits_BV


def _checked_window(model: GPT, tokenizer: TextTokenizer, config: GenerateConfig) -> int:
    if tokenizer.vocab_size != model.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model was trained with {model.vocab_size}\n"
            "use the tokenizer that lies beside the model's training data"
        )
    if config.max_new_tokens < 0 or config.temperature < 0 or config.top_k < 0:
        raise UserError("generate.max_new_tokens, generate.temperature and generate.top_k cannot be negative")
    if not 0 < config.top_p <= 1:
        raise UserError(f"generate.top_p={config.top_p} is not a share of the probability\nuse 0 < top_p <= 1")
    if "" in config.stop:
        raise UserError("generate.stop holds an empty text, which would stop everything\nremove it")
    window = model.sequence_length if config.window is None else config.window
    if window < 1:
        raise UserError(f"generate.window={window} leaves the model nothing to look at\nuse at least 1")
    if window > model.sequence_length and model.rotary is None:
        raise UserError(
            f"generate.window={window} is beyond the {model.sequence_length} learned positions of this model\n"
            f"use at most {model.sequence_length}"
        )
    return window
