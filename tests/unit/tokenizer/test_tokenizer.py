from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gptscale.runtime.errors import UserError
from gptscale.tokenizer import Tokenizer
from gptscale.tokenizer.special import SPECIAL_TOKENS
from gptscale.tokenizer.train import train_tokenizer
from tests.helpers.text import documents

CODE = "def main():\n\tif x  ==  1234:\r\n        return 'naïve café' # 中文\n" * 20


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer([*documents(50), CODE], 600, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


NASTY = (
    "\u2581 <s></s>",
    "\u2581\u2581",
    " \u2581 ",
    "\x00a\x00",
    "\r\n\n\r",
    "\u0301e\u0301",
    "<|endoftext|><|pad|><|user|><|unk|>",
    "<0x41><unk>",
    "\ufeff\ufffd\uffff\U0010ffff",
    "\u2585\u2047 ⁇",
    "   leading and trailing   ",
    "\t\v\f\x1c\x85\u2028\u3000\u200b",
    "👩‍👩‍👧‍👦 🏳️‍🌈",
    "",
)


@settings(max_examples=400, deadline=None)
@given(st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from("\u2581 \n<|>ax0")), max_size=80))
@example("\u2581".join(NASTY))
def test_every_text_comes_back_and_holds_no_special_token(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids.dtype == np.uint32
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert not set(ids.tolist()) & set(tokenizer.special.values())


@pytest.mark.parametrize("text", NASTY)
def test_nasty_texts_come_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("line", ["a" * 2_500_000, " " * 1_100_000, ("word\u2581 " * 30_000), "x\n" * 600_000])
def test_very_long_texts_come_back(tokenizer: Tokenizer, line: str) -> None:
    assert tokenizer.decode(tokenizer.encode(line)) == line


def test_a_batch_is_its_texts_one_by_one(tokenizer: Tokenizer) -> None:
    texts = [*NASTY, *documents(3), "\u2581"]
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert np.array_equal(ids, tokenizer.encode(text))
    assert tokenizer.encode_batch([]) == []


def test_ordinary_text_gets_the_ids_that_sentencepiece_gives(tokenizer: Tokenizer, tmp_path: Path) -> None:
    train_tokenizer([*documents(50), CODE], 600, tmp_path / "again.model")
    plain = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "again.model"))
    for text in [*documents(5, seed=3), CODE]:
        assert tokenizer.encode(text).tolist() == plain.encode(text)
        assert plain.decode(tokenizer.encode(text).tolist()) == text


def test_special_tokens_have_the_first_ids_and_give_no_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.special == {name: token for token, name in enumerate(SPECIAL_TOKENS)}
    assert tokenizer.end_of_text == tokenizer.special["<|endoftext|>"]
    assert tokenizer.decode_bytes(range(len(SPECIAL_TOKENS))) == b""
    assert tokenizer.byte_lengths()[: len(SPECIAL_TOKENS)].sum() == 0


def test_tokens_that_end_inside_a_character_join_as_bytes(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("€").tolist()
    assert len(ids) == 3
    assert b"".join(tokenizer.decode_bytes([token]) for token in ids).decode() == "€"
    assert tokenizer.decode(ids[:2]) == "\ufffd"


@pytest.mark.parametrize("outside", [-1, 600, 2**40])
def test_ids_outside_the_vocabulary_are_refused(tokenizer: Tokenizer, outside: int) -> None:
    with pytest.raises(ValueError, match=r"0…599"):
        tokenizer.decode([5, outside])


def test_what_is_not_utf8_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(UnicodeEncodeError):
        tokenizer.encode("half \ud83d")


def test_byte_lengths_add_up_to_the_text(tokenizer: Tokenizer) -> None:
    for text in [*NASTY, *documents(3)]:
        assert tokenizer.byte_lengths()[tokenizer.encode(text)].sum() == len(text.encode())


def test_the_same_documents_give_the_same_file(tmp_path: Path) -> None:
    first = train_tokenizer(documents(40), 500, tmp_path / "a.model")
    second = train_tokenizer(documents(40), 500, tmp_path / "b.model")
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes()
    assert first.sha256 == second.sha256 == Tokenizer.load(tmp_path / "a.model").sha256
    assert first.vocab_size == 500
    assert train_tokenizer(documents(40, seed=1), 500, tmp_path / "c.model").sha256 != first.sha256


@pytest.mark.parametrize("wrong", [1, 200, 270, 50_000])
def test_a_vocabulary_that_does_not_fit_the_text_is_refused_with_a_size_that_does(tmp_path: Path, wrong: int) -> None:
    with pytest.raises(UserError, match=f"tokenizer.vocab_size={wrong} ") as refusal:
        train_tokenizer(documents(10), wrong, tmp_path / "t.model")
    assert not list(tmp_path.iterdir())
    _, fix = str(refusal.value).split("\n")
    size = int(fix.split("=")[1].split(" ")[0])
    assert train_tokenizer(documents(10), size, tmp_path / "t.model").vocab_size == size
    beyond = size - 1 if size > wrong else size + 1
    with pytest.raises(UserError):
        train_tokenizer(documents(10), beyond, tmp_path / "u.model")


@pytest.mark.parametrize("texts", [[], [""], ["\u2581\u2585\x00"]])
def test_no_text_is_refused(tmp_path: Path, texts: list[str]) -> None:
    with pytest.raises(UserError, match="no text"):
        train_tokenizer(texts, 300, tmp_path / "t.model")


def test_text_that_sentencepiece_drops_still_trains(tmp_path: Path) -> None:
    texts = [text.replace("e", "e\u2585\x00\u2581") for text in documents(20)]
    assert train_tokenizer(texts, 400, tmp_path / "t.model").vocab_size == 400


def test_missing_and_foreign_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.model: no tokenizer"):
        Tokenizer.load(tmp_path / "none.model")
    (tmp_path / "text.model").write_text("not a model")
    with pytest.raises(UserError, match=r"text\.model: not a sentencepiece model"):
        Tokenizer.load(tmp_path / "text.model")
    (tmp_path / "empty.model").write_bytes(b"")
    with pytest.raises(UserError, match=r"empty\.model: not a sentencepiece model"):
        Tokenizer.load(tmp_path / "empty.model")


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ({}, "lacks the control token"),
        ({"control_symbols": ["<|endoftext|>"], "byte_fallback": False}, "lacks"),
        ({"control_symbols": ["<|endoftext|>"], "byte_fallback": True}, "changes text"),
    ],
)
def test_models_that_change_text_are_refused(tmp_path: Path, flags: dict[str, object], complaint: str) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(documents(40)),
        model_writer=model,
        model_type="bpe",
        vocab_size=400,
        minloglevel=2,
        **flags,
    )
    (tmp_path / "foreign.model").write_bytes(model.getvalue())
    with pytest.raises(UserError, match=complaint):
        Tokenizer.load(tmp_path / "foreign.model")


def test_who_reads_shards_imports_no_tokenizers_library() -> None:
    libraries = "{'sentencepiece', 'google.protobuf', 'tokenizers'}"
    code = f"import sys, gptscale.data.stream; print([*{libraries} & sys.modules.keys()])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
