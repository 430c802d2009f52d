"""Fill in the middle: nothing is lost, the shares are right, and what is held out stays as it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptscale.config.schema import DataConfig, SourceConfig, TokenizerConfig
from gptscale.data.fim import FillInMiddle, fill_in_middle
from gptscale.data.prepare import corpus_folder, prepare
from gptscale.data.tokenise import identity_hash
from gptscale.runtime.errors import UserError
from gptscale.tokenizer import Tokenizer
from gptscale.tokenizer.special import FIM_TOKENS, SPECIAL_TOKENS
from gptscale.tokenizer.train import train_tokenizer
from tests.helpers.text import contents, documents, stored_documents, write_jsonl

PREFIX, SUFFIX, MIDDLE = range(len(SPECIAL_TOKENS), len(SPECIAL_TOKENS) + 3)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer(documents(50), 400, tmp_path_factory.mktemp("fim") / "tokenizer.model", fim=True)


def put_together(ids: list[int], tokenizer: Tokenizer) -> tuple[str, str]:
    """The document that was cut, and how: PSM, SPM or whole."""
    if ids[:1] != [PREFIX]:
        assert not {PREFIX, SUFFIX, MIDDLE} & set(ids)
        return tokenizer.decode(ids), "whole"
    assert [token for token in ids if token in (PREFIX, SUFFIX, MIDDLE)] == [PREFIX, SUFFIX, MIDDLE]
    suffix_at, middle_at = ids.index(SUFFIX), ids.index(MIDDLE)
    prefix, suffix, middle = ids[1:suffix_at], ids[suffix_at + 1 : middle_at], ids[middle_at + 1 :]
    # A document that is not empty before its suffix token is PSM; the other way it may be either, and reads the same.
    return tokenizer.decode(prefix) + tokenizer.decode(middle) + tokenizer.decode(suffix), "PSM" if prefix else "SPM"


@settings(max_examples=100, deadline=None)
@given(text=st.text(min_size=1, max_size=40), digest=st.integers(0, 2**64 - 1), spm=st.sampled_from([0.0, 0.5, 1.0]))
def test_a_document_that_was_cut_can_be_put_together(tokenizer: Tokenizer, text: str, digest: int, spm: float) -> None:
    text = text.encode("utf-8", "ignore").decode()
    cut = fill_in_middle(1.0, spm, tokenizer)
    assert cut == FillInMiddle(1.0, spm, PREFIX, SUFFIX, MIDDLE)
    (ids,) = cut.encode(tokenizer, [text], [digest])
    found, how = put_together(ids.tolist(), tokenizer)
    assert found == text
    assert how != "PSM" if spm == 1.0 else how != "whole"


def test_the_shares_and_the_places_are_as_drawn(tokenizer: Tokenizer) -> None:
    """Of 4000 documents: three standard deviations are 0.024 of a share of a half and 0.014 of a mean place."""
    cut = fill_in_middle(0.5, 0.25, tokenizer)
    assert cut is not None
    text, count = "a" * 200, 4000
    digests = [identity_hash(str(number)) for number in range(count)]
    how, middles, befores = [], [], []
    for digest in digests:
        parts = cut._parts(text, digest)
        how.append({1: "whole", 6: "PSM", 5: "SPM"}[len(parts)])
        if len(parts) == 6:
            prefix, middle = parts[1], parts[5]
            assert isinstance(prefix, str)
            assert isinstance(middle, str)
            befores.append(len(prefix) / 200)
            middles.append(len(middle) / 200)
    assert how.count("whole") / count == pytest.approx(0.5, abs=0.024)
    assert how.count("SPM") / count == pytest.approx(0.125, abs=0.016)
    # Two even draws cut a line into thirds, in the mean.
    assert np.mean(befores) == pytest.approx(1 / 3, abs=0.02)
    assert np.mean(middles) == pytest.approx(1 / 3, abs=0.02)


def test_a_source_is_cut_and_what_is_held_out_is_not(tmp_path: Path) -> None:
    texts = documents(300, words=30)
    path = write_jsonl(tmp_path / "code.jsonl", texts)
    other = write_jsonl(tmp_path / "prose.jsonl", documents(100, words=30, seed=1))
    sources = (SourceConfig(path=str(path), fim_rate=0.5), SourceConfig(path=str(other)))
    data = DataConfig(sources, heldout_fraction=0.2, workers=1)
    done = prepare(data, TokenizerConfig(vocab_size=450), tmp_path / "out")
    tokenizer = Tokenizer.load(tmp_path / "out/tokenizer.model")
    assert [tokenizer.special[name] for name in FIM_TOKENS] == [PREFIX, SUFFIX, MIDDLE]
    tokens, ends = (np.load(tmp_path / f"out/train/shard-00000.{kind}.npy") for kind in ("tok", "end"))
    found = [
        put_together(tokens[start : end - 1].tolist(), tokenizer)
        for start, end in zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True)
    ]
    code = done.train.parts[0].documents
    everything = [text for text, _ in found]
    assert everything == [text for text in [*texts, *documents(100, words=30, seed=1)] if text in set(everything)]
    cut = [how != "whole" for _, how in found]
    assert 0.3 * code < sum(cut[:code]) < 0.7 * code
    assert not any(cut[code:])
    assert done.train.text_bytes == sum(len(text.encode()) for text in everything)
    assert set(stored_documents(tmp_path / "out", "heldout")) <= {*texts, *documents(100, words=30, seed=1)}
    again = prepare(data, TokenizerConfig(vocab_size=450), tmp_path / "again")
    assert contents(again.folder) == contents(done.folder)


def test_a_vocabulary_without_the_tokens_is_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "text/a.jsonl", documents(50))
    train_tokenizer(documents(50), 350, tmp_path / "mine.model")
    data = DataConfig((SourceConfig(path=str(path), fim_rate=0.5),), heldout_fraction=0.2)
    with pytest.raises(UserError, match=r"no special tokens <\|fim_prefix\|>") as refused:
        prepare(data, TokenizerConfig(path=str(tmp_path / "mine.model")), tmp_path / "out")
    assert len(str(refused.value).splitlines()) == 2
    with pytest.raises(UserError, match=r"data\.sources\[0\]: fim_rate=2") as refused:
        prepare(DataConfig((SourceConfig(path=str(path), fim_rate=2),)), TokenizerConfig(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folders_that_were_prepared_before_are_found_again() -> None:
    """The name that settings without anything new had from the first version on."""
    data = DataConfig((SourceConfig(format="stdlib"),), corpora_dir="")
    assert corpus_folder(data, TokenizerConfig()).name == "stdlib-032159b8fc92"
