"""Text encoded word by word has the ids that sentencepiece gives the whole."""

from __future__ import annotations

import io
import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from sys import getsizeof
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from gptscale.runtime.errors import UserError
from gptscale.tokenizer import words
from gptscale.tokenizer.sentencepiece_model import SentencePieceTokenizer
from gptscale.tokenizer.train import train_tokenizer
from gptscale.tokenizer.words import WordEncoder, word_pattern
from tests.helpers.text import documents

CODE = "def main(self):\n\tif x_1  ==  1234:\r\n        return self.naïve_café['ab']  # 中文 и русский\n\n\n" * 20
HINDI = "यह हिन्दी में लिखा एक छोटा सा वाक्य है।  हिन्दी में वाक्य लिखा है।\n" * 20
LETTERS = st.sampled_from("ab ex.,_('1\n\t  éΩ中ि्и²３\u2014\u3000\x7f\x85")


def trained(path: Path, texts: Sequence[str], vocab_size: int = 700) -> tuple[SentencePieceTokenizer, Any]:
    """Ours, and what it is built on."""
    train_tokenizer(texts, vocab_size, path)
    return SentencePieceTokenizer(path.read_bytes(), "model"), sentencepiece.SentencePieceProcessor(
        model_file=str(path)
    )


def other_model(**options: Any) -> bytes:
    """As ours are trained, but for these options."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*documents(50), CODE]),
        model_writer=model,
        vocab_size=600,
        byte_fallback=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        bos_id=-1,
        eos_piece="<|endoftext|>",
        minloglevel=2,
        **{
            "model_type": "bpe",
            "allow_whitespace_only_pieces": True,
            "normalization_rule_name": "identity",
            **options,
        },
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[SentencePieceTokenizer, Any]:
    return trained(tmp_path_factory.mktemp("words") / "tokenizer.model", [*documents(50), CODE])


@settings(max_examples=500, deadline=None)
@given(st.one_of(st.text(LETTERS, max_size=60), st.text(max_size=40)))
@example("   two  spaces\n\n  and at the end  ")
@example(CODE)
def test_any_text_has_the_ids_of_the_whole(pair: tuple[SentencePieceTokenizer, Any], text: str) -> None:
    ours, theirs = pair
    text = text.replace("\u2581", "")  # which sentencepiece takes for a space, and ours does not
    assert ours.encode(text).tolist() == theirs.encode(text)


def test_it_is_cut_as_finely_as_the_pieces_allow(tmp_path: Path, pair: tuple[SentencePieceTokenizer, Any]) -> None:
    ours, _ = pair
    assert pattern_of(ours) is words._LETTERS_APART
    # Of marks, which are no letters, Hindi has pieces that join them with letters.
    hindi, theirs = trained(tmp_path / "hindi.model", [*documents(50), HINDI])
    assert pattern_of(hindi) is words._LINES_APART
    for text in (HINDI, CODE, *documents(3)):
        assert hindi.encode(text).tolist() == theirs.encode(text)


@pytest.mark.parametrize(
    "options", [{"model_type": "unigram"}, {"split_by_whitespace": False}], ids=["unigram", "across spaces"]
)
def test_a_vocabulary_that_does_not_allow_it_encodes_the_whole(options: dict[str, Any]) -> None:
    model = other_model(**options)
    ours = SentencePieceTokenizer(model, "model")
    assert pattern_of(ours) is None
    assert ours.encode(CODE).tolist() == sentencepiece.SentencePieceProcessor(model_proto=model).encode(CODE)


def test_a_model_with_rules_of_its_own_is_refused() -> None:
    """Though it changes nothing that every model is tried with."""
    described = ModelProto.FromString(other_model())
    usual = ModelProto.FromString(other_model(normalization_rule_name="nfkc"))
    described.normalizer_spec.precompiled_charsmap = usual.normalizer_spec.precompiled_charsmap
    assert described.normalizer_spec.precompiled_charsmap
    with pytest.raises(UserError, match="the model changes text"):
        SentencePieceTokenizer(described.SerializeToString(), "model")


def pattern_of(tokenizer: SentencePieceTokenizer) -> Any:
    encode = tokenizer._encode_runs
    return encode._find.__self__ if isinstance(encode, WordEncoder) else None  # type: ignore[attr-defined]


@pytest.mark.parametrize("pieces", [[" a", "b c"], ["a  "], [" ( b"]])
def test_pieces_that_hold_a_space_behind_something_forbid_it(pieces: list[str]) -> None:
    assert word_pattern(["th", " the", "  ", *pieces]) is None


@pytest.mark.parametrize("pattern", words._PATTERNS)
@given(st.text(LETTERS, max_size=60))
def test_words_are_the_text_and_their_borders_depend_on_two_characters(pattern: Any, text: str) -> None:
    found = pattern.findall(text)
    assert "".join(found) == text
    for before, after in pairwise(found):
        assert pattern.findall(before[-1] + after[0]) == [before[-1], after[0]]
    for word in found:
        for a, b in pairwise(word):
            assert pattern.fullmatch(a + b)


def test_what_is_kept_is_bounded_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def encode(some: Sequence[str]) -> list[npt.NDArray[np.int32]]:
        asked.append(len(some))
        return [np.array([ord(letter) for letter in word], dtype=np.int32) for word in some]

    monkeypatch.setattr(words, "_KEPT_BYTES", 50_000)
    encoder = WordEncoder(words._LETTERS_APART, encode)
    generator, most = random.Random(0), 0
    for _ in range(200):
        texts = ["".join(generator.choices("abcdef ", k=500)) for _ in range(3)]
        texts[0] += "ab" * generator.randrange(100) + " end"
        for text, ids in zip(texts, encoder(texts), strict=True):
            assert ids.dtype == np.uint32
            assert ids.tolist() == [ord(letter) for letter in text]
        most = max(most, encoder._kept_bytes)
        held = sum(getsizeof(word) + getsizeof(ids) + words._ENTRY_BYTES for word, ids in encoder._kept.items())
        assert encoder._kept_bytes == held
        assert max(map(len, encoder._kept)) <= words._LONGEST
    assert 50_000 < most < 200_000
    monkeypatch.setattr(words, "_KEPT_BYTES", 1 << 30)
    before = len(asked)
    encoder(texts[1:])
    assert len(asked) == before, "words that are known were asked for again"
