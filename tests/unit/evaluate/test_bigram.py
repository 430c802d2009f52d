from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from gptscale.config.schema import DataConfig, SourceConfig, TokenizerConfig
from gptscale.data.corpus import open_split
from gptscale.data.heldout import HeldoutBatches
from gptscale.data.prepare import prepare
from gptscale.evaluate import bigram
from gptscale.evaluate.bigram import bigram_loss, fit_bigrams
from gptscale.flow import IGNORED_TARGET
from tests.helpers.batches import wide
from tests.helpers.text import documents, write_jsonl


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bigram")
    text = write_jsonl(folder / "text.jsonl", documents(120))
    data = DataConfig(sources=(SourceConfig(path=str(text)),), heldout_fraction=0.2, shard_tokens=7000)
    prepare(data, TokenizerConfig(vocab_size=400), folder / "corpus")
    return folder / "corpus"


class Textbook:
    """Witten–Bell straight from the formulas, with dictionaries."""

    def __init__(self, folder: Path, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.unigrams: Counter[int] = Counter()
        self.followers: defaultdict[int, Counter[int]] = defaultdict(Counter)
        for path in sorted((folder / "train").glob("*.tok.npy")):
            tokens = np.load(path).tolist()
            self.unigrams.update(tokens)
            for context, token in itertools.pairwise(tokens):
                self.followers[context][token] += 1

    def probability(self, context: int, token: int) -> float:
        total, different = self.unigrams.total(), len(self.unigrams)
        unigram = (self.unigrams[token] + different / self.vocab_size) / (total + different)
        followers = self.followers.get(context)
        if followers is None:
            return unigram
        return (followers[token] + len(followers) * unigram) / (followers.total() + len(followers))


@pytest.mark.parametrize("limit", [0, 9])
@pytest.mark.parametrize("at_once", [1 << 22, 100])
def test_the_loss_is_the_textbooks_on_exactly_the_models_targets(
    corpus: Path, limit: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bigram, "_TOKENS_AT_ONCE", at_once)
    textbook = Textbook(corpus, 400)
    losses = [
        -math.log(textbook.probability(context, token))
        for batch in map(wide, HeldoutBatches(corpus, 50, 4, limit, 0, 1))
        for context, token in zip(batch.inputs_BT.flatten().tolist(), batch.targets_BT.flatten().tolist(), strict=True)
        if token != IGNORED_TARGET
    ]
    assert bigram_loss(corpus, 50, limit) == pytest.approx(sum(losses) / len(losses), rel=1e-12)


def test_probabilities_add_up_to_one_for_every_context(corpus: Path) -> None:
    model = fit_bigrams(open_split(corpus, "train"))
    unseen = int(np.flatnonzero(model.successors == 0)[0])
    frequent = int(np.argmax(model.successors))
    for context in (unseen, frequent, 300):
        every = np.arange(400)
        total = np.exp(model.log_probability(np.full(400, context), every)).sum()
        assert total == pytest.approx(1.0, abs=1e-9)


def test_it_learns_more_than_frequencies(corpus: Path) -> None:
    model = fit_bigrams(open_split(corpus, "train"))
    shares = model.unigrams[model.unigrams > 0] / model.unigrams.sum()
    assert bigram_loss(corpus, 50, 0) < -float((shares * np.log(shares)).sum()) < math.log(400)
