"""The loss a bigram model reaches on the same held-out tokens: what a trained GPT has to beat to have learnt context.

Interpolated Witten–Bell smoothing (Witten and Bell, "The zero-frequency problem", IEEE Trans. Inf. Theory 37(4), 1991,
method C, in the recursive form of Chen and Goodman, "An empirical study of smoothing techniques", TR-10-98, §2.5):

    P(w)     = (c(w)   + U    / V)    / (N    + U)
    P(w | h) = (c(h,w) + T(h) · P(w)) / (c(h) + T(h))

with c(·) the counts in the training tokens, N their number, U the number of different tokens, V the vocabulary size,
c(h) how often h has a successor and T(h) how many different successors it has. A context never seen gives P(w).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gptscale.data.cache import ShardCache
from gptscale.data.heldout import heldout_rows, heldout_selection
from gptscale.data.remote import AnyCorpus, open_corpus

_TOKENS_AT_ONCE = 1 << 22
_ROWS_AT_ONCE = 1024

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class BigramModel:
    """Counts of a training corpus. Pairs are coded h · V + w, sorted."""

    vocab_size: int
    unigrams: Counts
    pairs: Counts
    pair_counts: Counts
    successors: Counts
    """c(h), [V]"""
    different_successors: Counts
    """T(h), [V]"""

    def log_probability(self, contexts: Counts, tokens: Counts) -> npt.NDArray[np.float64]:
        """ln P(token | context), elementwise [n]."""
        different = np.count_nonzero(self.unigrams)
        unigram = (self.unigrams[tokens] + different / self.vocab_size) / (self.unigrams.sum() + different)
        codes = contexts * self.vocab_size + tokens
        at = np.minimum(np.searchsorted(self.pairs, codes), len(self.pairs) - 1)
        together = np.where(self.pairs[at] == codes, self.pair_counts[at], 0)
        varied, followed = self.different_successors[contexts], self.successors[contexts]
        seen = followed > 0
        bigram = (together + varied * unigram) / np.where(seen, followed + varied, 1)
        logarithms: npt.NDArray[np.float64] = np.log(np.where(seen, bigram, unigram))
        return logarithms


def fit_bigrams(corpus: AnyCorpus) -> BigramModel:
    """Count all tokens of a split, and all pairs of neighbours within a shard, document boundaries included: what the
    GPT is trained on. Memory grows with the number of different pairs only."""
    vocab_size = corpus.manifest.vocab_size
    unigrams = np.zeros(vocab_size, dtype=np.int64)
    pairs, counts = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    for shard in corpus.manifest.shards:
        with corpus.tokens(shard) as tokens:
            for start in range(0, len(tokens), _TOKENS_AT_ONCE):
                block = np.array(tokens[start : start + _TOKENS_AT_ONCE + 1], dtype=np.int64)
                unigrams += np.bincount(block[:_TOKENS_AT_ONCE], minlength=vocab_size)
                new_pairs, new_counts = np.unique(block[:-1] * vocab_size + block[1:], return_counts=True)
                pairs, counts = _merged(pairs, counts, new_pairs, new_counts)
    contexts = pairs // vocab_size
    return BigramModel(
        vocab_size=vocab_size,
        unigrams=unigrams,
        pairs=pairs,
        pair_counts=counts,
        successors=np.bincount(contexts, weights=counts, minlength=vocab_size).astype(np.int64),
        different_successors=np.bincount(contexts, minlength=vocab_size).astype(np.int64),
    )


def bigram_loss(
    folder: str | Path, sequence_length: int, limit_sequences: int, cache: ShardCache | None = None
) -> float:
    """Mean loss in nats per token of a bigram model fitted on `train`, over exactly the targets of `HeldoutBatches`.

    Each target's context is the token before it in its row; for a row's first target that is the row's first id, which
    the GPT sees too. Raises UserError where the prepared folder is damaged.
    """
    model = fit_bigrams(open_corpus(folder, "train", cache=cache))
    reader = heldout_rows(folder, sequence_length, cache)
    total, targets = 0.0, 0
    rows = heldout_selection(reader, limit_sequences)
    for first in range(0, len(rows), _ROWS_AT_ONCE):
        rows_NT, lengths = reader.read(rows[first : first + _ROWS_AT_ONCE])
        real_NT = np.arange(sequence_length) < lengths[:, None]
        rows_NT = rows_NT.astype(np.int64)
        total -= float(model.log_probability(rows_NT[:, :-1][real_NT], rows_NT[:, 1:][real_NT]).sum())
        targets += int(lengths.sum())
    return total / targets


def _merged(pairs: Counts, counts: Counts, new_pairs: Counts, new_counts: npt.NDArray[Any]) -> tuple[Counts, Counts]:
    if not len(pairs):
        return new_pairs, new_counts
    every, where = np.unique(np.concatenate([pairs, new_pairs]), return_inverse=True)
    weights = np.concatenate([counts, new_counts])
    return every, np.bincount(where, weights=weights, minlength=len(every)).astype(np.int64)
