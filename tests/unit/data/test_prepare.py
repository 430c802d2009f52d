from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gptscale.config.schema import DataConfig, FilterConfig, SourceConfig, TokenizerConfig
from gptscale.data.corpus import open_split
from gptscale.data.prepare import ProgressEvent, corpus_folder, ensure_prepared, prepare
from gptscale.data.shards import SPLITS
from gptscale.data.tokenise import identity_hash, is_heldout
from gptscale.runtime.errors import UserError
from gptscale.tokenizer import Tokenizer
from gptscale.tokenizer.train import train_tokenizer
from tests.helpers.text import contents, documents, stored_documents, write_jsonl

SMALL = TokenizerConfig(vocab_size=500)


def refusal(data: DataConfig, tokenizer: TokenizerConfig, target: Path) -> str:
    before = contents(target.parent)
    with pytest.raises(UserError) as caught:
        prepare(data, tokenizer, target)
    left = {name: data for name, data in contents(target.parent).items() if not name.endswith(".lock")}
    assert left == {name: data for name, data in before.items() if not name.endswith(".lock")}
    assert len(str(caught.value).splitlines()) == 2
    return str(caught.value)


# What comes out


def test_every_document_is_in_one_split_and_comes_back(tmp_path: Path) -> None:
    texts = [*documents(200, words=20), "", "odd \u2581 \x00 \r\n <|endoftext|>"]
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    data = DataConfig(sources=(SourceConfig(path=str(path), licence="CC0-1.0"),), heldout_fraction=0.2)
    done = prepare(data, SMALL, tmp_path / "out")
    train, heldout = (stored_documents(done.folder, split) for split in SPLITS)
    assert sorted(train + heldout) == sorted(text for text in texts if text)
    assert 20 < len(heldout) < 60
    for manifest, found in ((done.train, train), (done.heldout, heldout)):
        assert manifest.documents == len(found)
        assert manifest.text_bytes == sum(len(text.encode()) for text in found)
        assert manifest.tokens == sum(shard.tokens for shard in manifest.shards)
        assert [record.licence for record in manifest.parts] == ["CC0-1.0"]
        assert [record.source for record in manifest.parts] == ["jsonl"]
        assert (manifest.dtype, manifest.vocab_size) == ("<u2", 500)
    assert train == [text for text in texts if text in set(train)]
    assert set(contents(done.folder)) == {
        "tokenizer.model",
        *(
            f"{split}/{name}"
            for split in SPLITS
            for name in ("manifest.json", "shard-00000.tok.npy", "shard-00000.end.npy")
        ),
    }


def test_heldout_documents_depend_on_their_identity_alone(tmp_path: Path) -> None:
    texts = {f"{number}.txt": text for number, text in enumerate(documents(150, words=20))}
    (tmp_path / "text").mkdir()
    for name, text in texts.items():
        (tmp_path / "text" / name).write_text(text)
    expected = sorted(text for name, text in texts.items() if is_heldout(identity_hash(name), 0.2))
    source = SourceConfig(path=str(tmp_path / "text"))
    prepare(DataConfig(sources=(source,), heldout_fraction=0.2), SMALL, tmp_path / "a")
    other = DataConfig(sources=(source,), heldout_fraction=0.2, shard_tokens=999)
    prepare(other, TokenizerConfig(vocab_size=700), tmp_path / "b")
    assert sorted(stored_documents(tmp_path / "a", "heldout")) == expected
    assert sorted(stored_documents(tmp_path / "b", "heldout")) == expected
    # Text that comes later moves nothing to the other side.
    (tmp_path / "text/more.txt").write_text("more")
    prepare(DataConfig(sources=(source,), heldout_fraction=0.2), SMALL, tmp_path / "c")
    assert set(expected) <= set(stored_documents(tmp_path / "c", "heldout"))


def test_the_tokenizer_sees_nothing_that_is_held_out(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for number, text in enumerate(documents(100, words=20)):
        held_out = is_heldout(identity_hash(f"{number}.txt"), 0.3)
        (tmp_path / f"text/{number}.txt").write_text(text.upper() if held_out else text)
    data = DataConfig(sources=(SourceConfig(path=str(tmp_path / "text")),), heldout_fraction=0.3)
    prepare(data, SMALL, tmp_path / "out")
    tokenizer = Tokenizer.load(tmp_path / "out/tokenizer.model")
    assert len(tokenizer.encode("ABCDE")) == 5
    assert tokenizer.byte_lengths().max() > 3


def test_shards_hold_at_most_shard_tokens_and_end_with_documents(tmp_path: Path) -> None:
    texts = [*documents(60, words=30), "long " * 3000, *documents(10, words=30, seed=1)]
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    source = (SourceConfig(path=str(path)),)
    whole = prepare(DataConfig(sources=source, heldout_fraction=0.1), SMALL, tmp_path / "whole")
    cut = prepare(DataConfig(sources=source, heldout_fraction=0.1, shard_tokens=1000), SMALL, tmp_path / "cut")
    assert len(whole.train.shards) == 1 < 5 < len(cut.train.shards)
    assert max(shard.tokens for shard in cut.train.shards) <= 1000
    joined = [np.load(path) for path in sorted((tmp_path / "cut/train").glob("*.tok.npy"))]
    assert np.array_equal(np.concatenate(joined), np.load(tmp_path / "whole/train/shard-00000.tok.npy"))
    assert cut.train.documents == whole.train.documents
    open_split(tmp_path / "cut", "train", verify=True)


def test_the_number_of_workers_changes_nothing(big_text: Path, tmp_path: Path) -> None:
    results = []
    for workers in (1, 3):
        data = DataConfig(sources=(SourceConfig(path=str(big_text)),), workers=workers, shard_tokens=100_000)
        prepare(data, TokenizerConfig(vocab_size=600, training_bytes=300_000), tmp_path / str(workers))
        results.append(contents(tmp_path / str(workers)))
    assert results[0] == results[1]
    assert len([name for name in results[0] if name.endswith(".tok.npy")]) > 3


def test_a_tokenizer_that_is_given_is_used_as_it_is(tmp_path: Path) -> None:
    trained = train_tokenizer(documents(50), 350, tmp_path / "mine.model")
    path = write_jsonl(tmp_path / "a.jsonl", documents(100, words=10))
    data = DataConfig(sources=(SourceConfig(path=str(path)),), heldout_fraction=0.2)
    done = prepare(data, TokenizerConfig(vocab_size=4096, path=str(tmp_path / "mine.model")), tmp_path / "out")
    assert done.train.vocab_size == 350
    assert done.train.tokenizer_sha256 == trained.sha256
    assert "none.model" in refusal(data, TokenizerConfig(path=str(tmp_path / "none.model")), tmp_path / "out2")


def test_the_identity_is_the_contents_not_the_place(tmp_path: Path) -> None:
    identities = []
    for place in ("here", "there"):
        path = write_jsonl(tmp_path / place / "a.jsonl", documents(100, words=10))
        data = DataConfig(sources=(SourceConfig(path=str(path), licence=place),), heldout_fraction=0.2)
        identities.append(prepare(data, SMALL, tmp_path / f"out-{place}").train.identity)
    assert identities[0] == identities[1]
    path = write_jsonl(tmp_path / "changed.jsonl", [*documents(100, words=10), "one more"])
    data = DataConfig(sources=(SourceConfig(path=str(path)),), heldout_fraction=0.2)
    assert prepare(data, SMALL, tmp_path / "out").train.identity != identities[0]


def test_several_sources_follow_one_another(tmp_path: Path) -> None:
    first = write_jsonl(tmp_path / "first.jsonl", documents(60, words=10))
    second = write_jsonl(tmp_path / "second.jsonl", documents(60, words=10, seed=1))
    sources = (SourceConfig(path=str(second)), SourceConfig(path=str(first)))
    done = prepare(DataConfig(sources=sources, heldout_fraction=0.2), SMALL, tmp_path / "out")
    assert [record.name for record in done.train.parts] == ["second.jsonl", "first.jsonl"]
    ordered = documents(60, words=10, seed=1) + documents(60, words=10)
    train = stored_documents(tmp_path / "out", "train")
    assert train == [text for text in ordered if text in set(train)]


def test_of_a_file_that_is_read_in_stretches_there_is_one_record(tmp_path: Path) -> None:
    texts = documents(4000, words=60)
    for name in ("a", "b"):
        write_jsonl(tmp_path / "text" / f"{name}.jsonl", [*texts, "short"])
    events: list[ProgressEvent] = []
    data = DataConfig((SourceConfig(path=str(tmp_path / "text")),), workers=1, filters=FilterConfig(min_characters=20))
    done = prepare(data, SMALL, tmp_path / "out", events.append)
    assert events[-1].parts >= 4, "stretches"
    for manifest in (done.train, done.heldout):
        assert [record.name for record in manifest.parts] == ["a.jsonl", "b.jsonl"]
        assert manifest.tokens == sum(record.tokens for record in manifest.parts)
        assert manifest.documents == sum(record.documents for record in manifest.parts)
    both = zip(done.train.parts, done.heldout.parts, strict=True)
    for removed in ([*train.removed, *heldout.removed] for train, heldout in both):
        assert [(one.reason, one.documents, one.text_bytes) for one in removed] == [("too_short", 1, len("short"))]
    assert sum(record.documents for manifest in (done.train, done.heldout) for record in manifest.parts[:1]) == 4000


def test_progress_tells_stages_parts_and_tokens(big_text: Path, tmp_path: Path) -> None:
    events: list[ProgressEvent] = []
    data = DataConfig(sources=(SourceConfig(path=str(big_text)),), workers=1, shard_tokens=20_000)
    done = prepare(data, TokenizerConfig(vocab_size=500, training_bytes=100_000), tmp_path / "out", events.append)
    parts = events[-1].parts
    shards = len(done.train.shards) + len(done.heldout.shards)
    assert shards > 5
    assert list(dict.fromkeys(event.stage for event in events)) == ["tokenizer", "tokenise", "merge", "done"]
    tokenising = [event for event in events if event.stage == "tokenise"]
    # On a slow machine some come while a part is at work.
    assert list(dict.fromkeys(event.parts_done for event in tokenising)) == list(range(parts + 1))
    assert [event.bytes_done for event in tokenising] == sorted(event.bytes_done for event in tokenising)
    assert tokenising[-1].bytes_done == tokenising[-1].bytes == sum(path.stat().st_size for path in big_text.iterdir())
    assert [(event.parts_done, event.parts) for event in events if event.stage == "merge"] == [
        (written, shards) for written in range(shards + 1)
    ]
    assert events[-1].tokens == tokenising[-1].tokens == done.train.tokens + done.heldout.tokens


# What is refused, with nothing left behind


def test_sources_that_give_nothing_are_refused(tmp_path: Path) -> None:
    assert "data.sources is empty" in refusal(DataConfig(), SMALL, tmp_path / "out")
    empty = write_jsonl(tmp_path / "text/empty.jsonl", [])
    for texts in ([], ["", ""]):
        write_jsonl(empty, texts)
        data = DataConfig(sources=(SourceConfig(path=str(empty)),))
        assert "no text" in refusal(data, SMALL, tmp_path / "out")


def test_a_split_without_documents_is_refused_with_a_fraction_that_works(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "text/a.jsonl", documents(10))
    data = DataConfig(sources=(SourceConfig(path=str(path)),), heldout_fraction=1e-4)
    message = refusal(data, SMALL, tmp_path / "out")
    assert "holds out none of the 10 documents" in message
    enough = float(message.split("heldout_fraction=")[-1].split(" ")[0])
    prepare(replace(data, heldout_fraction=enough), SMALL, tmp_path / "out")
    assert len(stored_documents(tmp_path / "out", "heldout")) == 1
    for fraction in (0.0, 1.0, -1.0):
        message = refusal(replace(data, heldout_fraction=fraction), SMALL, tmp_path / "out2")
        assert f"data.heldout_fraction={fraction}" in message
    write_jsonl(path, documents(1))
    assert "one document" in refusal(data, SMALL, tmp_path / "out2")
    trained = tmp_path / "text/t.model"
    train_tokenizer(documents(10), 500, trained)
    almost = replace(data, heldout_fraction=1 - 1e-9)
    write_jsonl(path, documents(3))
    assert "holds out all" in refusal(almost, TokenizerConfig(path=str(trained)), tmp_path / "out2")


def test_unequal_weights_point_to_data_path(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "text/a.jsonl", documents(10))
    sources = (SourceConfig(path=str(path), weight=2.0), SourceConfig(path=str(path)))
    assert "data.path a list of {path, weight}" in refusal(DataConfig(sources=sources), SMALL, tmp_path / "out")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_line_stops_everything_wherever_it_is_found(big_text: Path, tmp_path: Path, workers: int) -> None:
    bad = tmp_path / "text"
    bad.mkdir()
    for path in big_text.iterdir():
        (bad / path.name).write_bytes(path.read_bytes())
    with (bad / "7.jsonl").open("a") as file:
        file.write("{}\n")
    data = DataConfig(sources=(SourceConfig(path=str(bad)),), workers=workers)
    with pytest.raises(UserError, match=re.escape(f"{bad / '7.jsonl'}:91: no 'text' field")):
        prepare(data, TokenizerConfig(vocab_size=500, training_bytes=50_000), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_target_that_is_in_use_is_refused(prepared: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "text/a.jsonl", documents(50))
    data = DataConfig(sources=(SourceConfig(path=str(path)),), heldout_fraction=0.2)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("important")
    assert "exists already" in refusal(data, SMALL, tmp_path / "mine")
    (tmp_path / "file").write_text("x")
    assert "exists already" in refusal(data, SMALL, tmp_path / "file")
    (tmp_path / "empty").mkdir()
    prepare(data, SMALL, tmp_path / "empty")
    assert "exists already (prepared text)" in refusal(data, SMALL, tmp_path / "empty")
    assert (tmp_path / "mine/thesis.txt").read_text() == "important"


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", documents(10))
    data = DataConfig(sources=(SourceConfig(path=str(path)),))
    for target in (path / "out", path / "deep" / "out"):
        with pytest.raises(UserError, match="cannot write there"):
            prepare(data, SMALL, target)


def test_progress_may_stop_it(tmp_path: Path) -> None:
    class EnoughError(Exception):
        pass

    path = write_jsonl(tmp_path / "text/a.jsonl", documents(100))
    for moment in ("tokenizer", "tokenise", "merge"):

        def stop(event: ProgressEvent, moment: str = moment) -> None:
            if event.stage == moment:
                raise EnoughError

        with pytest.raises(EnoughError):
            prepare(DataConfig(sources=(SourceConfig(path=str(path)),)), SMALL, tmp_path / "out", stop)
        assert not (tmp_path / "out").exists()
        assert (tmp_path / ".out.partial").exists() is (moment == "merge"), "a finished part is kept, and nothing less"


def test_file_names_that_are_not_utf8_do_no_harm(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path / "text")
    os.mkdir(folder)
    for number, text in enumerate(documents(40, words=20)):
        with open(folder + b"/%d-\xff.txt" % number, "w") as file:
            file.write(text)
    data = DataConfig(sources=(SourceConfig(path=str(tmp_path / "text")),), heldout_fraction=0.3)
    done = prepare(data, SMALL, tmp_path / "out")
    assert done.train.documents + done.heldout.documents == 40


# Where it goes


def test_the_folder_is_named_by_all_that_decides_the_contents(tmp_path: Path) -> None:
    base = DataConfig(sources=(SourceConfig(path="data/My Stories.jsonl"),), corpora_dir=str(tmp_path))
    name = corpus_folder(base, SMALL).name
    assert name.startswith("My-Stories-")
    assert len(name.rsplit("-", 1)[1]) == 12
    same = [
        replace(base, workers=7, sequence_length=99, verify=True),
        replace(base, sources=(replace(base.sources[0], weight=2.0, licence="MIT"),)),
    ]
    assert {corpus_folder(data, SMALL).name for data in same} == {name}
    different = [
        (replace(base, sources=(SourceConfig(path="data/other.jsonl"),)), SMALL),
        (replace(base, sources=(replace(base.sources[0], text_key="body"),)), SMALL),
        (replace(base, sources=base.sources * 2), SMALL),
        (replace(base, heldout_fraction=0.5), SMALL),
        (replace(base, shard_tokens=5), SMALL),
        (base, TokenizerConfig(vocab_size=501)),
        (base, TokenizerConfig(path="mine.model")),
    ]
    names = {corpus_folder(data, tokenizer).name for data, tokenizer in different}
    assert len(names) == len(different)
    assert name not in names
    stdlib = DataConfig(sources=(SourceConfig(format="stdlib"),))
    assert corpus_folder(stdlib, SMALL).name.startswith("stdlib-")


def test_what_a_process_killed_in_its_cleaning_up_left_is_removed(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", documents(60))
    data = DataConfig((SourceConfig(path=str(path)),), heldout_fraction=0.2, workers=1, corpora_dir=str(tmp_path / "c"))
    folder = ensure_prepared(data, SMALL)
    left = folder.parent / f".{folder.name}.partial"
    (left / "parts").mkdir(parents=True)
    (left / "parts" / "a.tok").write_bytes(b"x" * 100)
    before = contents(folder)
    assert ensure_prepared(data, SMALL) == folder
    assert not left.exists()
    left.mkdir()
    with pytest.raises(UserError, match="exists already"):
        prepare(data, SMALL, folder)
    assert not left.exists()
    assert contents(folder) == before


def test_ensure_prepared_prepares_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", documents(100, words=20))
    data = DataConfig(sources=(SourceConfig(path=str(path)),), heldout_fraction=0.2, corpora_dir=str(tmp_path / "c"))
    folder = ensure_prepared(data, SMALL)
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    assert ensure_prepared(data, SMALL) == folder
    assert not caplog.records
    path.touch()
    assert ensure_prepared(data, SMALL) == folder
    assert f"{path} changed after it was prepared: remove {folder}" in caplog.text
    path.unlink()
    assert ensure_prepared(data, SMALL) == folder
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == before
