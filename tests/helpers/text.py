"""Made-up text for tests of data: different every document, the same every time."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import numpy as np

from gptscale.tokenizer import Tokenizer


@lru_cache(maxsize=16)
def _documents(count: int, words: int, seed: int) -> tuple[str, ...]:
    draw = np.random.default_rng(seed)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    vocabulary = ["".join(draw.choice(letters, size=draw.integers(2, 9))) for _ in range(3000)]
    texts = []
    for number in range(count):
        chosen = (draw.pareto(1.2, size=draw.integers(words // 2, words * 3 // 2)) * 20).astype(int) % len(vocabulary)
        picked = [vocabulary[index] for index in chosen]
        lines = [" ".join(picked[start : start + 12]) for start in range(0, len(picked), 12)]
        texts.append(f"{number}: " + ",\n".join(lines) + ".\n")
    return tuple(texts)


def documents(count: int, words: int = 120, seed: int = 0) -> list[str]:
    """Texts of about `words` words each, from a vocabulary of 3,000 drawn with falling frequency."""
    return list(_documents(count, words, seed))


def write_jsonl(path: Path, texts: list[str], key: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"id": number, key: text}) + "\n" for number, text in enumerate(texts)))
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder by its relative name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def stored_documents(folder: Path, split: str) -> list[str]:
    """Every document of a split, decoded from what numpy alone reads."""
    tokenizer = Tokenizer.load(folder / "tokenizer.model")
    found = []
    for path in sorted((folder / split).glob("*.tok.npy")):
        tokens, start = np.load(path), 0
        for end in np.load(str(path).replace(".tok.", ".end.")).tolist():
            assert tokens[end - 1] == tokenizer.end_of_text
            found.append(tokenizer.decode(tokens[start : end - 1]))
            start = end
        assert start == len(tokens)
    return found
