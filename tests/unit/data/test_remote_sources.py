"""Text in a store that fsspec knows: read as local files are. `file://` goes the whole way but for the network."""

from __future__ import annotations

import gzip
import os
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import BinaryIO

import fsspec
import pyarrow
import pytest
from pyarrow import parquet

from gptscale.config.schema import DataConfig, SourceConfig, TokenizerConfig
from gptscale.data.prepare import corpus_folder, prepare
from gptscale.data.sources import Part, files, find_parts, jsonl, read_part
from gptscale.data.sources import parquet as parquet_source
from gptscale.data.store import fingerprint
from gptscale.runtime.errors import UserError
from tests.helpers.text import contents, documents, write_jsonl


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    texts = documents(40, words=20)
    data = write_jsonl(folder / "lines/a.jsonl", texts).read_bytes()
    (folder / "lines/deep").mkdir()
    (folder / "lines/deep/b.jsonl.gz").write_bytes(gzip.compress(data))
    (folder / "lines/c.jsonl.zst").write_bytes(pyarrow.compress(data, codec="zstd", asbytes=True))
    (folder / "rows").mkdir()
    parquet.write_table(pyarrow.table({"text": texts}), folder / "rows/a.parquet", row_group_size=7)
    (folder / "books/.hidden").mkdir(parents=True)
    for number, text in enumerate(texts):
        (folder / f"books/{number}.{('txt', 'md', 'py')[number % 3]}").write_text(text)
    return folder


def found(source: SourceConfig) -> list[tuple[str, str, int, list[tuple[str, str]]]]:
    return [
        (part.name, part.format, part.input_bytes, [tuple(document) for document in read_part(part)])  # type: ignore[misc]
        for part in find_parts(source, "data.sources[0]")
    ]


@pytest.mark.parametrize(
    ("path", "more"),
    [
        ("lines", {}),
        ("lines/", {}),
        ("lines/a.jsonl", {}),
        ("lines/*.jsonl*", {}),
        ("lines/deep/b.jsonl.gz", {}),
        ("rows", {}),
        ("rows/a.parquet", {}),
        ("books", {}),
        ("books", {"format": "files", "pattern": "*.py"}),
        ("books", {"format": "files", "pattern": "**/1?.*"}),
    ],
)
def test_a_store_gives_what_a_folder_gives(store: Path, path: str, more: dict[str, str]) -> None:
    local = found(SourceConfig(path=f"{store}/{path}", **more))  # type: ignore[arg-type]
    assert local
    assert found(SourceConfig(path=f"file://{store}/{path}", **more)) == local  # type: ignore[arg-type]
    memory = fsspec.filesystem("memory")
    for file in (file for file in store.rglob("*") if file.is_file()):
        memory.pipe(f"/bucket/{file.relative_to(store)}", file.read_bytes())
    assert found(SourceConfig(path=f"memory://bucket/{path}", **more)) == local  # type: ignore[arg-type]


def test_processes_prepare_from_a_store_what_they_prepare_from_a_folder(tmp_path: Path) -> None:
    texts = documents(1200, words=150)
    for number in range(3):
        write_jsonl(tmp_path / f"text/{number}.jsonl", texts[number::3])
    tokenizer = TokenizerConfig(vocab_size=500, training_bytes=100_000)
    for name, path in (("here", f"{tmp_path}/text"), ("there", f"file://{tmp_path}/text")):
        prepare(DataConfig((SourceConfig(path=path),), workers=2), tokenizer, tmp_path / name)
    assert contents(tmp_path / "here") == contents(tmp_path / "there")


def test_a_file_that_changes_is_another(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("one")
    memory = fsspec.filesystem("memory")
    memory.pipe("/b/a", b"one")
    places = [f"{tmp_path}/a", f"file://{tmp_path}/a", "memory://b/a"]
    before = [fingerprint(place) for place in places]
    assert [fingerprint(place) for place in places] == before
    (tmp_path / "a").write_text("two")
    memory.pipe("/b/a", b"two")
    for place, was in zip(places, before, strict=True):
        assert fingerprint(place) != was, place


def test_a_file_that_changes_on_a_web_server_is_another(tmp_path: Path) -> None:
    """Of the same size, under the same address."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *arguments: object) -> None:
            pass

    (tmp_path / "a").write_text("one")
    os.utime(tmp_path / "a", (10**9, 10**9))
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        place = f"http://127.0.0.1:{server.server_address[1]}/a"
        before = fingerprint(place)
        assert fingerprint(place) == before
        (tmp_path / "a").write_text("two")
        os.utime(tmp_path / "a", (10**9 + 1, 10**9 + 1))
        assert fingerprint(place) != before
        server.shutdown()


def test_the_folder_of_a_store_does_not_depend_on_where_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = DataConfig((SourceConfig(path="s3://bucket/text"),), corpora_dir=str(tmp_path))
    here = corpus_folder(data, TokenizerConfig())
    monkeypatch.chdir(tmp_path)
    assert corpus_folder(data, TokenizerConfig()) == here
    assert here.name.startswith("text-")


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("memory://nothing/here", "no file there"),
        ("memory://nothing/*.jsonl", "no file there"),
        ("nosuch://bucket/text", "Protocol not known: nosuch"),
        ("gs://bucket/text", "install"),
    ],
)
def test_what_a_store_does_not_give_is_named(path: str, says: str) -> None:
    with pytest.raises(UserError) as refused:
        find_parts(SourceConfig(path=path, format="jsonl"), "data.sources[0]")
    what, fix = str(refused.value).splitlines()
    assert what.startswith(f"data.sources[0].path={path}: ")
    assert says in what or says in fix


class _ClientPayloadError(Exception):
    """As aiohttp has it: no OSError."""

    __module__ = "aiohttp.client_exceptions"


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet", "a.txt"])
@pytest.mark.parametrize("error", [TimeoutError("timed out"), OSError(5, "EIO"), _ClientPayloadError("cut off")])
def test_a_store_that_fails_as_text_is_read_is_not_the_texts_fault(
    name: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = Part(name, SourceConfig(), FORMAT_OF[Path(name).suffixes[0]], "memory://texts", (name,), 10, "", "", 0, 10)
    raised: list[Exception] = [error]

    def fails(where: str) -> BinaryIO:
        raise raised[0]

    for module in (files, jsonl, parquet_source):
        monkeypatch.setattr(module, "open_input", fails)
    with pytest.raises(UserError, match=rf"memory://texts/{name}: the store cannot be read: .*\ncheck network"):
        list(read_part(part))
    raised[0] = RuntimeError("a bug")
    with pytest.raises(RuntimeError, match="a bug"):
        list(read_part(part))


FORMAT_OF = {".jsonl": "jsonl", ".parquet": "parquet", ".txt": "text"}
