"""`gptscale bench data` in small: real processes, environments that are made or cannot be, and what it says of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from gptscale.bench import environments
from gptscale.bench.data import DataReport
from gptscale.bench.data_readers import READERS, LargeSamples, ReaderSamples, ReadingSamples
from gptscale.bench.data_report import to_json, to_text
from gptscale.bench.data_turns import OURS, Turns
from gptscale.bench.environment import Environment
from gptscale.bench.environments import NotAvailableError, peer_python, pinned, pins_file
from gptscale.bench.readers.common import COMPARED_BATCHES, LEAST_TIMED_S, Ordered, Pass, Resumed
from gptscale.bench.readers.limits import COPIES, READS, WIDENS
from gptscale.bench.readers.tokenisers import Encoded
from gptscale.cli import bench as cli
from gptscale.config.schema import BenchDataConfig
from gptscale.runtime.errors import UserError


def environment_of_ours(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand our own interpreter, which has Hugging Face's datasets and sentencepiece, in for one of a peer's."""
    python = folder / name
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    known = environments.peer_python

    def found(asked: str, *rest: object) -> Path:
        return python if asked == name else known(asked, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr("gptscale.bench.data_turns.peer_python", found)


def test_readers_are_measured_and_what_does_not_resume_exactly_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    environment_of_ours("huggingface", tmp_path, monkeypatch)
    output = tmp_path / "data.json"
    arguments = [
        "bench.rounds=1",
        "bench.tokens=200_000",
        "bench.sequence_length=32",
        "bench.vocab_size=500",
        "bench.text_bytes=300_000",
        "bench.readers=[hf-stream]",
        "bench.tokenisers=[none]",
        f"bench.folder={tmp_path}",
        f"bench.output={output}",
    ]
    assert cli.run(["data", *arguments]) == 0
    text, found = capsys.readouterr().out, json.loads(output.read_text())
    assert list(found["readers"]) == [OURS, "hf-stream"]
    ours, stream = found["readers"][OURS], found["readers"]["hf-stream"]
    assert ours["exact"] is True
    # Its buffer is not saved: rows that were in it are lost, and others come in their place.
    assert stream["exact"] is False
    batches = 200_000 // 32 // 8 * 97 // 100
    for samples, least in ((ours, 1), (stream, 0)):  # the corpus again and again, until it took a second
        (one,) = samples["passes"]
        assert one["wall_s"] >= LEAST_TIMED_S
        again, rest = divmod(one["tokens"] // (8 * 32) - (batches - 1 - COMPARED_BATCHES), batches - 1)
        assert again >= least
        assert rest == 0
    assert ours["order"]["samples"] == 10**12 // 4096
    assert found["large"]["shards"] == 932
    assert found["large"]["resumes"][0]["opened_s"] > 0
    assert all(rate > 0 for rates in found["limits"].values() for rate in rates)
    assert found["versions"] == {"datasets": pinned("huggingface")["datasets"]}
    lines = {line.split("  ")[0]: line for line in text.splitlines()}
    assert lines[OURS].endswith("yes")
    assert lines["hf-stream"].endswith("NO")
    assert "gptscale on 1e+12 tokens in 932 shards" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.json", "huggingface"], "the corpora are gone"


def test_tokenizers_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of them count the same text, and sentencepiece alone the same tokens but for the ends of documents."""
    environment_of_ours("tokenisers", tmp_path, monkeypatch)
    output = tmp_path / "data.json"
    arguments = ["bench.rounds=1", "bench.vocab_size=500", "bench.text_bytes=2_000_000", "bench.readers=[none]"]
    named = ["bench.tokenisers=[sentencepiece,tokenizers]", f"bench.folder={tmp_path}", f"bench.output={output}"]
    assert cli.run(["data", *arguments, *named]) == 0
    found = json.loads(output.read_text())["tokenisers"]
    (ours,), (alone,), (byte_level,) = (found[name] for name in (OURS, "sentencepiece", "tokenizers"))
    assert ours["text_bytes"] == alone["text_bytes"] == byte_level["text_bytes"] >= 2_000_000
    documents = ours["tokens"] - alone["tokens"]
    assert 0 < documents < 1000
    assert 0 < byte_level["tokens"] < byte_level["text_bytes"]
    assert "sentencepiece: sentencepiece alone" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["bench.readers=[litdta]"], "bench.readers: there is no 'litdta'"),
        (["bench.tokenisers=[x]"], "bench.tokenisers: there is no 'x'"),
        (["bench.tokens=1000", "bench.vocab_size=500", "bench.text_bytes=300_000"], "too few to measure"),
        (["bench.rounds=0"], "bench.rounds=0 is below 1"),
        (["bench.vocab_size=70000"], "does not fit ids of two bytes"),
        (["bench.folder=/nosuch"], "there is no such folder"),
        (["bench.output=/nosuch/file"], "bench.output=/nosuch/file cannot be written"),
    ],
)
def test_mistakes(arguments: list[str], says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        cli.run(["data", f"bench.folder={tmp_path}", *arguments])
    assert says in str(error.value)
    assert len(str(error.value).splitlines()) == 2
    assert not list(tmp_path.iterdir())


def test_an_environment_that_cannot_be_made_is_named_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pins = tmp_path / "pins.txt"
    pins.write_text("a-package-that-there-is-not==1.0\n")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setattr(environments, "pins_file", lambda _: pins)
    said: list[str] = []
    with pytest.raises(NotAvailableError, match=r"pip could not install it: ERROR: .*a-package-that-there-is-not"):
        peer_python("peer", tmp_path / "environments", said.append)
    assert len(said) == 1
    pins.write_text("")  # another key, so another environment
    python = peer_python("peer", tmp_path / "environments", said.append)
    assert python.exists()
    assert peer_python("peer", tmp_path / "environments", said.append) == python
    assert len(said) == 2, "the second time it is there"


def test_an_environment_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NotAvailableError, match="cannot be made: Not a directory"):
        peer_python("litdata", tmp_path / "file/environments", lambda _: None)


def test_a_process_that_fails_says_why(tmp_path: Path) -> None:
    turns = Turns(tmp_path, tmp_path, lambda _: None)
    with pytest.raises(NotAvailableError, match="build failed: ModuleNotFoundError: No module named 'streaming'"):
        turns.take(None, "mosaicml", "build", work=None)


def test_every_environment_pins_what_it_is_made_for() -> None:
    for name in {one.environment for one in READERS.values()} - {None} | {"tokenisers"}:
        assert pinned(str(name))
        lines = pins_file(str(name)).read_text().splitlines()
        assert lines
        assert all(len(line.split("==")) == 2 for line in lines)


def a_pass(tokens_per_s: float, digest: str = "a") -> Pass:
    return Pass("flags", 0.2, 0.01, 1000, 1000 / tokens_per_s, 2000 / tokens_per_s, 5_000_000, digest)


def test_the_report_of_made_up_figures() -> None:
    """Ratios are within a round, so that a round that was slow for all changes none."""
    ours = ReaderSamples([a_pass(400e6), a_pass(200e6), a_pass(400e6)], [Resumed(0.2, 0.03, "a")] * 3)
    ours.order = Ordered(244_140_625, 0.02, 8_000_000)
    peer = ReaderSamples([a_pass(40e6), a_pass(20e6), a_pass(80e6)], [Resumed(0.2, 0.03, "b")] * 3)
    peer.order = Ordered(4_882_812, 2.0, 100_000_000)
    encoded = [Encoded(4_000_000, 1_000_000, 1.0, 1.0)] * 3
    report = DataReport(
        bench=BenchDataConfig(rounds=3),
        environment=Environment(
            "today", "gptscale bench data", "1", "3", "2", "0", None, "a CPU", 2, "cpu", 1, 1, "glibc", 0.0, 1.0
        ),
        reading=ReadingSamples(
            {OURS: ours, "litdata": peer},
            LargeSamples(932, [a_pass(1e6)] * 3, [Resumed(0.2, 0.04, "a")] * 3),
            {READS: [1000e6] * 3, WIDENS: [800e6, 400e6, 800e6], COPIES: [100e6] * 3},
        ),
        tokenisers={OURS: encoded, "tiktoken": [Encoded(4_000_000, 900_000, 0.5, 0.5)] * 3},
        versions={"litdata": "0"},
        left_out={"mosaicml-streaming": "pip could not install it"},
    )
    text = to_text(report)
    rows = [line.split() for line in text.splitlines()]
    assert [OURS, "400", "200", "200", "ms", "10", "ms", "5", "MB", "30", "ms", "yes"] in rows
    assert ["litdata", "40", "10.0", "20", "10.0", "200", "ms", "10", "ms", "5", "MB", "30", "ms", "NO"] in rows
    assert "gptscale reaches 50% of the slower of page-cache reads and widening ids" in text
    assert "litdata: 100 s, 5.0 GB (50 × what 4,882,812 samples took)" in text
    assert ["tiktoken", "8.00", "2.00", "1.80", "8.00", "2.00"] in rows
    assert "not run: mosaicml-streaming: pip could not install it" in text
    assert "doubtful" not in text
    assert to_json(report)["readers"]["litdata"]["exact"] is False
