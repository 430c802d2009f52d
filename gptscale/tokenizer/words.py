"""Text cut into words, each encoded once: the same ids as of the whole text, for a fraction of the time.

A piece is made of neighbouring characters, so where none can span, what is on one side is encoded as if the other were
not there. sentencepiece's pieces hold spaces at their beginning alone, unless it is told otherwise, and mostly either
letters or none. So text may be cut there; the words come again and again, and what each encodes to is kept.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from sys import getsizeof

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.uint32]

_KEPT_BYTES = 64 << 20
"""Of the words that are kept: then all are forgotten, and those that come again kept again."""
_ENTRY_BYTES = 104
"""A word's place in the table, at worst."""
_LONGEST = 64
"""Characters of a word that is kept: longer ones do not come again."""

_LETTER = r"[^\W\d_]"
_NO_LETTER = r"[\d_!-/:-@\[-^`{-~\x00-\x1f\x7f]++|[^\w\x00-\x7f]++"
"""Nor a space."""
_LETTERS_APART = re.compile(rf" *+(?:[a-zA-Z]++{_LETTER}*+|(?:{_NO_LETTER})++|{_LETTER}++)| +")
"""The spaces before, and letters or what are none: ASCII by itself, which is faster than by Unicode's classes."""
_LINES_APART = re.compile(r" *[^ \n]*\n+| *[^ \n]+| +")
_BEFORE_SPACES = re.compile(r" *[^ ]+| +")
_PATTERNS = (_LETTERS_APART, _LINES_APART, _BEFORE_SPACES)
"""Each cuts between two characters by these alone; the finest first."""


def word_pattern(pieces: Iterable[str]) -> re.Pattern[str] | None:
    """The finest pattern whose matches, one after the other, are a text cut where none of `pieces` spans; None where
    each would cut one of them."""
    wide = [piece for piece in pieces if len(piece) > 1]
    return next((pattern for pattern in _PATTERNS if all(map(pattern.fullmatch, wide))), None)


class WordEncoder:
    """Encodes texts by their words. Threads may share it."""

    def __init__(self, pattern: re.Pattern[str], encode: Callable[[Sequence[str]], Sequence[npt.NDArray[np.int32]]]):
        """`encode` gives the ids of each of some words."""
        self._find = pattern.findall
        self._encode = encode
        self._kept: dict[str, bytes] = {}
        self._kept_bytes = 0

    def __call__(self, texts: Sequence[str]) -> list[Ids]:
        if self._kept_bytes > _KEPT_BYTES:
            self._kept, self._kept_bytes = {}, 0
        known = self._kept
        words = [self._find(text) for text in texts]
        new = list(set(chain.from_iterable(words)).difference(known))
        passing: dict[str, bytes] = {}
        if new:
            for word, ids in zip(new, self._encode(new), strict=True):
                if len(word) > _LONGEST:
                    passing[word] = ids.tobytes()
                else:
                    known[word] = of_word = ids.tobytes()
                    self._kept_bytes += getsizeof(word) + getsizeof(of_word) + _ENTRY_BYTES
        # A word has ids, so that what is found is true.
        look = (lambda word: known.get(word) or passing[word]) if passing else known.__getitem__
        return [np.frombuffer(b"".join(map(look, some)), dtype=np.uint32) for some in words]
