"""tokenizer.json of the kinds that public models have, built here with the library that wrote theirs."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Library
from transformers import PreTrainedTokenizerFast

from gptscale.runtime.errors import UserError
from gptscale.tokenizer import Tokenizer, find_tokenizer, json_model
from tests.helpers.text import documents

GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = [*documents(60), "Das Ünicode-Fräulein, naïve café; 12345 678\n\n\tdef f(x):\n\t\treturn x  # 中文字\r\n" * 20]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level(pre_tokenizer: object, special: list[str], **more: object) -> Library:
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizer
    library.decoder = decoders.ByteLevel()
    library.post_processor = processors.ByteLevel(trim_offsets=False)
    for name, value in more.items():
        setattr(library, name, value)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    library.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=900, special_tokens=special, initial_alphabet=alphabet)
    )
    return library


def gpt2() -> Library:
    return byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False), ["<|endoftext|>"])


def llama3() -> Library:
    cut = [pre_tokenizers.Split(Regex(GPT4), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    library = byte_level(pre_tokenizers.Sequence(cut), [])
    # Behind the learnt ones, as there; and a template that adds one in front.
    library.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"])
    start = library.token_to_id("<|begin_of_text|>")
    library.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", start)]
    )
    return library


def qwen() -> Library:
    cut = [pre_tokenizers.Split(Regex(GPT4), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    library = byte_level(pre_tokenizers.Sequence(cut), [], normalizer=normalizers.NFC())
    library.add_special_tokens(["<|endoftext|>", "<|im_start|>"])
    library.add_tokens([AddedToken("<tool_call>", normalized=False)])  # no special token: text may hold it
    return library


def gemma() -> Library:
    library = Library(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    library.normalizer = normalizers.Replace(" ", "▁")
    library.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    library.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    library.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=900, special_tokens=["<pad>", "<eos>", "<bos>", "<unk>", *BYTES])
    )
    return without_special(library, BYTES)


def without_special(library: Library, names: list[str]) -> Library:
    fields = json.loads(library.to_str())
    fields["added_tokens"] = [token for token in fields["added_tokens"] if token["content"] not in names]
    return Library.from_str(json.dumps(fields))


def llama2() -> Library:
    library = gemma()
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return library


def lower_case() -> Library:
    return byte_level(pre_tokenizers.ByteLevel(False), ["<|endoftext|>"], normalizer=normalizers.Lowercase())


def compatibility() -> Library:
    return byte_level(pre_tokenizers.ByteLevel(False), ["<|endoftext|>"], normalizer=normalizers.NFKC())


def prefix_space() -> Library:
    return byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True), ["<|endoftext|>"])


def word_piece() -> Library:
    library = Library(models.WordPiece(unk_token="[UNK]"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=900, special_tokens=["[UNK]", "[EOS]"]))
    return library


EXACT = {"gpt2": gpt2, "llama3": llama3, "qwen": qwen, "gemma": gemma}


@pytest.fixture(scope="module", params=list(EXACT))
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Library]:
    path = tmp_path_factory.mktemp(request.param) / "tokenizer.json"
    EXACT[request.param]().save(str(path))
    return Tokenizer.load(path), Library.from_file(str(path))


NASTY = [
    "",
    " ",
    "\n\n",
    "  leading and trailing  ",
    "\u2581 and a real space\u2581\u2581",
    "\x00\x01\u200d\ufeff",
    "👩‍👩‍👧‍👦 \U0010ffff",
    "ﬁ ① Ⅷ ½",
    "tabs\tand\r\nline ends\r",
    "1234567890 3.14159",
    "<0x41> <s> </s> [UNK]",
    "<tool_call>x</tool_call>",
]


@pytest.mark.parametrize("text", NASTY)
def test_nasty_texts_come_back_with_the_librarys_ids(both: tuple[Tokenizer, Library], text: str) -> None:
    ours, library = both
    ids = ours.encode(text)
    assert ours.decode_bytes(ids) == text.encode()
    if "\u2581" not in text or "<eos>" not in ours.special:  # a real U+2581, which such a vocabulary cannot write
        theirs = PreTrainedTokenizerFast(tokenizer_object=library)
        assert ids.tolist() == theirs.encode(text, add_special_tokens=False)


@settings(max_examples=150, deadline=None)
@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60))
def test_every_text_comes_back(both: tuple[Tokenizer, Library], text: str) -> None:
    ours, library = both
    expected = unicodedata.normalize("NFC", text) if isinstance(library.normalizer, normalizers.NFC) else text
    ids = ours.encode(text)
    assert ours.decode_bytes(ids) == expected.encode()
    assert int(ours.byte_lengths()[ids].sum()) == len(expected.encode())
    assert not set(ids.tolist()) & set(ours.special.values())


def test_special_tokens_are_never_read_out_of_text(both: tuple[Tokenizer, Library]) -> None:
    ours, library = both
    for name, number in ours.special.items():
        ids = ours.encode(f"a{name}b").tolist()
        assert not set(ids) & set(ours.special.values())
        assert ours.decode(ids) == f"a{name}b"
        assert ours.decode([number]) == ""
        assert library.token_to_id(name) == number
    assert (
        ours.end_of_text
        == ours.special[next(name for name in ("<|endoftext|>", "<|end_of_text|>", "<eos>") if name in ours.special)]
    )
    assert ours.vocab_size == library.get_vocab_size()


def test_a_batch_is_its_texts_one_by_one(both: tuple[Tokenizer, Library]) -> None:
    ours, _ = both
    for text, ids in zip([*NASTY, *TEXTS], ours.encode_batch([*NASTY, *TEXTS]), strict=True):
        assert np.array_equal(ids, ours.encode(text))
        assert ids.dtype == np.uint32


def test_long_texts_are_cut_without_changing_an_id(
    both: tuple[Tokenizer, Library], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, library = both
    text = "".join(TEXTS)
    whole = library.encode(text.replace("\u2581", ""), add_special_tokens=False).ids
    monkeypatch.setattr(json_model, "LONGEST_RUN", 5000)
    runs = ours._runs(text)  # type: ignore[attr-defined]
    assert len(runs) > 8
    assert max(map(len, runs)) <= 5000
    assert ours.encode(text).tolist() == whole
    one_word = "word" * 4000  # can be cut nowhere
    assert ours._runs(one_word) == [one_word]  # type: ignore[attr-defined]
    assert ours.decode(ours.encode(one_word)) == one_word


@pytest.mark.parametrize("build", [llama2, lower_case, compatibility, prefix_space, word_piece])
def test_what_changes_text_is_refused(build: Callable[[], Library], tmp_path: Path) -> None:
    library = build()
    if build is llama2:
        library.add_special_tokens(["</s>"])
    library.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"changes text|lacks the 256 byte pieces") as refused:
        Tokenizer.load(tmp_path / "tokenizer.json")
    assert len(str(refused.value).splitlines()) == 2


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    for content, says in (
        ("{}", "not a tokenizer.json"),
        ('{"version": "1.0", "model": ', "not a tokenizer.json"),
        (byte_level(pre_tokenizers.ByteLevel(False), ["<bos>"]).to_str(), "no special token that ends a document"),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=says) as refused:
            Tokenizer.load(path)
        assert len(str(refused.value).splitlines()) == 2


def test_it_is_found_by_its_name(tmp_path: Path) -> None:
    assert find_tokenizer(tmp_path) is None
    gpt2().save(str(tmp_path / "tokenizer.json"))
    assert find_tokenizer(tmp_path) == tmp_path / "tokenizer.json"
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
    assert tokenizer.file_name == "tokenizer.json"
