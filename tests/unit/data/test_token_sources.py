"""Token ids in and out: Megatron's indexed datasets and plain arrays."""

from __future__ import annotations

import struct
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptscale.config.schema import DataConfig, FilterConfig, SourceConfig, TokenizerConfig
from gptscale.data.corpus import open_split
from gptscale.data.megatron import open_index, write_megatron
from gptscale.data.prepare import prepare
from gptscale.data.shards import SPLITS
from gptscale.data.sources import find_parts, part, read_part, tokens
from gptscale.data.sources.tokens import find_tokens, read_tokens
from gptscale.runtime.errors import UserError
from gptscale.tokenizer import Tokenizer
from gptscale.tokenizer.train import train_tokenizer
from tests.helpers.text import documents, stored_documents, write_jsonl

GPTSCALE = str(Path(sys.executable).parent / "gptscale")

# What megatron-core 0.16.1 wrote of DOCUMENTS: IndexedDatasetBuilder(…, dtype=np.uint16 or np.int32), add_item for each
# sequence, end_document after each document, finalize.
DOCUMENTS = [[5, 6, 7, 1], [1], [9, 9, 8, 1], [], [300, 2, 1]]
LENGTHS = "040000000100000002000000020000000000000003000000"
INDICES = "".join(f"{number:02x}00000000000000" for number in (0, 1, 2, 4, 5, 6))
HEAD = "4d4d494449445800000100000000000000{:02x}06000000000000000600000000000000"
POINTERS = {2: (0, 8, 10, 14, 18, 18), 4: (0, 16, 20, 28, 36, 36)}
BINARY = {
    2: "0500060007000100010009000900080001002c0102000100",
    4: "0500000006000000070000000100000001000000090000000900000008000000010000002c0100000200000001000000",
}
CODES = {2: 8, 4: 4}


def golden(folder: Path, width: int) -> Path:
    pointers = "".join(f"{place:02x}00000000000000" for place in POINTERS[width])
    folder.mkdir(exist_ok=True)
    (folder / "old.idx").write_bytes(bytes.fromhex(HEAD.format(CODES[width]) + LENGTHS + pointers + INDICES))
    (folder / "old.bin").write_bytes(bytes.fromhex(BINARY[width]))
    return folder / "old.idx"


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> TokenizerConfig:
    path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.model"
    train_tokenizer(documents(100), 400, path)
    return TokenizerConfig(path=str(path))


def read(source: SourceConfig) -> list[tuple[str, list[int]]]:
    found = []
    for one in find_parts(source, "data.sources[0]"):
        for document in read_part(one):
            assert document.tokens is not None
            found.append((document.identity, document.tokens.tolist()))
    return found


# Megatron in


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("name", ["old", "old.idx", "old.bin", "", "*.idx"])
def test_what_megatron_wrote_is_read(tmp_path: Path, width: int, name: str) -> None:
    golden(tmp_path / "megatron", width)
    path = f"{tmp_path}/megatron/{name}".rstrip("/")
    for place in (path, f"file://{path}"):
        expected = [(f"old.idx@{number}", tokens) for number, tokens in enumerate(DOCUMENTS)]
        assert read(SourceConfig(path=place, format="megatron")) == expected


@pytest.mark.parametrize("code", [1, 2, 3, 4, 5, 8])
def test_every_type_of_integer_is_read(tmp_path: Path, code: int) -> None:
    dtype = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}[code]
    ids = np.array([1, 2, 127, 3, 4], dtype=dtype)
    ids.tofile(tmp_path / "a.bin")
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, 2, 3)
    places = struct.pack("<2i2q3q", 3, 2, 0, 3 * ids.itemsize, 0, 1, 2)
    (tmp_path / "a.idx").write_bytes(head + places)
    assert [tokens for _, tokens in read(SourceConfig(path=str(tmp_path), format="megatron"))] == [[1, 2, 127], [3, 4]]


def test_megatron_text_becomes_shards(tmp_path: Path, vocabulary: TokenizerConfig) -> None:
    """The closing token is not doubled, an empty document left out, and the bytes of text are counted."""
    golden(tmp_path / "megatron", 2)
    tokenizer = Tokenizer.load(Path(str(vocabulary.path)))
    assert tokenizer.end_of_text == 1
    source = SourceConfig(path=str(tmp_path / "megatron/old"), format="megatron", licence="MIT")
    data = DataConfig((source,), heldout_fraction=0.6)
    done = prepare(data, vocabulary, tmp_path / "out")
    found = {}
    for split in SPLITS:
        tokens, ends = (np.load(tmp_path / f"out/{split}/shard-00000.{kind}.npy") for kind in ("tok", "end"))
        for start, end in pairwise([0, *ends.tolist()]):
            found[tuple(tokens[start:end].tolist())] = split
    assert set(found) == {(5, 6, 7, 1), (9, 9, 8, 1), (300, 2, 1)}
    assert done.train.text_bytes + done.heldout.text_bytes == sum(
        int(tokenizer.byte_lengths()[list(tokens)].sum()) for tokens in found
    )
    assert [record.source for record in done.train.parts] == ["megatron"]


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: (folder / "old.idx").write_bytes(b"MMIDIDX\0\0" + bytes(40)), "version 0"),
        (lambda folder: (folder / "old.idx").write_bytes(b"something else entirely, and long enough"), "no MMIDIDX"),
        (lambda folder: (folder / "old.idx").write_bytes((folder / "old.idx").read_bytes()[:-8]), "damaged: "),
        (lambda folder: (folder / "old.idx").write_bytes((folder / "old.idx").read_bytes() + bytes(6)), "multimodal"),
        (lambda folder: (folder / "old.bin").write_bytes((folder / "old.bin").read_bytes()[:-2]), "document 4 is not"),
        (lambda folder: (folder / "old.bin").unlink(), "No such file"),
    ],
)
def test_damaged_datasets_are_named(tmp_path: Path, damage: object, says: str) -> None:
    golden(tmp_path / "megatron", 2)
    damage(tmp_path / "megatron")  # type: ignore[operator]
    with pytest.raises((UserError, FileNotFoundError), match=says):
        read(SourceConfig(path=str(tmp_path / "megatron/old.idx"), format="megatron"))


def test_ids_of_another_vocabulary_are_refused(tmp_path: Path, vocabulary: TokenizerConfig) -> None:
    np.array([5, 400, 1], dtype=np.uint16).tofile(tmp_path / "a.bin")
    source = SourceConfig(path=str(tmp_path / "a.bin"), format="tokens", end_of_text=1)
    with pytest.raises(UserError, match=r"a.bin@0 holds ids 5…400, and the vocabulary 400") as refused:
        prepare(DataConfig((source,)), vocabulary, tmp_path / "out")
    assert len(str(refused.value).splitlines()) == 2
    with pytest.raises(UserError, match="does not say of which vocabulary"):
        prepare(DataConfig((source,)), TokenizerConfig(), tmp_path / "out")
    cut = SourceConfig(path=str(tmp_path / "a.bin"), format="tokens", end_of_text=1, fim_rate=0.5)
    with pytest.raises(UserError, match="is no text to cut"):
        prepare(DataConfig((cut,)), vocabulary, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Arrays in


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.lists(st.integers(2, 9), max_size=12), max_size=12),
    tail=st.lists(st.integers(2, 9), max_size=5),
    each=st.integers(1, 9),
    block=st.integers(1, 7),
)
def test_every_document_of_an_array_is_read_once_however_it_is_shared_out(
    tmp_path_factory: pytest.TempPathFactory, texts: list[list[int]], tail: list[int], each: int, block: int
) -> None:
    folder = tmp_path_factory.mktemp("arrays")
    ids = np.array([token for text in texts for token in (*text, 1)] + tail, dtype=np.uint16)
    ids.tofile(folder / "a.bin")
    np.save(folder / "b.npy", ids.astype(np.int64))
    expected = [*texts, *([tail] if tail else [])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gptscale.data.sources.tokens.part_bytes", lambda total: each * 2)
        patch.setattr("gptscale.data.sources.tokens._AT_ONCE", block)
        for name in ("a.bin", "b.npy"):
            found = read(SourceConfig(path=str(folder / name), format="tokens", end_of_text=1))
            assert [tokens for _, tokens in found] == expected
            assert len({identity for identity, _ in found}) == len(found)


def test_arrays_that_are_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "odd.bin").write_bytes(b"123")
    np.save(tmp_path / "square.npy", np.zeros((3, 3), np.int64))
    np.save(tmp_path / "floats.npy", np.zeros(3))
    np.save(tmp_path / "short.npy", np.zeros(30, np.int64))
    (tmp_path / "short.npy").write_bytes((tmp_path / "short.npy").read_bytes()[:-8])
    (tmp_path / "text.npy").write_text("not an array")
    for name, says in (
        ("odd.bin", "3 bytes are no whole number of uint16"),
        ("square.npy", "not one row of integers"),
        ("floats.npy", "not one row of integers"),
        ("short.npy", "where its header says otherwise"),
        ("text.npy", "not a .npy file"),
    ):
        with pytest.raises(UserError, match=says) as refused:
            read(SourceConfig(path=str(tmp_path / name), format="tokens", end_of_text=1))
        assert len(str(refused.value).splitlines()) == 2
    with pytest.raises(UserError, match="needs to know where documents end"):
        read(SourceConfig(path=str(tmp_path / "odd.bin"), format="tokens"))


def test_filters_read_what_the_ids_say(tmp_path: Path, vocabulary: TokenizerConfig) -> None:
    tokenizer = Tokenizer.load(Path(str(vocabulary.path)))
    texts = documents(40, words=20)
    encoded = [tokenizer.encode(text) for text in [*texts, *texts[:10], "short"]]
    np.concatenate([np.append(ids, 0) for ids in encoded]).astype(np.uint32).tofile(tmp_path / "a.bin")
    source = SourceConfig(path=str(tmp_path / "a.bin"), format="tokens", token_dtype="uint32", end_of_text=0)
    filters = FilterConfig(min_characters=10, exact_duplicates=True)
    done = prepare(DataConfig((source,), heldout_fraction=0.2, filters=filters), vocabulary, tmp_path / "out")
    assert sorted(
        stored_documents(tmp_path / "out", "train") + stored_documents(tmp_path / "out", "heldout")
    ) == sorted(texts)
    assert done.train.text_bytes + done.heldout.text_bytes == sum(len(text.encode()) for text in texts)


# Megatron out


def test_out_and_in_again_is_the_same(tmp_path: Path, vocabulary: TokenizerConfig) -> None:
    texts = [*documents(80, words=30), "long " * 900, *documents(20, words=30, seed=1)]
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    data = DataConfig((SourceConfig(path=str(path)),), heldout_fraction=0.1, shard_tokens=1000)
    prepare(data, vocabulary, tmp_path / "corpus")
    command = [GPTSCALE, "export", f"source={tmp_path}/corpus", f"target={tmp_path}/megatron", "format=megatron"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [f"{tmp_path}/megatron/{split}_text_document" for split in SPLITS]
    assert sorted(path.name for path in (tmp_path / "megatron").iterdir()) == sorted(
        f"{split}_text_document.{kind}" for split in SPLITS for kind in ("bin", "idx")
    )
    tokenizer = Tokenizer.load(Path(str(vocabulary.path)))
    for split in SPLITS:
        source = SourceConfig(path=f"{tmp_path}/megatron/{split}_text_document", format="megatron")
        found = [tokens for _, tokens in read(source)]
        assert all(tokens[-1] == tokenizer.end_of_text and tokenizer.end_of_text not in tokens[:-1] for tokens in found)
        joined = "".join(stored_documents_even_if_cut(tmp_path / "corpus", split))
        assert "".join(tokenizer.decode(tokens) for tokens in found) == joined
        assert len(found) == sum(text in joined for text in texts)
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "train_text_document.bin: exists already" in refused.stderr


def stored_documents_even_if_cut(folder: Path, split: str) -> list[str]:
    tokenizer = Tokenizer.load(folder / "tokenizer.model")
    return [tokenizer.decode(np.load(path)) for path in sorted((folder / split).glob("*.tok.npy"))]


def test_what_is_written_is_what_megatron_writes(tmp_path: Path, vocabulary: TokenizerConfig) -> None:
    """DOCUMENTS but for the empty one and the one of two sequences, of which we have none, byte for byte."""
    (tmp_path / "text").mkdir()
    ids = np.array([5, 6, 7, 1, 300, 2, 1], dtype=np.uint16)
    tokens_to = tmp_path / "a.bin"
    np.concatenate([ids, ids]).tofile(tokens_to)
    source = SourceConfig(path=str(tokens_to), format="tokens", end_of_text=1)
    prepare(DataConfig((source,), heldout_fraction=0.4), vocabulary, tmp_path / "corpus")
    corpus = open_split(tmp_path / "corpus", "train")
    write_megatron(corpus, tmp_path / "out")
    index = open_index(str(tmp_path / "out.idx"))
    sizes = [len(tokens) for tokens in index.read(0, index.documents)]
    places = np.cumsum([0, *sizes[:-1]]) * 2
    expected = (
        bytes.fromhex(HEAD.format(8))[:18]
        + struct.pack("<QQ", len(sizes), len(sizes) + 1)
        + struct.pack(f"<{len(sizes)}i", *sizes)
        + struct.pack(f"<{len(sizes)}q", *places.tolist())
        + struct.pack(f"<{len(sizes) + 1}q", *range(len(sizes) + 1))
    )
    assert (tmp_path / "out.idx").read_bytes() == expected
    assert np.array_equal(
        np.fromfile(tmp_path / "out.bin", np.uint16), np.load(tmp_path / "corpus/train/shard-00000.tok.npy")
    )


def test_export_says_what_it_needs(tmp_path: Path) -> None:
    for arguments, says in (
        ([], "source and target have to be given"),
        (["format=hf", "source=a", "target=b"], "there is no format=hf"),
        (["nonsense"], "not of the form key=value"),
        (["source=nowhere", f"target={tmp_path}/out"], "no such folder"),
        (["colour=red"], "colour"),
    ):
        done = subprocess.run([GPTSCALE, "export", *arguments], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 2, done.stderr
        assert says in done.stderr
        assert len(done.stderr.splitlines()) == 2
    assert not list(tmp_path.iterdir())


def test_parts_of_a_dataset_cover_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    golden(tmp_path / "megatron", 4)
    monkeypatch.setattr("gptscale.data.sources.tokens.part_bytes", lambda total: 20)
    parts: list[part.Part] = list(find_parts(SourceConfig(path=str(tmp_path / "megatron"), format="megatron"), "x"))
    assert [(one.start, one.stop) for one in parts] == [(0, 2), (2, 4), (4, 5)]
    assert [document.tokens.tolist() for one in parts for document in read_part(one)] == DOCUMENTS  # type: ignore[union-attr]


def test_ids_without_an_end_are_not_gathered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "_LONGEST", 50_000)
    monkeypatch.setattr(tokens, "_AT_ONCE", 1000)
    ids = np.full(200_000, 7, dtype=np.uint16)
    ids[[20_000, 69_000]] = 1
    ids.tofile(tmp_path / "a.bin")
    found = find_tokens(SourceConfig(path=str(tmp_path / "a.bin"), format="tokens", end_of_text=1), "data.sources[0]")
    reading = read_tokens(found[0])
    assert [len(next(reading).tokens) for _ in range(2)] == [20_000, 48_999]  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"a\.bin: no id 1 in 50,000 ids from 69,001 on.*\nset the source's end_of"):
        next(reading)
