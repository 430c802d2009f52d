from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gptscale.data.corpus import open_split
from gptscale.data.shards import MANIFEST, Manifest, NpyWriter, file_xxh3_128, token_dtype
from gptscale.runtime.errors import UserError
from gptscale.tokenizer.train import train_tokenizer
from tests.helpers.text import documents


@pytest.fixture
def corpus(prepared: Path, tmp_path: Path) -> Path:
    shutil.copytree(prepared, tmp_path / "corpus")
    return tmp_path / "corpus"


def test_numpy_alone_reads_a_prepared_folder(prepared: Path) -> None:
    manifest = json.loads((prepared / "train" / MANIFEST).read_text())
    assert manifest["format_version"] == 1
    assert len(manifest["shards"]) > 2
    for shard in manifest["shards"]:
        tokens = np.load(prepared / "train" / f"{shard['name']}.tok.npy", allow_pickle=False)
        ends = np.load(prepared / "train" / f"{shard['name']}.end.npy", allow_pickle=False)
        assert (tokens.dtype, tokens.shape) == (np.dtype("uint16"), (shard["tokens"],))
        assert (ends.dtype, ends.shape) == (np.dtype("uint64"), (shard["documents"],))
        assert ends[-1] == len(tokens)
        assert (tokens[ends.astype(int) - 1] == manifest["end_of_text"]).all()


def test_a_manifest_comes_back_and_its_identity_ignores_only_where_text_came_from(prepared: Path) -> None:
    manifest = open_split(prepared, "train", verify=True).manifest
    data = json.loads((prepared / "train" / MANIFEST).read_text())
    assert Manifest.parse(data) == manifest
    changed = {}
    for key in data:
        if key not in ("parts", "shards", "shuffled"):
            other = {**data, key: data[key] + (1 if isinstance(data[key], int) else "x")}
            changed[key] = Manifest.parse(other).identity
    data["shards"][0]["token_xxh3_128"] = "0" * 32
    changed["shards"] = Manifest.parse(data).identity
    assert len({*changed.values(), manifest.identity}) == len(changed) + 1
    unchanged = json.loads((prepared / "train" / MANIFEST).read_text())
    unchanged["parts"] = []
    assert Manifest.parse(unchanged).identity == manifest.identity


def _rewrite_manifest(corpus: Path, change: Callable[[dict], object]) -> None:
    path = corpus / "train" / MANIFEST
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def _flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def _rehash(corpus: Path, name: str) -> None:
    """Make a damaged shard's record agree with it, so that only a look at the content can tell."""
    number = int(name.split("-")[1].split(".")[0])
    key = "token_xxh3_128" if ".tok." in name else "end_xxh3_128"
    _rewrite_manifest(corpus, lambda data: data["shards"][number].update({key: file_xxh3_128(corpus / "train" / name)}))


def _overwrite(path: Path, index: int, value: int) -> None:
    array = np.load(path)
    array[index] = value
    np.save(path, array)


FIRST = "shard-00000.tok.npy"
DAMAGES: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "tokens missing": (lambda c: (c / "train" / FIRST).unlink(), FIRST, "missing"),
    "ends missing": (lambda c: (c / "train/shard-00001.end.npy").unlink(), "shard-00001.end.npy", "missing"),
    "short": (
        lambda c: (c / "train" / FIRST).write_bytes((c / "train" / FIRST).read_bytes()[:-2]),
        FIRST,
        "bytes where the manifest says",
    ),
    "foreign shard": (
        lambda c: shutil.copy(c / "train" / FIRST, c / "train/shard-00099.tok.npy"),
        "shard-00099.tok.npy",
        "does not list",
    ),
    "wrong type": (
        lambda c: np.save(c / "train" / FIRST, np.load(c / "train" / FIRST).view(np.int16)),
        FIRST,
        "int16",
    ),
    "not npy": (
        lambda c: (c / "train" / FIRST).write_bytes(bytes((c / "train" / FIRST).stat().st_size)),
        FIRST,
        "not a .npy file",
    ),
    "another tokenizer": (
        lambda c: train_tokenizer(documents(50, seed=9), 500, c / "tokenizer.model"),
        "tokenizer.model",
        "not the tokenizer",
    ),
    "no tokenizer": (lambda c: (c / "tokenizer.model").unlink(), "tokenizer.model", "no tokenizer"),
    "no manifest": (lambda c: (c / "train" / MANIFEST).unlink(), MANIFEST, "not finished"),
    "no folder": (shutil.rmtree, "corpus", "no such folder"),
    "half a manifest": (
        lambda c: (c / "train" / MANIFEST).write_text((c / "train" / MANIFEST).read_text()[:99]),
        MANIFEST,
        "damaged",
    ),
    "binary manifest": (lambda c: (c / "train" / MANIFEST).write_bytes(b"\xff\xfe"), MANIFEST, "damaged"),
    "unknown field": (lambda c: _rewrite_manifest(c, lambda d: d.update(extra=1)), MANIFEST, "damaged"),
    "missing field": (lambda c: _rewrite_manifest(c, lambda d: d.pop("tokens")), MANIFEST, "damaged"),
    "newer version": (lambda c: _rewrite_manifest(c, lambda d: d.update(format_version=2)), MANIFEST, "version 2"),
    "wrong total": (lambda c: _rewrite_manifest(c, lambda d: d.update(tokens=1)), MANIFEST, "contradicts"),
    "wrong split": (lambda c: shutil.copy(c / "heldout" / MANIFEST, c / "train"), MANIFEST, "contradicts"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_at_once_and_the_file_named(corpus: Path, damage: str) -> None:
    open_split(corpus, "train")
    act, file, complaint = DAMAGES[damage]
    act(corpus)
    with pytest.raises(UserError, match=complaint) as caught:
        open_split(corpus, "train")
    first, fix = str(caught.value).split("\n")
    assert file in first
    assert fix


@pytest.mark.parametrize("file", ["shard-00000.tok.npy", "shard-00001.end.npy"])
@pytest.mark.parametrize("place", [128, 500, -1])
def test_a_flipped_bit_is_found_by_verify(corpus: Path, file: str, place: int) -> None:
    _flip(corpus / "train" / file, place)
    open_split(corpus, "train")
    with pytest.raises(UserError, match=rf"{file}: damaged"):
        open_split(corpus, "train", verify=True)


def test_sense_is_checked_by_verify_even_where_hashes_agree(corpus: Path) -> None:
    _overwrite(corpus / "train" / FIRST, 17, 500)
    _rehash(corpus, FIRST)
    with pytest.raises(UserError, match=rf"{FIRST}: token id 500 outside the vocabulary of 500"):
        open_split(corpus, "train", verify=True)
    _overwrite(corpus / "train" / FIRST, 17, 499)
    _rehash(corpus, FIRST)
    open_split(corpus, "train", verify=True)
    ends = "shard-00001.end.npy"
    original = int(np.load(corpus / "train" / ends)[-1])
    for index, value in ((-1, original - 1), (0, 0), (1, 1)):
        kept = (corpus / "train" / ends).read_bytes()
        _overwrite(corpus / "train" / ends, index, value)
        _rehash(corpus, ends)
        with pytest.raises(UserError, match=rf"{ends}: document ends"):
            open_split(corpus, "train", verify=True)
        (corpus / "train" / ends).write_bytes(kept)
        _rehash(corpus, ends)


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    assert token_dtype(65_536) == np.uint16
    assert token_dtype(65_537) == np.uint32
    raw = np.array([70_000, 1, 2, 3], dtype=np.uint32)
    path = tmp_path / "ids.npy"
    with NpyWriter(path, token_dtype(70_001), len(raw)) as writer:
        writer.write(raw)
        digest = writer.finish()
    assert np.array_equal(np.load(path), raw)
    assert digest == file_xxh3_128(path)
