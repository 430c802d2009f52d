"""Text to token ids and back, exactly: whatever UTF-8 goes in comes out, byte for byte."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gptscale.runtime.errors import UserError

Ids = npt.NDArray[np.uint32]

FILES = ("tokenizer.model", "tokenizer.json")
"""What a tokenizer's file is called, beside shards, checkpoints and runs: a sentencepiece model's, a tokenizer.json."""
LONGEST_RUN = 1 << 20
"""Characters that are encoded at once: libraries hold some 50 bytes and more a character, so one huge document must not
decide the memory."""
PROBE = "  a\tB \r\n\n<|endoftext|><s> \u0301\ufeff\x00é ﬁ 12345 中 A\u00a0b  c\n"
"""What a tokenizer that normalises, adds or drops anything would not give back."""


class Tokenizer(ABC):
    """A vocabulary of pieces of bytes. Build one with `Tokenizer.load` or `train_tokenizer`."""

    file_name: str
    """Of `FILES`."""

    def __init__(self, content: bytes, pieces: Sequence[bytes], special: dict[str, int], end_of_text: int) -> None:
        """`content` of the file; `pieces`: the bytes that each id stands for, none for special tokens."""
        self.sha256: str = hashlib.sha256(content).hexdigest()
        """Of the file."""
        self._pieces = pieces
        self.vocab_size: int = len(pieces)
        self.special = special
        """Every token that no text encodes to, by name."""
        self.end_of_text = end_of_text

    @staticmethod
    def load(path: Path) -> Tokenizer:
        """Read a sentencepiece model or a tokenizer.json. Raises UserError where it is missing or cannot be used."""
        content = _content(path)
        # Each imports its library, of which a process mostly needs one.
        if content.lstrip()[:1] == b"{":
            from gptscale.tokenizer.json_model import JsonTokenizer

            return JsonTokenizer(content, str(path))
        from gptscale.tokenizer.sentencepiece_model import SentencePieceTokenizer

        return SentencePieceTokenizer(content, str(path))

    @staticmethod
    def sha256_of(path: Path) -> str:
        """`sha256` of the tokenizer in a file, without loading it. Raises UserError where the file is missing."""
        return hashlib.sha256(_content(path)).hexdigest()

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """`encode` for each text, on the calling thread. Much faster for many short texts than one by one."""

    def encode(self, text: str) -> Ids:
        """Token ids, uint32 [tokens]; never a special token. Lone surrogates raise UnicodeEncodeError: not UTF-8."""
        return self.encode_batch([text])[0]

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
        return b"".join([self._pieces[token] for token in tokens.tolist()])

    def byte_lengths(self) -> npt.NDArray[np.int64]:
        """Bytes of text that each token stands for, [vocab_size]; 0 for special tokens."""
        return np.array([len(piece) for piece in self._pieces], dtype=np.int64)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise UserError(
            f"{path}: no tokenizer there\nname the file: …/tokenizer.model, or a …/tokenizer.json"
        ) from error


def find_tokenizer(folder: Path) -> Path | None:
    """The tokenizer's file in a prepared folder, a checkpoint or a run; None where there is none."""
    return next((folder / name for name in FILES if (folder / name).is_file()), None)
