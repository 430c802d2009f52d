"""Text to token ids and back, exactly: whatever UTF-8 goes in comes out, byte for byte.

sentencepiece writes a space as U+2581 ("▁") inside its pieces and cannot tell a real U+2581 from a space. So text is
cut at each U+2581 before it reaches sentencepiece, and the character is written as the three byte pieces of its UTF-8.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import sentencepiece

from gptscale.runtime.errors import UserError
from gptscale.tokenizer.special import END_OF_TEXT

Ids = npt.NDArray[np.uint32]

_SPACE_MARK = "\u2581"
_LONGEST_RUN = 1 << 20
"""Characters given to sentencepiece at once: it holds some 50 bytes a character, so one huge document must not decide
the memory. A longer text is cut after the last line that fits."""
_PROBE = "  a\tb \r\n\n<|endoftext|><s> \u0301\ufeff\x00é 12345 中 "


class Tokenizer:
    """A sentencepiece model with byte fallback. Build one with `Tokenizer.load` or `train_tokenizer`."""

    def __init__(self, model: bytes, name: str) -> None:
        """`name` is what errors call the model. Raises UserError for a model that does not give text back exactly."""
        try:
            if not model:
                raise RuntimeError("empty")
            self._processor: Any = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise UserError(
                f"{name}: not a sentencepiece model\nname a tokenizer.model that gptscale trained"
            ) from error
        self.sha256: str = hashlib.sha256(model).hexdigest()
        """Of the model file."""
        self.vocab_size: int = self._processor.get_piece_size()
        self._bytes = _bytes_of_pieces(self._processor)
        self.special: dict[str, int] = {
            self._processor.id_to_piece(token): token
            for token in range(self.vocab_size)
            if self._processor.is_control(token) or self._processor.is_unknown(token)
        }
        """Every token that no text encodes to, by name."""
        if END_OF_TEXT not in self.special or self._processor.piece_to_id("<0x00>") == self._processor.unk_id():
            raise UserError(
                f"{name}: the model lacks the control token {END_OF_TEXT} or the 256 byte pieces\n"
                "use a tokenizer.model that gptscale trained (`gptscale prepare` without tokenizer.path trains one)"
            )
        self.end_of_text: int = self.special[END_OF_TEXT]
        self._space_mark_ids = np.array(
            [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode()], dtype=np.uint32
        )
        if self.decode(self.encode(_PROBE)) != _PROBE:
            raise UserError(
                f"{name}: the model changes text (it normalises, adds or drops spaces)\n"
                "train with normalization_rule_name=identity, add_dummy_prefix=false, remove_extra_whitespaces=false"
            )

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a model file. Raises UserError where it is missing or is no model that gptscale can use."""
        try:
            model = path.read_bytes()
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            raise UserError(f"{path}: no tokenizer model there\nname the file: …/tokenizer.model") from error
        return cls(model, str(path))

    def encode(self, text: str) -> Ids:
        """Token ids, uint32 [tokens]; never a special token. Lone surrogates raise UnicodeEncodeError: not UTF-8."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """`encode` for each text, on the calling thread. Much faster for many short texts than one by one."""
        runs: list[str] = []
        plans: list[list[int]] = []
        """For each text the indices of its runs; -1 stands for a U+2581 between them."""
        for text in texts:
            plan: list[int] = []
            for between, stretch in enumerate(text.split(_SPACE_MARK)):
                if between:
                    plan.append(-1)
                for run in _runs(stretch):
                    plan.append(len(runs))
                    runs.append(run)
            plans.append(plan)
        try:
            encoded = self._processor.encode(runs, return_type="numpy", num_threads=1) if runs else []
        except TypeError:
            for run in runs:
                run.encode()  # says what is wrong and where: sentencepiece does not
            raise
        return [self._joined(plan, encoded) for plan in plans]

    def _joined(self, plan: list[int], encoded: Sequence[npt.NDArray[np.int32]]) -> Ids:
        if len(plan) == 1 and plan[0] >= 0:
            return encoded[plan[0]].view(np.uint32)
        parts = [self._space_mark_ids if run < 0 else encoded[run].view(np.uint32) for run in plan]
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.uint32)

    def decode(self, ids: Iterable[int] | npt.NDArray[Any]) -> str:
        """Text of the tokens. Bytes that are no UTF-8, which only a model can produce, become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int] | npt.NDArray[Any]) -> bytes:
        """The exact bytes of the tokens; special tokens give nothing. Raises ValueError for an id that there is not.

        A token may end inside a character, so that a stream of tokens has to be joined as bytes, not as text.
        """
        tokens = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), dtype=np.int64).reshape(-1)
        if tokens.size and (tokens.min() < 0 or tokens.max() >= self.vocab_size):
            raise ValueError(f"token ids must lie within 0…{self.vocab_size - 1}: got {tokens.min()}…{tokens.max()}")
        return b"".join([self._bytes[token] for token in tokens.tolist()])

    def byte_lengths(self) -> npt.NDArray[np.int64]:
        """Bytes of text that each token stands for, [vocab_size]; 0 for special tokens."""
        return np.array([len(text) for text in self._bytes], dtype=np.int64)


def _runs(text: str) -> list[str]:
    """`text` in stretches short enough for sentencepiece, each ending with a line where there is one; [] if empty."""
    if len(text) <= _LONGEST_RUN:
        return [text] if text else []
    runs = []
    start = 0
    while start < len(text):
        stop = min(len(text), start + _LONGEST_RUN)
        if stop < len(text):
            line_end = text.rfind("\n", start, stop) + 1
            stop = line_end if line_end > start else stop
        runs.append(text[start:stop])
        start = stop
    return runs


def _bytes_of_pieces(processor: Any) -> list[bytes]:
    def of(token: int) -> bytes:
        if processor.is_control(token) or processor.is_unknown(token):
            return b""
        piece: str = processor.id_to_piece(token)
        if processor.is_byte(token):
            return bytes([int(piece[1:-1], 16)])  # "<0x41>"
        return piece.replace(_SPACE_MARK, " ").encode()

    return [of(token) for token in range(processor.get_piece_size())]
