from __future__ import annotations

import gzip
import os
import shutil
import stat
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from gptscale.config.schema import SourceConfig
from gptscale.data.sources import Document, Part, debian, find_parts, part, read_part
from gptscale.data.spill import input_key
from gptscale.runtime.errors import UserError
from tests.helpers.text import documents, write_jsonl

TEXTS = ["first\r\nline\n", "second ▁ naïve \x00 中", "", "fourth " * 40]


def read(source: SourceConfig) -> list[Document]:
    return [document for found in find_parts(source, "data.sources[0]") for document in read_part(found)]


def zstd(data: bytes) -> bytes:
    compressed: bytes = pyarrow.compress(data, codec="zstd", asbytes=True)
    return compressed


def texts(source: SourceConfig) -> list[str]:
    return [document.text for document in read(source)]


def refusal(source: SourceConfig) -> str:
    with pytest.raises(UserError) as caught:
        read(source)
    message = str(caught.value)
    assert len(message.splitlines()) == 2, message
    return message


# jsonl


def test_jsonl_plain_gz_and_zst_give_the_same_documents(tmp_path: Path) -> None:
    plain = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    data = plain.read_bytes()
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(data[:40]) + gzip.compress(data[40:]))
    (tmp_path / "c.jsonl.zst").write_bytes(zstd(data[:40]) + zstd(data[40:]))
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst"):
        assert texts(SourceConfig(path=str(tmp_path / name))) == TEXTS
    everything = read(SourceConfig(path=str(tmp_path)))
    assert [document.text for document in everything] == TEXTS * 3
    assert len({document.identity for document in everything}) == 12
    assert not any(str(tmp_path) in document.identity for document in everything)
    assert texts(SourceConfig(path=str(tmp_path / "[ab]*.jsonl*"))) == TEXTS * 2


def test_jsonl_byte_order_mark_blank_lines_and_missing_last_newline(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\n\n  \n{"text": "b"}')
    assert texts(SourceConfig(path=str(tmp_path / "a.jsonl"))) == ["a", "b"]


@pytest.mark.parametrize("step", [1, 7, 20, 64, 1000])
def test_jsonl_ranges_of_any_size_give_every_line_once(
    tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", documents(4, words=3))
    whole = read(SourceConfig(path=str(path)))
    monkeypatch.setattr(part, "_SMALLEST_PART", step)
    parts = find_parts(SourceConfig(path=str(path)), "key")
    assert len(parts) == -(-path.stat().st_size // step)
    assert [document for found in parts for document in read_part(found)] == whole


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b'{"body": "x", "id": 1}', "no 'text' field (it has: body, id)"),
        (b'{"text": null}', "field 'text' is NoneType"),
        (b'{"text": 5}', "field 'text' is int"),
        (b'["text"]', "list, not an object"),
        (b'{"text": "x"', "not JSON"),
        (b'{"text": "\xff"}', "not UTF-8 (byte 0xff)"),
        (b'{"text": "\\ud83d"}', "half of a surrogate pair"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_jsonl_names_the_line_that_is_wrong(tmp_path: Path, line: bytes, complaint: str, packed: bool) -> None:
    data = b'{"text": "good"}\n\n{"text": "good"}\n' + line + b"\n"
    path = tmp_path / ("bad.jsonl.gz" if packed else "bad.jsonl")
    path.write_bytes(gzip.compress(data) if packed else data)
    message = refusal(SourceConfig(path=str(path)))
    assert f"{path}:4: " in message
    assert complaint in message


def test_jsonl_names_the_line_in_a_later_range_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "good"}\n' * 50 + b"{}\n")
    monkeypatch.setattr(part, "_SMALLEST_PART", 100)
    assert f"{path}:51: no 'text' field (it has: none)" in refusal(SourceConfig(path=str(path)))


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "not compressed"])
def test_jsonl_broken_compressed_files_are_named(tmp_path: Path, suffix: str, damage: str) -> None:
    data = "".join(f'{{"text": "{os.urandom(40).hex()}"}}\n' for _ in range(2000)).encode()
    packed = gzip.compress(data) if suffix == ".gz" else zstd(data)
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(packed[: len(packed) // 2] if damage == "cut" else data)
    assert f"{path}: broken compressed file" in refusal(SourceConfig(path=str(path)))


def test_jsonl_of_another_field(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["x", "y"], key="content")
    assert texts(SourceConfig(path=str(path), text_key="content")) == ["x", "y"]


# parquet


def _parquet(path: Path, values: list[object], kind: pyarrow.DataType | None = None, group: int = 3) -> Path:
    table = pyarrow.table({"id": range(len(values)), "text": pyarrow.array(values, type=kind)})
    parquet.write_table(table, path, row_group_size=group)
    return path


def test_parquet_rows_come_in_order_whatever_the_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = documents(20, words=5)
    path = _parquet(tmp_path / "a.parquet", values)
    _parquet(tmp_path / "b.parquet", ["large"], pyarrow.large_string())
    whole = read(SourceConfig(path=str(path)))
    assert [document.text for document in whole] == values
    monkeypatch.setattr(part, "_SMALLEST_PART", 1)
    parts = find_parts(SourceConfig(path=str(path)), "key")
    assert len(parts) == 7
    assert [document for found in parts for document in read_part(found)] == whole
    assert texts(SourceConfig(path=str(tmp_path))) == [*values, "large"]


def test_parquet_without_usable_text_is_refused(tmp_path: Path) -> None:
    nulls = _parquet(tmp_path / "nulls.parquet", ["a", "b", "c", "d", None])
    assert f"{nulls}: row 4 has no text" in refusal(SourceConfig(path=str(nulls)))
    assert "no 'body' column (it has: id, text)" in refusal(SourceConfig(path=str(nulls), text_key="body"))
    assert "holds int64, not text" in refusal(SourceConfig(path=str(nulls), text_key="id"))
    (tmp_path / "fake.parquet").write_bytes(b"PAR1 no, not really, but long enough to look at PAR1")
    assert "fake.parquet: not a parquet file" in refusal(SourceConfig(path=str(tmp_path / "fake.parquet")))


# text and files


def test_text_takes_txt_and_md_below_a_folder_byte_for_byte(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfb\r\n")
    (tmp_path / "deep/a.md").write_text("a")
    (tmp_path / "ignored.png").write_bytes(b"\x89PNG")
    assert read(SourceConfig(path=str(tmp_path), format="text")) == [
        Document("b.txt", "\ufeffb\r\n"),
        Document("deep/a.md", "a"),
    ]
    assert texts(SourceConfig(path=str(tmp_path / "**/*.md"), format="text")) == ["a"]
    assert texts(SourceConfig(path=str(tmp_path / "b.txt"))) == ["\ufeffb\r\n"]


def test_files_takes_what_the_pattern_names_and_leaves_dot_files(tmp_path: Path) -> None:
    for name in ("z.py", "a/b.py", "a/c.c", ".git/config", ".hidden.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert texts(SourceConfig(path=str(tmp_path), format="files")) == ["a/b.py", "a/c.c", "z.py"]
    assert texts(SourceConfig(path=str(tmp_path), format="files", pattern="**/*.py")) == ["a/b.py", "z.py"]
    assert "pattern=*.rs: no file" in refusal(SourceConfig(path=str(tmp_path), format="files", pattern="*.rs"))
    assert "no such folder" in refusal(SourceConfig(path=str(tmp_path / "z.py"), format="files"))


def test_binary_files_and_broken_utf8_are_named_with_their_place(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("fine")
    (tmp_path / "b.py").write_bytes(b"one\ntwo \xe9t\xe9\n")
    message = refusal(SourceConfig(path=str(tmp_path), format="files"))
    assert f"{tmp_path / 'b.py'}:2: not UTF-8 (byte 0xe9 at offset 8)" in message
    assert "iconv" in message
    (tmp_path / "b.py").write_bytes(b"\x7fELF\0\0\0")
    assert f"{tmp_path / 'b.py'}: a binary file" in refusal(SourceConfig(path=str(tmp_path), format="files"))
    assert "pattern" in refusal(SourceConfig(path=str(tmp_path), format="files"))


def test_small_files_are_gathered_into_parts_that_cover_them_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(50):
        (tmp_path / f"{number:02}.txt").write_text("x" * number)
    source = SourceConfig(path=str(tmp_path), licence="CC0-1.0")
    assert len(find_parts(source, "key")) == 1
    monkeypatch.setattr(part, "_SMALLEST_PART", 200)
    parts = find_parts(source, "key")
    assert 3 < len(parts) < 10
    assert [file for found in parts for file in found.files] == [f"{number:02}.txt" for number in range(50)]
    assert {found.licence for found in parts} == {"CC0-1.0"}


# auto


def test_auto_asks_where_the_names_do_not_tell(tmp_path: Path) -> None:
    assert "neither path nor format" in refusal(SourceConfig())
    assert "no such file" in refusal(SourceConfig(path=str(tmp_path / "none.jsonl")))
    assert "no file name that tells" in refusal(SourceConfig(path=str(tmp_path)))
    write_jsonl(tmp_path / "a.jsonl", ["x"])
    (tmp_path / "b.txt").write_text("x")
    message = refusal(SourceConfig(path=str(tmp_path)))
    assert "several formats (jsonl, text)" in message
    assert "data.sources[0].format" in message
    assert texts(SourceConfig(path=str(tmp_path), format="text")) == ["x"]
    assert "no such file" in refusal(SourceConfig(path=str(tmp_path / "none"), format="text"))
    assert "no file" in refusal(SourceConfig(path=str(tmp_path), format="parquet"))


# huggingface


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))


def test_huggingface_streams_a_local_dataset_shard_by_shard(tmp_path: Path, offline: None) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    for number in range(3):
        _parquet(folder / f"train-{number}.parquet", documents(5, words=5, seed=number))
    source = SourceConfig(path=str(folder), format="huggingface")
    parts = find_parts(source, "data.sources[0]")
    assert len(parts) == 3
    assert texts(source) == [text for seed in range(3) for text in documents(5, words=5, seed=seed)]
    assert len({document.identity for document in read(source)}) == 15
    for wrong, complaint in (
        ({"split": "nope"}, "nope"),
        ({"text_key": "body"}, "no such column (it has: id, text)"),
        ({"subset": "nope"}, "nope"),
        ({"path": str(tmp_path / "nothing")}, "cannot load it"),
        ({"path": ""}, "needs a name or a local path"),
    ):
        message = refusal(SourceConfig(**{"path": str(folder), "format": "huggingface", **wrong}))
        assert message.startswith("data.sources[0].")
        assert complaint in message


def test_huggingface_reads_what_save_to_disk_wrote(tmp_path: Path, offline: None) -> None:
    import datasets

    saved = datasets.Dataset.from_dict({"text": ["x", "y"], "id": [1, 2]})
    saved.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"validation": saved}).save_to_disk(tmp_path / "dict")
    assert texts(SourceConfig(path=str(tmp_path / "one"), format="huggingface")) == ["x", "y"]
    assert texts(SourceConfig(path=str(tmp_path / "dict"), format="huggingface", split="validation")) == ["x", "y"]
    assert "it has: validation" in refusal(SourceConfig(path=str(tmp_path / "dict"), format="huggingface"))


def test_a_huggingface_dataset_that_changes_is_another(tmp_path: Path, offline: None) -> None:
    """Of as many rows and under the same name: what was tokenised of it before does not count."""
    import datasets

    (tmp_path / "set").mkdir()
    files = SourceConfig(path=str(tmp_path / "set"), format="huggingface")
    saved = SourceConfig(path=str(tmp_path / "saved"), format="huggingface")

    def keys() -> list[Any]:
        return [input_key(part) for source in (files, saved) for part in find_parts(source, "data.sources[0]")]

    def write(text: str, time_ns: int) -> None:
        _parquet(tmp_path / "set/train.parquet", [text])
        datasets.Dataset.from_dict({"text": [text]}).save_to_disk(tmp_path / "saved")
        for path in tmp_path.rglob("*"):
            os.utime(path, ns=(time_ns, time_ns))

    write("x", 10**18)
    first = keys()
    assert keys() == first
    write("y", 10**18 + 10**9)
    assert all(now != before for now, before in zip(keys(), first, strict=True))
    write("x", 10**18)
    assert keys() == first


# text at hand


def test_stdlib_is_this_pythons_own_library(tmp_path: Path) -> None:
    parts = find_parts(SourceConfig(format="stdlib"), "data.sources[0]")
    files = [file for found in parts for file in found.files]
    assert "json/decoder.py" in files
    assert not any("site-packages" in file or "/tests/" in file or file.startswith("test/") for file in files)
    assert {found.licence for found in parts} == {"PSF-2.0"}
    assert {found.version for found in parts} == {f"Python {sys.version.split()[0]}"}
    assert sum(found.input_bytes for found in parts) > 5_000_000
    assert all("\0" not in document.text for document in read_part(parts[0]))


def test_debian_without_apt_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "needs apt-get" in refusal(SourceConfig(format="debian"))
    assert not debian.cache_folder().exists()


@pytest.mark.skipif(shutil.which("apt-get") is None, reason="no apt on this machine")
def test_debian_reads_from_a_mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a real apt mirror in a folder: packages built here, fetched by file:, unpacked, read, and cached."""
    mirror = _mirror(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    settings = tmp_path / "apt.conf"
    settings.write_text(
        f'Dir::Etc::SourceList "{tmp_path}/sources.list"; Dir::Etc::SourceParts "/dev/null";\n'
        'APT::Architecture "amd64"; APT::Architectures { "amd64"; };\n'
    )
    (tmp_path / "sources.list").write_text(f"deb [trusted=yes] file:{mirror} test main\n")
    monkeypatch.setenv("APT_CONFIG", str(settings))
    parts = find_parts(SourceConfig(format="debian"), "data.sources[0]")
    read_all = {found.name: [document.text for document in read_part(found)] for found in parts}
    assert read_all["python3.11-doc.jsonl"] == ["Python page\n"]
    assert read_all["linux-doc-6.1.jsonl"] == ["Linux page\n", "Packed page\n"]
    (described,) = [value for key, value in read_all.items() if key.startswith("descriptions")]
    assert described == ["linux-doc: Kernel manual\n\nAll of it.\n\nIn two paragraphs.\n"]
    by_name = {found.name: found for found in parts}
    assert (by_name["linux-doc-6.1.jsonl"].licence, by_name["linux-doc-6.1.jsonl"].version) == ("GPL-2.0-only", "1.0-1")
    assert by_name["descriptions.jsonl"].version == "test"
    (tmp_path / "sources.list").unlink()
    assert find_parts(SourceConfig(format="debian"), "data.sources[0]") == parts


@pytest.mark.skipif(shutil.which("apt-get") is None, reason="no apt on this machine")
def test_debian_with_a_broken_mirror_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "apt.conf").write_text(
        f'Dir::Etc::SourceList "{tmp_path}/sources.list"; Dir::Etc::SourceParts "/dev/null";'
    )
    (tmp_path / "sources.list").write_text(f"deb [trusted=yes] file:{tmp_path}/nothing ./\n")
    monkeypatch.setenv("APT_CONFIG", str(tmp_path / "apt.conf"))
    message = refusal(SourceConfig(format="debian"))
    assert "`apt-get update` failed" in message
    assert "format=stdlib" in message
    assert not debian.cache_folder().exists()


def _mirror(tmp_path: Path) -> Path:
    """An apt repository with the two manuals and a Translation-en, made with dpkg-deb."""
    import hashlib
    import subprocess

    mirror = tmp_path / "mirror"
    dists = mirror / "dists/test"
    (dists / "main/i18n").mkdir(parents=True)
    (dists / "main/binary-amd64").mkdir()
    pages = {
        "python3-doc": {},
        "linux-doc": {},
        "python3.11-doc": {
            "python3.11/html/_sources/a.rst.txt": b"Python page\n",
            "python3.11/html/_sources/copy.rst.txt": b"Python page\n",
            "python3.11/html/a.html": b"<p>no</p>",
        },
        "linux-doc-6.1": {
            "linux-doc-6.1/Documentation/a.rst": b"Linux page\n",
            "linux-doc-6.1/Documentation/b.txt.gz": gzip.compress(b"Packed page\n"),
            "linux-doc-6.1/Documentation/old.txt": b"latin \xe9",
            "linux-doc-6.1/Documentation/translations/zh/a.rst": b"no",
            "linux-doc-6.1/html/_sources/a.rst.txt": b"Linux page\n",
        },
    }
    depends = {"python3-doc": "python3.11-doc", "linux-doc": "linux-doc-6.1"}
    stanzas = []
    for package, files in pages.items():
        root = tmp_path / "build" / package
        for name, data in files.items():
            path = root / "usr/share/doc" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        (root / "DEBIAN").mkdir(parents=True)
        control = f"Package: {package}\nVersion: 1.0-1\nArchitecture: all\nMaintainer: nobody\n"
        control += f"Depends: {depends[package]}\n" if package in depends else ""
        (root / "DEBIAN/control").write_text(control + "Description: Kernel manual\n")
        archive = mirror / f"{package}_1.0-1_all.deb"
        subprocess.run(["dpkg-deb", "-Znone", "-b", str(root), str(archive)], check=True, capture_output=True)
        digest = hashlib.sha256(archive.read_bytes()).hexdigest()
        stanzas.append(
            f"{control}Description: Kernel manual\nFilename: {archive.name}\n"
            f"Size: {archive.stat().st_size}\nSHA256: {digest}\n"
        )
    (dists / "main/binary-amd64/Packages").write_text("\n".join(stanzas))
    body = " All of it.\n .\n In two paragraphs.\n"
    translation = "".join(
        f"Package: {package}\nDescription-md5: {'0' * 32}\nDescription-en: Kernel manual\n{body}\n"
        for package in ("linux-doc", "python3-doc")
    )
    (dists / "main/i18n/Translation-en").write_text(translation)
    release = "Origin: test\nSuite: test\nCodename: test\nArchitectures: amd64\nComponents: main\nSHA256:\n"
    for name in ("main/binary-amd64/Packages", "main/i18n/Translation-en"):
        data = (dists / name).read_bytes()
        release += f" {hashlib.sha256(data).hexdigest()} {len(data)} {name}\n"
    (dists / "Release").write_text(release)
    return mirror


def test_parts_can_be_sent_to_a_process(tmp_path: Path) -> None:
    import pickle

    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    (found,) = find_parts(SourceConfig(path=str(path)), "key")
    assert isinstance(found, Part)
    assert list(read_part(pickle.loads(pickle.dumps(found)))) == list(read_part(found))


def test_a_file_that_cannot_be_read_is_not_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("x")
    (found,) = find_parts(SourceConfig(path=str(path)), "key")
    path.chmod(stat.S_IWUSR)
    if os.access(path, os.R_OK):  # root reads everything
        path.unlink()
    with pytest.raises(UserError, match=r"a\.txt: "):
        list(read_part(found))
