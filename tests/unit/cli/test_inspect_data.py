"""What `gptscale inspect` says of prepared text: figures that add up, damage by name, nothing that moves a cursor."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gptscale.cli.main import main
from gptscale.config.schema import DataConfig, FilterConfig, SourceConfig, TokenizerConfig
from gptscale.data.corpus import open_split
from gptscale.data.prepare import prepare
from gptscale.report.data_summary import read_summary
from gptscale.report.terminal import bar, text_lines, visible
from gptscale.tokenizer import Tokenizer
from tests.helpers.text import documents, write_jsonl

EVIL = "\x1b[2J\x1b]0;title\x07\r\x9b31m\u202egnp.exe\u2066\x00\x7f\b\b"
SOURCES = ("web", "books", "code")


def inspected(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> tuple[str, str]:
    assert main(["inspect", *map(str, arguments)]) == code
    said = capsys.readouterr()
    return said.out, said.err


def table(out: str, head: str) -> list[list[str]]:
    """Cells of the lines below the one that begins with `head`, up to an empty one."""
    lines = out.splitlines()
    first = next(number for number, line in enumerate(lines) if line.strip().startswith(head))
    rows = []
    for line in lines[first + 1 :]:
        if not line.strip():
            break
        rows.append(re.split(r"  +", line.strip()))
    return rows


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sources with licences of their own, several shards, hostile text in one of them."""
    folder = tmp_path_factory.mktemp("mixed")
    sources = []
    for name, number in zip(SOURCES, (200, 120, 60), strict=True):
        texts = [f"{EVIL if name == 'code' else name} {text}" for text in documents(number, 90)]
        path = str(write_jsonl(folder / f"{name}.jsonl", texts))
        sources.append(SourceConfig(name=name, path=path, licence=f"{name}-licence"))
    data = DataConfig(sources=tuple(sources), heldout_fraction=0.1, shard_tokens=20_000, workers=1)
    return prepare(data, TokenizerConfig(vocab_size=500), folder / "prepared").folder


def test_figures_add_up(mixed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, err = inspected(capsys, mixed)
    assert err == ""
    assert out.startswith(f"{mixed}: prepared text\n")
    manifest = open_split(mixed, "train").manifest
    for says in (
        "vocabulary  500 pieces, token ids as uint16",
        f"identity    {manifest.identity[:16]}…",
        f"tokenizer   sha256 {manifest.tokenizer_sha256[:16]}…",
        "files       all there, with the right sizes; verify=true reads them",
    ):
        assert f"  {says}\n" in out
    splits = {row[0]: row[1:] for row in table(out, "split ")}
    assert splits["train"][0] == f"{manifest.tokens:,}"
    assert splits["train"][4] == str(len(manifest.shards))
    assert sum(int(row[1].replace(",", "")) for row in splits.values()) == 380, "documents"
    for split in ("train", "heldout"):
        rows = table(out, f"{split}, by source")
        assert {row[0] for row in rows} == set(SOURCES)
        assert all(row[6:8] == [f"{row[0]}-licence", "–"] for row in rows)
        assert sum(int(row[4].replace(",", "")) for row in rows) == int(splits[split][1].replace(",", ""))
        assert sum(float(row[3].removesuffix(" %")) for row in rows) == pytest.approx(100, abs=0.15 + 1e-9)  # rounding
    assert [row[0] for row in table(out, "train, by licence")] == [f"{name}-licence" for name in SOURCES]
    lengths = np.concatenate([_lengths(mixed, number) for number in range(len(manifest.shards))])
    exact = [np.quantile(lengths, share, method="inverted_cdf") for share in (0.5, 0.9, 0.99)]
    found = {row[0]: [int(figure.replace(",", "")) for figure in row[1:]] for row in table(out, "tokens a document")}
    smallest, median, mean, p90, p99, largest = found["train"]
    assert [smallest, median, p90, p99, largest] == [lengths.min(), *exact, lengths.max()]
    assert mean == round(lengths.mean())
    histogram = table(out, "train, length")
    assert sum("█" in row[2] for row in histogram) >= 1


def test_samples_are_of_every_source_and_cannot_move_the_cursor(
    mixed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = inspected(capsys, mixed)
    samples = re.findall(r"^sample of (\w+), document [\d,]+ \((shard-\d{5})\), [\d,]+ tokens:\n  │ (.*)$", out, re.M)
    assert [name for name, _, _ in samples] == [name for name in SOURCES for _ in range(2)]
    for name, _, line in samples:
        assert line.startswith("\\x1b[2J\\x1b]0;title\\x07" if name == "code" else f"{name} "), line
    assert all(letter.isprintable() or letter == "\n" for letter in out)


def test_a_manifest_cannot_move_the_cursor(mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nor a lone surrogate, which JSON can hold and a terminal cannot be given, end the program."""
    folder = tmp_path / "copy"
    shutil.copytree(mixed, folder)
    for split in ("train", "heldout"):
        values = json.loads((folder / split / "manifest.json").read_text())
        for part in values["parts"]:
            part |= {"source_name": f"{EVIL}\ud800", "licence": EVIL, "version": f"{EVIL}\n\n", "source": EVIL}
        (folder / split / "manifest.json").write_text(json.dumps(values))
    out, _ = inspected(capsys, folder)
    assert "gnp.exe" in out
    assert all(letter.isprintable() or letter == "\n" for letter in out)


def test_an_older_manifest_without_names(mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Is told by format."""
    folder = tmp_path / "copy"
    shutil.copytree(mixed, folder)
    for split in ("train", "heldout"):
        values = json.loads((folder / split / "manifest.json").read_text())
        for part in values["parts"]:
            del part["source_name"]
        (folder / split / "manifest.json").write_text(json.dumps(values))
    out, _ = inspected(capsys, folder)
    (row,) = table(out, "train, by source")
    assert row[:2] == ["jsonl", "jsonl"]
    assert row[6] == "web-licence and 2 more"


def test_verify_reads_everything(mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = inspected(capsys, mixed, "verify=true")
    assert (
        "files       all there; every checksum right, every id within the vocabulary, document ends in order\n" in out
    )
    folder = tmp_path / "copy"
    shutil.copytree(mixed, folder)
    for split in ("heldout", "train"):  # each is the first that is damaged
        path = folder / split / "shard-00000.tok.npy"
        content = bytearray(path.read_bytes())
        content[5000] ^= 1
        path.write_bytes(content)
        inspected(capsys, folder)  # sizes alone do not show it
        out, err = inspected(capsys, folder, "verify=true", code=2)
        assert f"DAMAGED: {path}: damaged: its content is not what the manifest recorded (xxh3-128)\n" in out
        assert "train, by source" in out, "what the manifests say is said"
        assert "sample of" not in out
        assert err.startswith(f"{path}: damaged")
        assert len(err.splitlines()) == 2


def test_damage_that_sizes_show(mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(mixed, folder)
    path = folder / "train" / "shard-00001.end.npy"
    path.write_bytes(path.read_bytes()[:-8])
    out, err = inspected(capsys, folder, code=2)
    assert f"DAMAGED: {path}: " in out
    assert err.startswith(f"{path}: ")
    (folder / "heldout" / "manifest.json").unlink()
    out, err = inspected(capsys, folder, code=2)
    assert out == ""
    assert "heldout/manifest.json is missing: not prepared text, or not finished" in err


def test_what_is_shown_is_what_there_is(mixed: Path) -> None:
    """The excerpts' texts are documents, decoded from the tokens where they are said to be."""
    data = read_summary(mixed)
    tokenizer = Tokenizer.load(mixed / "tokenizer.model")
    for one in data.excerpts:
        shards = [shard.name for shard in data.train.manifest.shards]
        number = shards.index(one.shard)
        before = sum(shard.documents for shard in data.train.manifest.shards[:number])
        ends = np.concatenate([[0], np.load(mixed / "train" / f"{one.shard}.end.npy")]).astype(int)
        start, stop = ends[one.document - before : one.document - before + 2]
        ids = np.load(mixed / "train" / f"{one.shard}.tok.npy")[start:stop]
        assert len(ids) == one.tokens
        assert tokenizer.decode(ids) == one.text


def test_visible() -> None:
    assert visible("plain ünï 語 text") == "plain ünï 語 text"
    assert visible("a\x1b\x9b\u202e\u2028\x00\ud800\U000e0001") == r"a\x1b\x9b\u202e\u2028\x00\ud800\U000e0001"
    assert visible("a\u00a0b\u3000c") == "a b c"
    assert text_lines("\n\n\tone\r\n\n two\nthree", 6, 2) == ["    o…", " two"]


def test_a_bar_shows_whatever_there_is() -> None:
    assert [bar(share, 4) for share in (0, 1e-9, 0.25, 0.28125, 1)] == ["", "▏", "█", "█▏", "████"]


def test_text_is_shown_without_torch_or_hydra(mixed: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from gptscale.cli.main import main\n"
        f"assert main(['inspect', {str(mixed)!r}, 'html={tmp_path / 'card.html'}']) == 0\n"
        "assert not {'torch', 'hydra', 'omegaconf', 'deepspeed'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"\npage: {tmp_path / 'card.html'}\n")


def _lengths(folder: Path, number: int) -> np.ndarray:
    ends = np.load(folder / "train" / f"shard-{number:05d}.end.npy")
    return np.diff(ends, prepend=np.uint64(0)).astype(int)


def test_what_filters_left_out_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = documents(60, words=20)
    write_jsonl(tmp_path / "web.jsonl", [*texts, *texts[:7], "short", "tiny"])
    filters = FilterConfig(min_characters=20, exact_duplicates=True)
    source = SourceConfig(path=str(tmp_path / "web.jsonl"))
    data = DataConfig((source,), heldout_fraction=0.2, filters=filters, shuffle_documents=True)
    prepare(data, TokenizerConfig(vocab_size=400), tmp_path / "out")
    out, _ = inspected(capsys, tmp_path / "out", f"html={tmp_path}/card.html")
    assert re.search(r"web +exact duplicate +7 ", out)
    assert re.search(r"web +too short +2 +9 bytes", out)
    assert "documents at random" in out
    assert out.count("sample of document ") == 4, "nobody knows of which source"
    page = (tmp_path / "card.html").read_text()
    assert "exact duplicate" in page
    assert "documents at random" in page
