"""The data card in a real browser, and what it says."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from gptscale.cli.main import main
from gptscale.config.schema import DataConfig, SourceConfig, TokenizerConfig
from gptscale.data.prepare import prepare
from gptscale.report.card_page import render, write_card
from gptscale.report.data_summary import DataSummary, read_summary
from gptscale.runtime.errors import UserError
from tests.helpers.chromium import Browser
from tests.helpers.prepared import of_lengths
from tests.helpers.text import documents, write_jsonl

EVIL = "<script>document.title='run'</script><img src=x onerror=alert(1)>&\"'</blockquote></details>"
PHONE, DESKTOP = 390, 1280
NOW = datetime(2026, 3, 1, 8, 15, 2, tzinfo=UTC)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text and names that would be markup, and one word without a place to break."""
    folder = tmp_path_factory.mktemp("hostile")
    texts = [f"{EVIL} {'x' * 400}\n\x1b[2J\u202e{text}" for text in documents(60, 60)]
    other = write_jsonl(folder / "other.jsonl", documents(90, 60, seed=2))
    sources = (
        SourceConfig(name=EVIL, path=str(write_jsonl(folder / "evil.jsonl", texts)), licence=EVIL),
        SourceConfig(path=str(other), licence="CC-BY-4.0"),
    )
    data = DataConfig(sources=sources, heldout_fraction=0.1, workers=1, shard_tokens=9_000)
    made = prepare(data, TokenizerConfig(vocab_size=500), folder / f"a<b>{'y' * 60}").folder
    for split in ("train", "heldout"):
        values = json.loads((made / split / "manifest.json").read_text())
        for part in values["parts"]:
            part["source_name"] = EVIL if "evil" in part["name"] else "other"
            part["version"] = "2024\ud800"
        (made / split / "manifest.json").write_text(json.dumps(values))
    return made


def many_sources(data: DataSummary) -> DataSummary:
    """60 sources and 300 parts: more than are shown."""
    (group, *_), (part, *_) = data.train.sources, data.train.manifest.parts
    groups = tuple(replace(group, name=f"source-{n}", licences=(f"licence {n}",) * 6, tokens=9**n) for n in range(60))
    groups = groups[::-1]
    manifest = replace(data.train.manifest, tokens=sum(g.tokens for g in groups), parts=(part,) * 300)
    return replace(data, train=replace(data.train, manifest=manifest, sources=groups, licences=groups))


def one_length(folder: Path, tokenizer: Path) -> DataSummary:
    of_lengths(folder, [np.full(50, 7)], tokenizer)
    return read_summary(folder)


def damaged(data: DataSummary) -> DataSummary:
    train, heldout = replace(data.train, lengths=None), replace(data.heldout, lengths=None)
    error = UserError(f"{EVIL}/shard-00000.tok.npy: missing\ncopy it again")
    return replace(data, train=train, heldout=heldout, excerpts=(), damage=error)


CARDS: dict[str, Callable[[DataSummary, Path], DataSummary]] = {
    "hostile": lambda data, _: data,
    "many sources": lambda data, _: many_sources(data),
    "one length": lambda data, folder: one_length(folder / "one", Path(data.folder) / "tokenizer.model"),
    "damaged": lambda data, _: damaged(data),
}


@pytest.mark.parametrize("kind", CARDS)
def test_a_card_is_quiet_and_fits(kind: str, hostile: Path, tmp_path: Path, browser: Browser) -> None:
    """No message, exception or request; no sideways scrolling; readable; every mark within its drawing."""
    path = tmp_path / "card.html"
    write_card(path, CARDS[kind](read_summary(hostile), tmp_path))
    for width in (PHONE, DESKTOP):
        for dark in (False, True):
            seen = browser.look(path, width, dark)
            assert seen.faults == [], f"{width} px, {'dark' if dark else 'light'}"
            assert seen.drawings == (1 if kind == "damaged" else 3)


def test_nothing_from_a_corpus_is_markup(hostile: Path) -> None:
    page = render(read_summary(hostile), NOW)
    assert not re.search(r"<script|<img|</blockquote></details>", page)
    assert page.count("&lt;script&gt;document.title=") > 5
    assert "http" not in page
    assert all(letter.isprintable() or letter == "\n" for letter in page)


def test_a_card_says_what_the_corpus_is(hostile: Path) -> None:
    data = read_summary(hostile, verify=True)
    page = render(data, NOW)
    train, heldout = data.train.manifest, data.heldout.manifest
    lengths = data.train.lengths
    assert lengths is not None
    for said in (
        f"Training text: {train.tokens:,} tokens",
        f"Held-out text: {heldout.tokens:,} tokens",
        train.identity,
        heldout.identity,
        f"sha256 {train.tokenizer_sha256}",
        "CC-BY-4.0",
        "every checksum right",
        f'<td class="number">{lengths.median:,}</td>',
        f"{len(train.shards)} of train",
        "uint16, below 500",
        "x" * 400,
        "\\x1b[2J\\u202e",
        "Written 2026-03-01 08:15:02 UTC",
    ):
        assert said in page, said
    bars = re.search(r'id="documents-title".*?</svg>', page, re.S)
    assert bars
    assert bars[0].count("<rect") == sum(one.documents > 0 for one in lengths.bins)
    assert page == render(read_summary(hostile, verify=True), NOW), "the same folder gives the same page"


def test_what_is_left_out_is_said(hostile: Path) -> None:
    page = render(many_sources(read_summary(hostile)), NOW)
    assert page.count('<p class="caption">Training text') == 1
    assert len(re.findall('class="caption">[^<]*the largest 40, 20 more are left out', page)) == 2, "sources, licences"
    assert "the largest 200, 100 more are left out" in page


def test_a_card_of_a_damaged_folder_says_so(hostile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(hostile, folder)
    (folder / "train" / "shard-00001.tok.npy").unlink()
    assert main(["inspect", str(folder), f"html={tmp_path / 'card.html'}"]) == 2
    assert capsys.readouterr().err.startswith(f"{folder}/train/shard-00001.tok.npy: missing")
    assert f"DAMAGED: {folder}/train/shard-00001.tok.npy: missing" in (tmp_path / "card.html").read_text()


def test_a_page_that_cannot_be_written(hostile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The old one stays, whole, and nothing is left behind."""
    page = tmp_path / "card.html"
    page.write_text("old")
    for target, why in ((tmp_path / "nowhere" / "card.html", "No such file"), (tmp_path, "Is a directory")):
        assert main(["inspect", str(hostile), f"html={target}"]) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"html={target}: cannot be written: {why}"), err
        assert len(err.splitlines()) == 2
    assert page.read_text() == "old"
    assert os.listdir(tmp_path) == ["card.html"]
    assert main(["inspect", str(hostile), f"html={page}"]) == 0
    assert page.read_text().startswith("<!doctype html>")
    assert os.listdir(tmp_path) == ["card.html"]
