"""What preparing leaves out: by length and language, exact and near-duplicates; and documents in random order."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptscale.config.schema import DataConfig, FilterConfig, SourceConfig, TokenizerConfig
from gptscale.data import duplicates, shuffle
from gptscale.data.duplicates import EXACT, KEPT, mark_repetitions, new_marks
from gptscale.data.filters import language
from gptscale.data.heldout import heldout_rows, source_of_rows
from gptscale.data.near import band_keys, banding
from gptscale.data.prepare import Prepared, prepare
from gptscale.data.shards import Removed
from gptscale.data.tokenise import identity_hash, is_heldout
from gptscale.runtime.errors import UserError
from gptscale.tokenizer import Tokenizer
from gptscale.tokenizer.train import train_tokenizer
from tests.helpers.text import contents, documents, stored_documents

FRACTION = 0.2


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> TokenizerConfig:
    path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.model"
    train_tokenizer(documents(50), 350, path)
    return TokenizerConfig(path=str(path))


class Texts:
    """Texts in files, whose identities tell what is held out."""

    def __init__(self, folder: Path, texts: list[str]) -> None:
        folder.mkdir()
        self.texts = texts
        self.source = SourceConfig(path=str(folder), name=folder.name)
        for number, text in enumerate(texts):
            (folder / f"{number:05d}.txt").write_text(text)

    def split(self, name: str) -> list[str]:
        held_out = [is_heldout(identity_hash(f"{number:05d}.txt"), FRACTION) for number in range(len(self.texts))]
        return [text for text, out in zip(self.texts, held_out, strict=True) if out is (name == "heldout")]

    def prepare(self, target: Path, vocabulary: TokenizerConfig, filters: FilterConfig, **more: object) -> Prepared:
        data = DataConfig((self.source,), heldout_fraction=FRACTION, filters=filters, workers=1)
        return prepare(replace(data, **more), vocabulary, target)  # type: ignore[arg-type]


def removed(done: Prepared) -> dict[str, int]:
    found = Counter[str]()
    for manifest in (done.train, done.heldout):
        for part in manifest.parts:
            for one in part.removed:
                found[one.reason] += one.documents
    return dict(found)


# By themselves


def test_lengths_and_languages_are_filtered_and_counted(tmp_path: Path, vocabulary: TokenizerConfig) -> None:
    english = "The quick brown fox jumps over the lazy dog, and then it goes home to sleep for a while."
    french = "Les enfants sont partis à l'école ce matin, et leur mère les attend à la maison ce soir."
    german = "Die Kinder sind heute Morgen zur Schule gegangen, und ihre Mutter wartet zu Hause auf sie."
    kept = [f"{text} {number}" for number in range(20) for text in (english, french)]
    texts = Texts(tmp_path / "text", [*kept, *[f"{german} {n}" for n in range(7)], *["short"] * 5, english * 30])
    filters = FilterConfig(min_characters=20, max_characters=2000, languages=("en", "fr"))
    done = texts.prepare(tmp_path / "out", vocabulary, filters)
    assert sorted(
        stored_documents(tmp_path / "out", "train") + stored_documents(tmp_path / "out", "heldout")
    ) == sorted(kept)
    assert removed(done) == {"too_short": 5, "too_long": 1, "language": 7}
    (record,) = done.train.parts
    assert [one.reason for one in record.removed] == ["language", "too_long", "too_short"]
    of_split = texts.split("train")
    short = Removed("too_short", of_split.count("short"), 5 * of_split.count("short"))
    assert record.removed[2] == short
    assert json.loads((tmp_path / "out/train/manifest.json").read_text())["parts"][0]["removed"][2] == vars(short)


def test_a_vocabulary_is_learnt_from_what_the_filters_leave(tmp_path: Path) -> None:
    japanese = "これは日本語の文章です。言語は最初の部分で判断されます。" * 5
    english = "The children went to school this morning, and their mother waits for them at home."
    source = Texts(tmp_path / "text", [japanese] * 40 + [f"{english} {number}" for number in range(20)]).source
    data = DataConfig((source,), heldout_fraction=FRACTION, filters=FilterConfig(languages=("en",)), workers=1)
    prepare(data, TokenizerConfig(vocab_size=300), tmp_path / "out")
    tokenizer = Tokenizer.load(tmp_path / "out" / "tokenizer.model")
    assert all(len(tokenizer.decode_bytes([token])) <= 1 or tokenizer.decode([token]).isascii() for token in range(300))


def test_languages_are_told_apart() -> None:
    assert language("A language is judged by its beginning, and this one is English.") == "en"
    assert language("Eine Sprache wird an ihrem Anfang erkannt, und diese hier ist Deutsch.") == "de"
    assert language("これは日本語の文章です。言語は最初の部分で判断されます。") == "ja"


@pytest.mark.parametrize(
    ("filters", "says"),
    [
        (FilterConfig(min_characters=10, max_characters=5), "min_characters=10 and max_characters=5"),
        (FilterConfig(min_characters=-1), "min_characters=-1"),
        (FilterConfig(near_duplicates=1.0), "near_duplicates=1.0 is no similarity"),
        (FilterConfig(languages=("en", "english")), "'english' is not a language"),
        (FilterConfig(min_characters=10**6), "leave no document"),
    ],
)
def test_filters_that_make_no_sense_are_refused(
    tmp_path: Path, vocabulary: TokenizerConfig, filters: FilterConfig, says: str
) -> None:
    texts = Texts(tmp_path / "text", documents(30))
    with pytest.raises(UserError) as refused:
        texts.prepare(tmp_path / "out", vocabulary, filters)
    assert says in str(refused.value)
    assert len(str(refused.value).splitlines()) == 2
    assert [path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")] == ["text"]


# Duplicates


@settings(max_examples=30, deadline=None)
@given(
    keys=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 2)), min_size=1, max_size=60),
    cuts=st.lists(st.integers(0, 60), max_size=5),
    already=st.sets(st.integers(0, 59)),
)
def test_every_repetition_is_marked_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, keys: list[tuple[int, int]], cuts: list[int], already: set[int]
) -> None:
    folder = tmp_path_factory.mktemp("marks")
    words = np.array(keys, dtype=np.uint64).reshape(-1, 2)
    marks = new_marks(len(keys), folder / "marks")
    before = [number for number in already if number < len(keys)]
    marks[before] = 9
    blocks = np.split(words, sorted(cut for cut in cuts if cut <= len(keys)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(duplicates, "_BUCKET_ENTRIES", 7)  # several buckets
        mark_repetitions(blocks, marks, EXACT, folder)
    for number, key in enumerate(keys):
        expected = 9 if number in before else EXACT if key in keys[:number] else KEPT
        assert marks[number] == expected
    assert [path.name for path in folder.iterdir()] == ["marks"]


def test_of_equal_texts_one_stays_and_a_held_out_one_first(tmp_path: Path, vocabulary: TokenizerConfig) -> None:
    draw = random.Random(0)
    distinct = documents(60, words=20)
    texts = Texts(tmp_path / "text", [draw.choice(distinct) for _ in range(400)])
    done = texts.prepare(tmp_path / "out", vocabulary, FilterConfig(exact_duplicates=True))
    held_out = list(dict.fromkeys(texts.split("heldout")))
    trained = [text for text in dict.fromkeys(texts.split("train")) if text not in held_out]
    assert held_out
    assert trained
    assert stored_documents(tmp_path / "out", "heldout") == held_out
    assert stored_documents(tmp_path / "out", "train") == trained
    assert removed(done) == {"exact_duplicate": 400 - len(held_out) - len(trained)}
    for manifest, kept in ((done.train, trained), (done.heldout, held_out)):
        assert manifest.documents == len(kept)
        assert manifest.text_bytes == sum(len(text.encode()) for text in kept)
        assert manifest.tokens == sum(shard.tokens for shard in manifest.shards)
    # The text of several parts and workers is one heap.
    again = Texts(tmp_path / "again", documents(4000, words=60))
    twice = DataConfig((again.source, again.source), filters=FilterConfig(exact_duplicates=True), workers=2)
    once = DataConfig((again.source,), workers=1)
    both = prepare(twice, vocabulary, tmp_path / "twice"), prepare(once, vocabulary, tmp_path / "once")
    assert len(both[0].train.parts) == 2 * len(both[1].train.parts) > 2
    assert both[0].train.identity == both[1].train.identity


def test_a_split_that_duplicates_leave_empty_is_refused(tmp_path: Path, vocabulary: TokenizerConfig) -> None:
    texts = Texts(tmp_path / "text", ["the same again\n"] * 100)
    with pytest.raises(UserError, match="without duplicates there is no text left for train"):
        texts.prepare(tmp_path / "out", vocabulary, FilterConfig(exact_duplicates=True))
    assert not (tmp_path / "out").exists()


def test_texts_that_are_nearly_the_same_go_and_others_stay(tmp_path: Path, vocabulary: TokenizerConfig) -> None:
    originals = documents(100, words=200)

    def edited(text: str) -> str:
        words = text.upper().split()  # neither case nor white space matters
        words[50] = "changed"
        return "\n".join(words)

    texts = Texts(tmp_path / "text", [*originals, *map(edited, originals[:40])])
    done = texts.prepare(tmp_path / "out", vocabulary, FilterConfig(exact_duplicates=True, near_duplicates=0.7))
    assert removed(done) == {"near_duplicate": 40}
    assert done.train.documents + done.heldout.documents == 100
    words = {tuple(text.lower().split()[:50]) for text in texts.split("heldout")}
    held_out = stored_documents(tmp_path / "out", "heldout")
    assert {tuple(text.lower().split()[:50]) for text in held_out} == words, "what goes was to be trained on"
    assert len(held_out) == len(words)


def test_documents_meet_as_often_as_the_formula_says() -> None:
    """Pairs of texts of known Jaccard similarity. 300 pairs: three standard deviations are at most 0.09."""
    cut = banding(0.7)
    assert (cut.bands, cut.rows) == (16, 8)
    draw, pairs = np.random.default_rng(0), 300
    for similarity in (0.5, 0.7, 0.85):
        met, exact = 0, 0.0
        for _ in range(pairs):
            # Five new words at the end of one text, or of the other, are five shingles that the other has not.
            common = 400
            own = round(common * (1 - similarity) / (2 * similarity))
            words = [f"w{n}" for n in draw.integers(0, 10**9, common + 4 + 2 * own)]
            a, b = words[: common + 4 + own], [*words[: common + 4], *words[common + 4 + own :]]
            keys = band_keys([" ".join(a), " ".join(b)], cut)
            met += bool((keys[0] == keys[1]).any())
            exact = common / (common + 2 * own)
        assert abs(met / pairs - cut.probability(exact)) < 0.09, (similarity, met / pairs, cut.probability(exact))


def test_a_short_text_and_one_without_spaces_have_keys_too() -> None:
    cut = banding(0.7)
    texts = [
        "",
        "...",
        "two words",
        "Two, words!",
        "other words",
        "言語は最初の部分で判断されます",
        "言語は最初の部分で判断されます。",
    ]
    keys = band_keys(texts, cut)
    assert (keys[2] == keys[3]).all()
    assert (keys[5] == keys[6]).all()
    for a, b in ((0, 2), (2, 4), (4, 5)):
        assert not (keys[a] == keys[b]).any()


def test_the_keys_are_pinned() -> None:
    """Another version of the library, or of ours, that finds other duplicates must not go unnoticed."""
    keys = band_keys(["the quick brown fox jumps over the lazy dog"], banding(0.7))
    assert [f"{key:016x}" for key in keys[0, :2].tolist()] == ["923fbd196a6afa24", "07f723b0e8b2d287"]


# Shuffled


def test_training_documents_are_shuffled_and_nothing_is_lost(
    tmp_path: Path, vocabulary: TokenizerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = Texts(tmp_path / "text", documents(1500, words=20))
    plain = texts.prepare(tmp_path / "plain", vocabulary, FilterConfig(), shard_tokens=20_000)
    mixed = texts.prepare(tmp_path / "mixed", vocabulary, FilterConfig(), shard_tokens=20_000, shuffle_documents=True)
    before, after = (stored_documents(tmp_path / name, "train") for name in ("plain", "mixed"))
    assert sorted(before) == sorted(after)
    place = {text: number for number, text in enumerate(before)}
    order = np.array([place[text] for text in after])
    # Of a true permutation of n the rank correlation has the standard deviation 1/√n = 0.03, and neighbours stay
    # neighbours about twice.
    assert abs(np.corrcoef(order, np.arange(len(order)))[0, 1]) < 0.1
    assert (np.abs(np.diff(order)) == 1).sum() < 10
    assert contents(tmp_path / "mixed/heldout") == contents(tmp_path / "plain/heldout")
    assert (plain.train.shuffled, mixed.train.shuffled, mixed.heldout.shuffled) == (False, True, False)
    assert mixed.train.parts == plain.train.parts
    # Whatever fits into memory at once, the order is the same.
    monkeypatch.setattr(shuffle, "_BUCKET_BYTES", 9_000)
    monkeypatch.setattr("gptscale.data.merge._TOKENS_AT_ONCE", 3_000)
    texts.prepare(tmp_path / "small", vocabulary, FilterConfig(), shard_tokens=20_000, shuffle_documents=True)
    assert contents(tmp_path / "small") == contents(tmp_path / "mixed")


def test_held_out_rows_still_know_their_source(tmp_path: Path, vocabulary: TokenizerConfig) -> None:
    first, second = Texts(tmp_path / "first", documents(100)), Texts(tmp_path / "second", documents(100, seed=1))
    sources = (first.source, second.source)
    data = DataConfig(sources, heldout_fraction=FRACTION, shuffle_documents=True, workers=1)
    prepare(data, vocabulary, tmp_path / "out")
    reader = heldout_rows(tmp_path / "out", 64)
    names = source_of_rows(reader, np.arange(reader.count)).tolist()
    assert names == sorted(names)
    assert set(names) == {"first", "second"}
