"""A `tokenizer.json` of Hugging Face's tokenizers library: the vocabularies of public models.

Those that give text back exactly: byte-level BPE (GPT-2, Llama 3, Qwen, …), and BPE that writes a space as U+2581 and
falls back to bytes, without adding one in front (Gemma). Their special tokens are never read out of text, and whatever
a template would add around it is left out. Ids are otherwise those of the library.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import tokenizers

from gptscale.runtime.errors import UserError
from gptscale.tokenizer.tokenizer import LONGEST_RUN, PROBE, Ids, Tokenizer

_log = logging.getLogger(__name__)

_ENDS_OF_TEXT = (
    "<|endoftext|>",  # GPT-2, GPT-NeoX, OLMo, Qwen
    "<|end_of_text|>",  # Llama 3, whose <|eot_id|> ends a turn
    "<\uff5cend\u2581of\u2581sentence\uff5c>",  # DeepSeek
    "<eos>",  # Gemma
    "</s>",
    "[EOS]",
    "<|eos|>",
)
"""What closes a document, in the order in which it is looked for."""
_SPACE_MARK = "\u2581"
_WINDOW = 512
"""Characters on either side of a cut within which it must change nothing."""
_BETWEEN_WORDS = re.compile(r"(?<=\w)(?= \w)")


class JsonTokenizer(Tokenizer):
    file_name = "tokenizer.json"

    def __init__(self, content: bytes, name: str) -> None:
        """`name` is what errors call the file. Raises UserError for one that does not give text back exactly."""
        # The library would start threads of its own, and there is a process a core already.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        try:
            fields: dict[str, Any] = json.loads(content)
            encoder = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises nothing narrower
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"{name}: not a tokenizer.json ({first})\nname one of Hugging Face's tokenizers, or a tokenizer.model"
            ) from error
        encoder.no_truncation()
        encoder.no_padding()
        encoder.encode_special_tokens = True  # as text, letter by letter
        self._encoder = encoder
        self._byte_level = _mentions(fields, "ByteLevel")
        added = encoder.get_added_tokens_decoder()
        special = {token.content: number for number, token in sorted(added.items()) if token.special}
        end_of_text = next((special[token] for token in _ENDS_OF_TEXT if token in special), None)
        if end_of_text is None:
            raise UserError(
                f"{name}: no special token that ends a document (it has: {', '.join(sorted(special)[:6]) or 'none'})\n"
                f"add one of {', '.join(_ENDS_OF_TEXT)} to its added_tokens, with special=true"
            )
        super().__init__(content, _pieces(encoder, self._byte_level), special, end_of_text)
        self._mark_ids = None if self._byte_level else self._ids_of_mark(name)
        if any(token.lstrip or token.rstrip for token in added.values() if not token.special) or not self._exact():
            raise UserError(
                f"{name}: this tokenizer changes text (it normalises, adds or drops spaces, or knows no bytes)\n"
                "use one of byte-level BPE (GPT-2, Llama 3, Qwen, …), or leave tokenizer.path out to train one"
            )
        if (fields.get("normalizer") or {}).get("type") == "NFC":
            _log.info("%s composes characters (NFC): text that is not in that form is stored in it", name)

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        runs: list[str] = []
        plans: list[list[int]] = []
        """For each text the indices of its runs; -1 stands for a U+2581 between them."""
        for text in texts:
            plan: list[int] = []
            for between, stretch in enumerate(text.split(_SPACE_MARK) if self._mark_ids is not None else [text]):
                if between:
                    plan.append(-1)
                for run in self._runs(stretch):
                    plan.append(len(runs))
                    runs.append(run)
            plans.append(plan)
        for run in runs:
            run.encode()  # the library says less clearly what is no UTF-8, and where
        encoded = [self._array(one.ids) for one in self._encoder.encode_batch_fast(runs, add_special_tokens=False)]
        return [self._joined(plan, encoded) for plan in plans]

    @staticmethod
    def _array(ids: list[int]) -> Ids:
        return np.array(ids, dtype=np.uint32)

    def _joined(self, plan: list[int], encoded: Sequence[Ids]) -> Ids:
        if len(plan) == 1 and plan[0] >= 0:
            return encoded[plan[0]]
        parts = [encoded[run] if run >= 0 else self._mark_ids for run in plan]
        return np.concatenate([part for part in parts if part is not None]) if parts else np.empty(0, dtype=np.uint32)

    def _runs(self, text: str) -> list[str]:
        """`text` in stretches of at most `LONGEST_RUN` characters, where it can be cut without changing its ids."""
        runs = []
        while len(text) > LONGEST_RUN:
            cut = self._cut(text)
            if cut is None:
                break
            runs.append(text[:cut])
            text = text[cut:]
        return [*runs, text] if text else runs

    def _cut(self, text: str) -> int | None:
        """The last place between two words, not far before the longest run ends, where a cut changes no id near it."""
        first = LONGEST_RUN - 8 * _WINDOW
        for found in reversed(list(_BETWEEN_WORDS.finditer(text, first, LONGEST_RUN))[-32:]):
            cut = found.start()
            before, after = text[cut - _WINDOW : cut], text[cut : cut + _WINDOW]
            apart, whole = (self._encode(before) + self._encode(after)), self._encode(before + after)
            if apart == whole:
                return cut
        return None

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._encoder.encode(text, add_special_tokens=False).ids
        return ids

    def _ids_of_mark(self, name: str) -> Ids:
        found = [self._encoder.token_to_id(f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode()]
        if None in found:
            raise UserError(
                f"{name}: the vocabulary lacks the 256 byte pieces\n"
                "use one of byte-level BPE (GPT-2, Llama 3, Qwen, …), or leave tokenizer.path out to train one"
            )
        return np.array(found, dtype=np.uint32)

    def _exact(self) -> bool:
        """Whether texts come back that would show what a tokenizer can do to them."""
        return all(self.decode_bytes(self.encode(text)) == text.encode() for text in (PROBE, PROBE.strip(), "x", " x "))


def _mentions(fields: dict[str, Any], kind: str) -> bool:
    """Whether a pre-tokenizer or decoder is, or holds, one of a kind."""

    def within(part: Any) -> bool:
        if isinstance(part, dict):
            return part.get("type") == kind or any(map(within, part.values()))
        return isinstance(part, list) and any(map(within, part))

    return within(fields.get("pre_tokenizer")) or within(fields.get("decoder"))


def _pieces(encoder: Any, byte_level: bool) -> list[bytes]:
    """The bytes of each id; none for special tokens, and for ids that no token has."""
    vocabulary: dict[str, int] = encoder.get_vocab(with_added_tokens=True)
    pieces = [b""] * (max(vocabulary.values()) + 1)
    added = encoder.get_added_tokens_decoder()
    letters = _byte_letters()
    for piece, number in vocabulary.items():
        if number in added:
            pieces[number] = b"" if added[number].special else added[number].content.encode()
        elif byte_level:
            # One with other letters stands for no bytes, and no text encodes to it.
            known = all(letter in letters for letter in piece)
            pieces[number] = bytes(letters[letter] for letter in piece) if known else b""
        elif re.fullmatch(r"<0x[0-9A-F]{2}>", piece):
            pieces[number] = bytes([int(piece[3:-1], 16)])
        else:
            pieces[number] = piece.replace(_SPACE_MARK, " ").encode()
    return pieces


def _byte_letters() -> dict[str, int]:
    """How byte-level vocabularies write bytes (Radford et al., GPT-2): as themselves where Latin-1 shows them, the
    others, in order, as the characters from U+0100 on."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(0x100 + place): byte for place, byte in enumerate(others)}
