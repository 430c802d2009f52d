"""Text to ids by other people's tokenizers, one thread each, from the same JSON lines as ours."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_DOCUMENTS_AT_ONCE = 256
CUT = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
"""GPT-2's, by which both byte-level tokenizers cut words."""
SPECIAL = "<|endoftext|>"


@dataclass(frozen=True)
class Encoded:
    text_bytes: int
    tokens: int
    wall_s: float
    """From the first document read to the last encoded; loading the tokenizer not included."""
    cpu_s: float


def train_byte_level(text_files: list[str], vocab_size: int, target: str) -> None:
    """A byte-level BPE as Hugging Face's library trains it, as `tokenizer.json`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    lines = (line for file in text_files for line in Path(file).read_text(encoding="utf-8").split("\n"))
    tokenizer.train_from_iterator((json.loads(line)["text"] for line in lines if line), trainer)
    tokenizer.save(target)


def encode(kind: str, model: str, text_files: list[str]) -> Encoded:
    """`kind`: sentencepiece, tokenizers or tiktoken; `model`: the file of its tokenizer."""
    load = {"sentencepiece": _sentencepiece, "tokenizers": _tokenizers, "tiktoken": _tiktoken}[kind]
    counted = load(model)
    text_bytes = tokens = 0
    began_s, began_cpu_s = time.perf_counter(), time.process_time()
    for file in text_files:
        texts: list[str] = []
        with open(file, encoding="utf-8") as lines:
            for line in lines:
                text = json.loads(line)["text"]
                text_bytes += len(text.encode())
                texts.append(text)
                if len(texts) == _DOCUMENTS_AT_ONCE:
                    tokens += counted(texts)
                    texts = []
        tokens += counted(texts)
    return Encoded(text_bytes, tokens, time.perf_counter() - began_s, time.process_time() - began_cpu_s)


def _sentencepiece(model: str) -> Any:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=model)

    def counted(texts: list[str]) -> int:
        return sum(map(len, processor.encode(texts, num_threads=1, return_type="numpy"))) if texts else 0

    return counted


def _tokenizers(model: str) -> Any:
    os.environ["RAYON_NUM_THREADS"] = "1"
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(model)

    def counted(texts: list[str]) -> int:
        return sum(len(encoding.ids) for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False))

    return counted


def _tiktoken(model: str) -> Any:
    import tiktoken

    ranks = {_bytes(piece): rank for piece, rank in json.loads(Path(model).read_text())["model"]["vocab"].items()}
    special = {SPECIAL: ranks.pop(SPECIAL.encode())}
    encoding = tiktoken.Encoding("byte-level", pat_str=CUT, mergeable_ranks=ranks, special_tokens=special)

    def counted(texts: list[str]) -> int:
        return sum(len(encoding.encode_to_numpy(text, disallowed_special=())) for text in texts)

    return counted


def _bytes(piece: str) -> bytes:
    """Bytes of a piece that is spelt in GPT-2's printable alphabet."""
    if piece == SPECIAL:
        return piece.encode()
    return bytes(_ALPHABET[letter] for letter in piece)


def _printable() -> dict[str, int]:
    """GPT-2's: printable bytes stand for themselves, the others for letters from 256 on, in their order."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    found = {chr(byte): byte for byte in plain}
    others = (byte for byte in range(256) if byte not in found.values())
    return found | {chr(256 + number): byte for number, byte in enumerate(others)}


_ALPHABET = _printable()
