"""Near-duplicates by MinHash and banding: texts that share most of their five-word shingles meet in some band.

A document becomes a set of shingles (five words in a row), the set a signature of 128 minima, and the signature a few
bands of neighbouring minima, each hashed to 64 bits. Two documents of Jaccard similarity s share a given band of r
minima with probability sʳ, so that with b bands they meet with probability 1 - (1 - sʳ)ᵇ, which rises steeply around
(1/b)^(1/r): b and r are chosen to put that at the similarity asked for. (Broder, "On the resemblance and containment of
documents", 1997; Leskovec, Rajaraman, Ullman, "Mining of Massive Datasets", section 3.4.)
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xxhash

MINIMA = 128
SHINGLE_WORDS = 5
_SEED = 1
_HASHED_BYTES = 8
# Scripts without spaces are taken letter by letter: otherwise a paragraph would be one word.
_WORD = re.compile(
    r"[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+"
)


@dataclass(frozen=True)
class Banding:
    """How a signature is cut: `bands` of `rows` minima."""

    bands: int
    rows: int

    @property
    def threshold(self) -> float:
        """The similarity around which documents begin to meet."""
        return float((1 / self.bands) ** (1 / self.rows))

    def probability(self, similarity: float) -> float:
        """That two documents of a Jaccard similarity meet in some band."""
        return float(1 - (1 - similarity**self.rows) ** self.bands)


def banding(similarity: float) -> Banding:
    """The cut of `MINIMA` whose threshold is nearest to `similarity`."""
    cuts = [Banding(MINIMA // rows, rows) for rows in range(1, MINIMA // 2 + 1)]
    return min(cuts, key=lambda cut: abs(cut.threshold - similarity))


def band_keys(texts: Sequence[str], cut: Banding) -> npt.NDArray[np.uint64]:
    """A key a band of each text, [texts, bands]."""
    from rensa import RMinHash

    shingles = [_shingles(text) for text in texts]
    offsets = np.concatenate([[0], np.cumsum([len(one) for one in shingles])]).astype(np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(np.concatenate(shingles), offsets, MINIMA, _SEED)
    minima = np.array(matrix.to_rows(), dtype="<u4")[:, : cut.bands * cut.rows].reshape(len(texts), cut.bands, cut.rows)
    keys = np.empty((len(texts), cut.bands), dtype=np.uint64)
    for number, signature in enumerate(minima):
        for band, part in enumerate(signature):
            keys[number, band] = xxhash.xxh3_64_intdigest(part.tobytes(), seed=band)
    return keys


def _shingles(text: str) -> npt.NDArray[np.uint64]:
    """A hash of every five words in a row, without regard to case and punctuation; fewer words are one shingle."""
    words = _WORD.findall(text.lower())
    hashes = np.array([xxhash.xxh3_64_intdigest(word.encode("utf-8", "surrogateescape")) for word in words], np.uint64)
    if len(hashes) < SHINGLE_WORDS:
        return np.array([xxhash.xxh3_64_intdigest(hashes.tobytes())], np.uint64)
    combined = np.zeros(len(hashes) - SHINGLE_WORDS + 1, dtype=np.uint64)
    for place in range(SHINGLE_WORDS):
        combined = (combined ^ hashes[place : place + len(combined)]) * np.uint64(0x9E3779B97F4A7C15)
        combined ^= combined >> np.uint64(32)
    return combined
