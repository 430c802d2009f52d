"""`gptscale inspect` of prepared text in a store: what it says of the same folder here, without fetching its shards."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from gptscale.cli.main import main
from gptscale.config.schema import DataConfig, SourceConfig, TokenizerConfig
from gptscale.data.corpus import open_split
from gptscale.data.prepare import prepare
from gptscale.data.transfer import RemoteStore
from tests.helpers.s3 import S3
from tests.helpers.text import documents, write_jsonl

STEP = ("step=3", "global_batch=8", "sequence_length=24", "seed=5", "ranks=2", "rank=1")


def inspected(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> tuple[str, str]:
    assert main(["inspect", *map(str, arguments)]) == code
    said = capsys.readouterr()
    return said.out, said.err


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("store")
    sources = tuple(
        SourceConfig(name=name, path=str(write_jsonl(root / f"{name}.jsonl", documents(number, 60))), licence=name)
        for name, number in (("web", 120), ("books", 60))
    )
    data = DataConfig(sources=sources, heldout_fraction=0.1, shard_tokens=4_000, workers=1)
    done = prepare(data, TokenizerConfig(vocab_size=400), root / "prepared")
    assert len(done.train.shards) > 3
    return done.folder


@pytest.fixture(scope="module")
def address(s3: S3, folder: Path) -> str:
    return s3.upload(folder, "looked/at")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("more", [(), ("verify=true",), STEP])
def test_an_address_is_told_of_as_a_folder_is(
    folder: Path, address: str, elsewhere: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...]
) -> None:
    here, _ = inspected(capsys, folder, *more)
    there, _ = inspected(capsys, address, *more)
    # Columns are as wide as what is in them, and lines are cut to the terminal's width.
    assert there.splitlines()[0].startswith(address)
    assert words(there, address) == words(here, str(folder))
    assert len(here.splitlines()) > 10
    assert not list(elsewhere.iterdir()), "a look leaves nothing"


def words(said: str, named: str) -> list[str]:
    return re.sub(r"[─-]+", "", said.replace(named, "IT")).split()


def test_no_shard_is_fetched_for_a_look(
    address: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[str] = []
    fetch = RemoteStore.fetch

    def noted(store: RemoteStore, name: str, *arguments: object) -> None:
        fetched.append(name)
        fetch(store, name, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(RemoteStore, "fetch", noted)
    inspected(capsys, address)
    inspected(capsys, address, *STEP)
    assert fetched
    assert all(name.endswith(".end.npy") for name in fetched), fetched


def test_its_page(address: str, elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspected(capsys, address, "html=card.html")
    assert "<title>at" in (elsewhere / "card.html").read_text()


def test_what_is_damaged_there_is_named(
    s3: S3, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    shard = open_split(copy, "train").manifest.shards[1]
    path = copy / "train" / f"{shard.name}.tok.npy"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    address = s3.upload(copy, "looked/damaged")
    said, _ = inspected(capsys, address)
    assert "verify=true reads them" in said
    said, errors = inspected(capsys, address, "verify=true", code=2)
    assert "DAMAGED" in said
    assert f"{address}/train/{path.name}" in errors
    path.unlink()
    assert "missing" in inspected(capsys, s3.upload(copy, "looked/missing"), code=2)[1]
    assert "not prepared text" in inspected(capsys, s3.upload(copy / "heldout", "looked/other"), code=2)[1]


def test_what_makes_no_sense_of_an_address(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "are on this host" in inspected(capsys, address, address, code=2)[1]
    assert "leave one of them out" in inspected(capsys, address, *STEP, "verify=true", code=2)[1]
    assert inspected(capsys, "s3://gptscale-none/at", code=2)[1].count("\n") <= 2
