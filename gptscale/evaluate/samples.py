"""What a model under training makes of a few prompts, on whatever layout.

Shape legend: B prompts, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gptscale.generate.complete import window_start
from gptscale.generate.text import TextStream
from gptscale.parallel.engine import Engine
from gptscale.tokenizer import Tokenizer


@dataclass(frozen=True)
class Sample:
    prompt: str
    completion: str


def greedy_samples(
    engine: Engine, tokenizer: Tokenizer, prompts: Sequence[str], new_tokens: int, window: int
) -> list[Sample]:
    """The likeliest next token, again and again, up to `new_tokens` or the end of the text. A collective.

    All ranks take every step together, as ZeRO-3 must, and read all of the last `window` tokens each time: a cache
    would need to know how the layers are spread. The result is that of `gptscale generate generate.temperature=0`.
    """
    if not prompts:
        return []
    rows = [tokenizer.encode(prompt).tolist() or [tokenizer.end_of_text] for prompt in prompts]
    streams = [TextStream() for _ in prompts]
    ended = [False] * len(rows)
    for _ in range(new_tokens):
        for row, token in enumerate(_next_tokens(engine, rows, window)):
            if not ended[row]:
                rows[row].append(token)
                ended[row] = token == tokenizer.end_of_text
                if not ended[row]:
                    streams[row].push(tokenizer.decode_bytes([token]))
        if all(ended):
            break
    for stream in streams:
        stream.finish()
    return [Sample(prompt, stream.text) for prompt, stream in zip(prompts, streams, strict=True)]


def _next_tokens(engine: Engine, rows: Sequence[list[int]], window: int) -> list[int]:
    texts = [row[window_start(len(row), window) :] for row in rows]
    longest = max(len(text) for text in texts)
    # Padding stands to the right, where causality hides it from the tokens that count.
    inputs_BT = torch.tensor([text + [0] * (longest - len(text)) for text in texts])
    last_B = torch.tensor([len(text) - 1 for text in texts])
    chosen: list[int] = engine.next_logits(inputs_BT, last_B).argmax(dim=-1).tolist()
    return chosen
