"""Documents by number and by place, sources by place, and the excerpts that are chosen by them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gptscale.config.schema import DataConfig, SourceConfig, TokenizerConfig
from gptscale.data.corpus import open_split
from gptscale.data.document_index import DocumentIndex, DocumentSpan, SourceRange, source_at, source_ranges
from gptscale.data.excerpts import excerpts
from gptscale.data.prepare import prepare
from gptscale.data.shards import Manifest, PartRecord
from gptscale.runtime.errors import UserError
from tests.helpers.prepared import of_lengths
from tests.helpers.text import documents, write_jsonl


@pytest.fixture(scope="module")
def three_sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of 40, 300 and 3 documents that each say which they are; several shards, one document longer than a shard."""
    folder = tmp_path_factory.mktemp("three")
    sources = []
    for name, number in (("small", 40), ("large", 300), ("few", 3)):
        texts = [f"{name} {text}" for text in documents(number, 60)]
        if name == "few":
            texts[1] = "few 1: " + documents(1, 4000, seed=1)[0]
        sources.append(SourceConfig(name=name, path=str(write_jsonl(folder / f"{name}.jsonl", texts)), licence=name))
    data = DataConfig(sources=tuple(sources), heldout_fraction=0.01, shard_tokens=3_000, workers=1)
    return prepare(data, TokenizerConfig(vocab_size=384), folder / "prepared").folder


def test_every_place_and_number(tmp_path: Path) -> None:
    shards = [np.array([3, 1, 1]), np.array([7]), np.array([2, 5])]
    index = DocumentIndex(of_lengths(tmp_path, shards))
    assert index.count == 6
    spans = [(0, 0, 3), (0, 3, 4), (0, 4, 5), (1, 0, 7), (2, 0, 2), (2, 2, 7)]
    assert [index.span(number) for number in range(6)] == [DocumentSpan(*span) for span in spans]
    owners = [number for number, (_, start, stop) in enumerate(spans) for _ in range(start, stop)]
    assert [index.at(place) for place in range(19)] == owners
    assert [index.place(shard, token) for shard, token in ((0, 4), (1, 0), (2, 6))] == [4, 5, 18]


def test_sources_by_place() -> None:
    def part(name: str, tokens: int, source_name: str = "") -> PartRecord:
        return PartRecord(name, "jsonl" if name == "a" else "stdlib", "", "", 1, tokens, tokens, source_name)

    empty = Manifest("train", "", 300, 0, "<u2", 9, 4, 9, (), ())
    named = (part("a", 3, "one"), part("a", 2, "one"), part("b", 0, "none"), part("b", 4, "two"))
    ranges = source_ranges(replace(empty, parts=named))
    assert ranges == (SourceRange("one", 0, 5), SourceRange("two", 5, 9))
    assert [source_at(ranges, place) for place in (0, 4, 5, 8, 9)] == ["one", "one", "two", "two", ""]
    unnamed = replace(empty, parts=(part("a", 3), part("b", 2), part("a", 4)))
    assert source_ranges(unnamed) == (
        SourceRange("jsonl", 0, 3),
        SourceRange("stdlib", 3, 5),
        SourceRange("jsonl", 5, 9),
    )


def test_excerpts_are_of_every_source_and_say_which(three_sources: Path) -> None:
    corpus = open_split(three_sources, "train")
    found = excerpts(corpus)
    assert [one.source for one in found] == ["large", "large", "few", "few", "small", "small"], "the largest first"
    for one in found:
        # Of the few, most are pieces of the long one, which begin anywhere.
        assert one.text.startswith(f"{one.source} ") or one.source == "few", one
        assert one.whole == (one.tokens <= 512)
    numbers = [one.document for one in found]
    assert len(set(numbers)) == len(numbers)
    assert found == excerpts(corpus), "always the same"
    index = DocumentIndex(corpus)
    assert [index.span(one.document)[2] - index.span(one.document)[1] for one in found] == [one.tokens for one in found]


def test_one_source_gets_more_room(prepared: Path) -> None:
    """Evenly over its documents."""
    corpus = open_split(prepared, "train")
    found = excerpts(corpus)
    count = DocumentIndex(corpus).count
    assert [one.document for one in found] == [count // 8, 3 * count // 8, 5 * count // 8, 7 * count // 8]
    (text,) = {one.text for one in found if one.document == count // 8}
    whole = [json.loads(line)["text"] for line in (prepared.parent / "text.jsonl").read_text().splitlines()]
    assert text in whole


def test_an_excerpt_ends_with_a_whole_character(tmp_path: Path) -> None:
    """A token of one byte of three is the 512th: what is cut in half is left out."""
    texts = ["語" * 400] * 30
    source = SourceConfig(path=str(write_jsonl(tmp_path / "text.jsonl", texts)))
    data = DataConfig(sources=(source,), heldout_fraction=0.2, workers=1)
    other = [SourceConfig(path=str(write_jsonl(tmp_path / "other.jsonl", documents(50))))]
    tokenizer = prepare(replace(data, sources=tuple(other)), TokenizerConfig(vocab_size=320), tmp_path / "other").folder
    made = prepare(data, TokenizerConfig(path=str(tokenizer / "tokenizer.model")), tmp_path / "made").folder
    for one in excerpts(open_split(made, "train")):
        assert one.text == "語" * 170  # 512 // 3
        assert not one.whole


def test_ids_that_there_are_not_are_an_error_of_the_file(prepared: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(prepared, folder)
    corpus = open_split(folder, "train")
    for shard in corpus.manifest.shards:
        tokens = np.load(corpus.token_path(shard))
        np.save(corpus.token_path(shard), np.full_like(tokens, 65_000))
    with pytest.raises(UserError, match=r"shard-0000\d.tok.npy: damaged \(token ids must lie within") as caught:
        excerpts(corpus)
    assert len(str(caught.value).splitlines()) == 2
