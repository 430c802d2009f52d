"""Fill in the middle: a share of a source's documents, cut in three and put in another order, so that a model learns to
write what belongs between two texts.

Bavarian et al., "Efficient Training of Language Models to Fill in the Middle" (arXiv 2207.14255): a document is cut at
two places drawn evenly from its characters, and written as *prefix, suffix, middle* (PSM) or as *suffix, prefix and
middle* (SPM), a special token before each. What is drawn depends on the document's identity alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xxhash

from gptscale.runtime.errors import UserError
from gptscale.tokenizer import Tokenizer
from gptscale.tokenizer.special import FIM_TOKENS
from gptscale.tokenizer.tokenizer import Ids

_NAMES = (FIM_TOKENS, ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"), ("<PRE>", "<SUF>", "<MID>"))
"""What vocabularies call the tokens: ours and Qwen's, StarCoder's, Code Llama's."""
_RANGE = 1 << 64


@dataclass(frozen=True)
class FillInMiddle:
    """How documents are cut. Build it with `fill_in_middle`."""

    rate: float
    """Share of the documents that are."""
    spm_rate: float
    """Of those, the share that begins with the suffix."""
    prefix: int
    suffix: int
    middle: int
    """Ids of the special tokens."""

    def encode(self, tokenizer: Tokenizer, texts: list[str], digests: list[int]) -> list[Ids]:
        """Token ids of each document, whole or cut; `digests` are hashes of their identities."""
        runs: list[str] = []
        plans: list[list[int]] = []
        """For each document special tokens (≥ 0) and runs (-1 - index)."""
        for text, digest in zip(texts, digests, strict=True):
            plan = []
            for part in self._parts(text, digest):
                if isinstance(part, int):
                    plan.append(part)
                else:
                    plan.append(-1 - len(runs))
                    runs.append(part)
            plans.append(plan)
        encoded = tokenizer.encode_batch(runs)
        return [
            np.concatenate([np.array([one], np.uint32) if one >= 0 else encoded[-1 - one] for one in plan])
            for plan in plans
        ]

    def _parts(self, text: str, digest: int) -> list[int | str]:
        chosen, order, *places = (_drawn(digest, number) for number in range(4))
        if chosen >= self.rate * _RANGE:
            return [text]
        first, second = sorted(place * (len(text) + 1) // _RANGE for place in places)
        prefix, middle, suffix = text[:first], text[first:second], text[second:]
        if order < self.spm_rate * _RANGE:
            return [self.prefix, self.suffix, suffix, self.middle, prefix + middle]
        return [self.prefix, prefix, self.suffix, suffix, self.middle, middle]


def fill_in_middle(rate: float, spm_rate: float, tokenizer: Tokenizer) -> FillInMiddle | None:
    """None for a rate of 0. Raises UserError where the vocabulary has no tokens for it."""
    if not rate:
        return None
    for names in _NAMES:
        if all(name in tokenizer.special for name in names):
            return FillInMiddle(rate, spm_rate, *(tokenizer.special[name] for name in names))
    raise UserError(
        f"data.sources[…].fim_rate={rate}: the tokenizer has no special tokens {', '.join(FIM_TOKENS)}\n"
        "leave tokenizer.path out to train one that has them, or set fim_rate=0"
    )


def _drawn(digest: int, number: int) -> int:
    """The `number`-th even draw from 0…2⁶⁴-1 of a document."""
    return xxhash.xxh3_64_intdigest(digest.to_bytes(8, "little"), seed=1 + number)
