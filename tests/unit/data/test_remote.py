"""Corpora in a store, from a real S3 server, with what networks and stores do to transfers."""

from __future__ import annotations

import itertools
import json
import shutil
import threading
import time
from collections import deque
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest

from gptscale.config.schema import CorpusConfig, DataConfig, SourceConfig, TokenizerConfig
from gptscale.config.step_plan import StepPlan
from gptscale.data import transfer
from gptscale.data.cache import ShardCache
from gptscale.data.heldout import HeldoutBatches
from gptscale.data.prepare import prepare
from gptscale.data.remote import cache_for, open_corpus
from gptscale.data.remote_rows import RemoteRowReader, row_reader
from gptscale.data.rows import RowReader
from gptscale.data.shards import Split, file_xxh3_128
from gptscale.data.stream import StepFeed, TrainingStream
from gptscale.data.transfer import Patience, until_stopped
from gptscale.evaluate.bigram import bigram_loss
from gptscale.runtime.errors import StoppedError, UserError
from gptscale.topology import split_batch
from gptscale.train.setup import warn_of_little_room
from tests.helpers.batches import wide
from tests.helpers.cache_worker import LENGTH, QUICK, bytes_in
from tests.helpers.processes import wait_until
from tests.helpers.s3 import S3, Kind, Proxy
from tests.helpers.text import contents, documents, write_jsonl


@pytest.fixture(scope="module")
def address(s3: S3, prepared: Path) -> str:
    return s3.upload(prepared, "corpora/mine")


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(tmp_path / "cache", patience=QUICK)


def reader(address: str, cache: ShardCache, split: Split = "train") -> RemoteRowReader:
    found = row_reader(open_corpus(address, split, cache=cache), LENGTH)
    assert isinstance(found, RemoteRowReader)
    return found


def assert_same_rows(remote: RowReader, prepared: Path) -> None:
    """All rows, in an order that goes back and forth between shards."""
    here = row_reader(open_corpus(prepared, "train"), LENGTH)
    rows = np.random.default_rng(0).permutation(here.count)
    for found, expected in zip(remote.read(rows), here.read(rows), strict=True):
        assert np.array_equal(found, expected)


def refused(address: str, cache: ShardCache) -> str:
    with pytest.raises(UserError) as error:
        open_corpus(address, "train", cache=cache)
    message = str(error.value)
    assert len(message.splitlines()) == 2, message
    return message


def test_rows_are_those_of_the_folder_and_each_shard_is_fetched_once(
    address: str, prepared: Path, cache: ShardCache, proxy: Proxy
) -> None:
    remote = reader(address, cache)
    assert not [name for name in proxy.fetched if ".npy" in name], "shards are fetched when they are needed"
    assert_same_rows(remote, prepared)
    assert_same_rows(reader(address, ShardCache(cache.folder, patience=QUICK)), prepared)
    fetched = [name for name in proxy.fetched if ".npy" in name]
    assert len(fetched) == len(remote.corpus.manifest.shards) == len(set(fetched)) > 2
    assert not list(cache.folder.glob("*.part"))


def test_a_rank_without_rows_reads_none(address: str, cache: ShardCache) -> None:
    rows, targets = reader(address, cache).read(np.arange(0))
    assert rows.shape == (0, LENGTH + 1)
    assert targets.shape == (0,)


@pytest.mark.parametrize("kind", ["stall", "refuse", "cut", "short", "flip"])
@pytest.mark.parametrize("part_bytes", [1 << 24, 5000])
def test_a_fault_in_transfer_costs_time_only(
    kind: Kind,
    part_bytes: int,
    address: str,
    prepared: Path,
    cache: ShardCache,
    proxy: Proxy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(transfer, "PART_BYTES", part_bytes)
    remote = reader(address, cache)
    faults = [proxy.fault(kind, "train/shard-00001.tok"), proxy.fault(kind, "train/shard-00003.tok")]
    assert_same_rows(remote, prepared)
    assert all(fault.met.is_set() for fault in faults)


@pytest.mark.parametrize(("kind", "says"), [("flip", "its xxh3-128 is"), ("short", "it ends at byte")])
def test_bytes_that_stay_wrong_stop_the_run_and_are_not_kept(
    kind: Kind, says: str, address: str, prepared: Path, cache: ShardCache, proxy: Proxy
) -> None:
    remote = reader(address, cache)
    shard = remote.corpus.manifest.shards[1]
    proxy.fault(kind, "train/shard-00001.tok", times=4)
    with pytest.raises(UserError) as error:
        assert_same_rows(remote, prepared)
    what, fix = str(error.value).splitlines()
    assert what.startswith(f"{address}/train/shard-00001.tok.npy: wrong bytes, fetched 4 times: ")
    assert says in what
    assert (shard.token_xxh3_128 if kind == "flip" else str(shard.token_bytes)) in what
    assert "put the right file there again" in fix
    assert sum("shard-00001.tok" in name for name in proxy.fetched) == 4
    assert not cache.path(shard.token_xxh3_128).exists()
    assert not list(cache.folder.glob("*.part"))
    assert_same_rows(remote, prepared)  # the faults are used up: nothing was left that harms


def test_a_store_that_never_answers_is_named(address: str, prepared: Path, cache: ShardCache, proxy: Proxy) -> None:
    patience = Patience(timeout_s=0.3, tries=3, first_wait_s=0.02)
    remote = reader(address, ShardCache(cache.folder, patience=patience))
    proxy.fault("stall", "train/shard-00000.tok", times=100)
    with pytest.raises(UserError) as error:
        assert_same_rows(remote, prepared)
    what, fix = str(error.value).splitlines()
    assert what == f"{address}/train/shard-00000.tok.npy: cannot be read: no answer in 0.3 s (3 tries)"
    assert "network" in fix
    assert not list(cache.folder.glob("*.part"))


def test_manifest_and_tokenizer_are_checked_too(address: str, prepared: Path, cache: ShardCache, proxy: Proxy) -> None:
    proxy.fault("flip", "train/manifest.json")
    proxy.fault("flip", "tokenizer.model")
    opened = open_corpus(address, "train", cache=cache)
    assert opened.manifest == open_corpus(prepared, "train").manifest
    assert opened.tokenizer_path.read_bytes() == (prepared / "tokenizer.model").read_bytes()
    opened.tokenizer_path.write_bytes(b"damaged")
    assert open_corpus(address, "train", cache=cache).tokenizer_path.read_bytes() != b"damaged"


def test_what_is_wrong_in_the_store_is_named_before_anything_is_read(
    s3: S3, prepared: Path, tmp_path: Path, cache: ShardCache, proxy: Proxy
) -> None:
    for number, (change, says) in enumerate(
        [
            (lambda copy: (copy / "train/manifest.json").unlink(), "manifest.json is missing"),
            (lambda copy: (copy / "train/shard-00002.end.npy").unlink(), "shard-00002.end.npy: missing"),
            (lambda copy: (copy / "train/shard-00002.tok.npy").open("ab").write(b"x"), "bytes where the manifest says"),
            (lambda copy: (copy / "train/shard-00009.tok.npy").write_bytes(b"x"), "does not list"),
            (lambda copy: (copy / "tokenizer.model").unlink(), "tokenizer.model: missing"),
            (lambda copy: (copy / "tokenizer.model").write_bytes(b"x"), "not the tokenizer that"),
            (lambda copy: (copy / "train/manifest.json").write_text("{"), "damaged"),
        ]
    ):
        shutil.copytree(prepared, tmp_path / f"copy-{number}")
        change(tmp_path / f"copy-{number}")  # type: ignore[no-untyped-call]
        # One of them through the network; listings of a folder are the same to the checks, and quicker.
        copy = tmp_path / f"copy-{number}"
        address = s3.upload(copy, "broken") if says.endswith("end.npy: missing") else f"file://{copy}"
        (cache.folder / f"{open_corpus(prepared, 'train').manifest.tokenizer_sha256}-tokenizer.model").unlink(True)
        message = refused(address, cache)
        assert says in message
        assert message.startswith(address)


def test_a_manifest_names_no_files_elsewhere(s3: S3, prepared: Path, tmp_path: Path, cache: ShardCache) -> None:
    shutil.copytree(prepared, tmp_path / "copy")
    path = tmp_path / "copy/train/manifest.json"
    manifest = json.loads(path.read_text())
    manifest["shards"][0]["token_xxh3_128"] = "../../../../somewhere"
    path.write_text(json.dumps(manifest))
    assert "a hash in it is none" in refused(s3.upload(tmp_path / "copy", "evil"), cache)


def test_other_addresses(prepared: Path, cache: ShardCache) -> None:
    memory = fsspec.filesystem("memory")
    for name, data in contents(prepared).items():
        memory.pipe(f"/corpora/{name}", data)
    for address in ("memory://corpora", f"file://{prepared}/"):
        assert_same_rows(reader(address, cache), prepared)
    assert "install" in refused("gs://bucket/corpus", cache)
    assert "Protocol not known: nosuch" in refused("nosuch://bucket/corpus", cache)
    assert "NoSuchBucket" in refused("s3://other/corpus", cache) or "missing" in refused("s3://other/corpus", cache)


def test_a_cache_that_holds_no_shard_and_a_folder_that_is_none(address: str, tmp_path: Path) -> None:
    small = ShardCache(tmp_path / "cache", limit_bytes=1000, patience=QUICK)
    assert refused(address, small).startswith("data.cache_bytes=1000 does not hold one shard of s3://")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"\nset data\.cache_dir"):
        ShardCache(tmp_path / "file/cache")
    assert cache_for(DataConfig(), ["corpora/mine"]) is None
    found = cache_for(DataConfig(corpora_dir=str(tmp_path), cache_bytes=7), ["corpora/mine", address])
    assert found is not None
    assert (found.folder, found.limit_bytes) == (tmp_path / "cache", 7)


def test_little_room_for_an_order_of_all_shards_is_said(
    address: str, cache: ShardCache, caplog: pytest.LogCaptureFixture
) -> None:
    stream = stream_of([address], cache)
    assert stream.remote_bytes == sum(shard.token_bytes for shard in stream._readers[0].corpus.manifest.shards) > 0
    whole = stream.sequences_in_remote_shard
    most = max(shard.tokens for shard in stream._readers[0].corpus.manifest.shards)
    assert whole == (most - 1) // stream.sequence_length
    block = DataConfig(cache_bytes=1000, order="block", block_sequences=whole)
    for data in (DataConfig(), DataConfig(cache_bytes=10**9), block):
        warn_of_little_room(data, stream)
        assert not caplog.records
    warn_of_little_room(DataConfig(cache_bytes=1000), stream)
    assert "data.cache_bytes=1000 holds a part of the" in caplog.text
    warn_of_little_room(replace(block, block_sequences=whole // 4), stream)
    assert f"begin with data.block_sequences={whole}" in caplog.text


def test_ids_beyond_the_vocabulary_are_found_by_verify(s3: S3, prepared: Path, tmp_path: Path) -> None:
    """In a shard whose hash is right: whoever made it, made it wrong."""
    copy = tmp_path / "copy"
    shutil.copytree(prepared, copy)
    path = copy / "train/shard-00001.tok.npy"
    ids = np.load(path)
    ids[-1] = 60_000
    np.save(path, ids)
    manifest = json.loads((copy / "train/manifest.json").read_text())
    manifest["shards"][1]["token_xxh3_128"] = file_xxh3_128(path)
    (copy / "train/manifest.json").write_text(json.dumps(manifest))
    address = s3.upload(copy, "beyond")
    rows = np.arange(reader(address, ShardCache(tmp_path / "a", patience=QUICK)).count)
    reader(address, ShardCache(tmp_path / "b", patience=QUICK)).read(rows)
    with pytest.raises(UserError, match=r"beyond/train/shard-00001.tok.npy: token id 60000 outside the vocabulary"):
        reader(address, ShardCache(tmp_path / "c", verify=True, patience=QUICK)).read(rows)


def test_a_damaged_copy_here(address: str, prepared: Path, cache: ShardCache, proxy: Proxy) -> None:
    """A size that is wrong is always seen; other bytes with data.verify."""
    remote = reader(address, cache)
    assert_same_rows(remote, prepared)
    first, second = (cache.path(shard.token_xxh3_128) for shard in remote.corpus.manifest.shards[:2])
    first.write_bytes(first.read_bytes()[:-1])
    assert_same_rows(remote, prepared)
    data = bytearray(second.read_bytes())
    data[-1] ^= 1
    second.write_bytes(data)
    proxy.forget()
    assert_same_rows(reader(address, ShardCache(cache.folder, verify=True, patience=QUICK)), prepared)
    assert sum(".npy" in name for name in proxy.fetched) == 1


@pytest.mark.parametrize("length", [32, 300])
def test_heldout_text(length: int, address: str, prepared: Path, cache: ShardCache) -> None:
    there, here = (HeldoutBatches(path, length, 4, 11, 0, 2, cache=cache) for path in (address, prepared))
    assert (there.loss_tokens, there.text_bytes, len(there)) == (here.loss_tokens, here.text_bytes, len(here))
    for found, expected in zip(map(wide, there), map(wide, here), strict=True):
        assert np.array_equal(found.inputs_BT, expected.inputs_BT)
        assert np.array_equal(found.targets_BT, expected.targets_BT)
    assert bigram_loss(address, length, 5, cache) == bigram_loss(prepared, length, 5)


def stream_of(paths: list[str], cache: ShardCache | None = None) -> TrainingStream:
    return TrainingStream(
        tuple(CorpusConfig(path, weight) for weight, path in enumerate(paths, 1)), LENGTH, 3, cache=cache
    )


def test_a_mixture_has_the_same_identity_and_samples(
    s3: S3, address: str, prepared: Path, tmp_path: Path, cache: ShardCache
) -> None:
    text = write_jsonl(tmp_path / "text.jsonl", documents(80, seed=5))
    data = DataConfig(sources=(SourceConfig(path=str(text)),), heldout_fraction=0.1)
    prepare(data, TokenizerConfig(path=str(prepared / "tokenizer.model")), tmp_path / "second")
    there, here = (
        stream_of([address, str(tmp_path / "second")], cache),
        stream_of([str(prepared), str(tmp_path / "second")]),
    )
    assert there.identity == here.identity
    split = split_batch(12, 2, 3)
    for rank in range(3):
        feeds = [StepFeed(one, StepPlan(12, LENGTH), split, rank, 24) for one in (there, here)]
        for _, found, expected in zip(range(20), *feeds, strict=False):
            assert found.sample_hash == expected.sample_hash
        for feed in feeds:
            feed.close()


def test_shards_are_there_before_they_are_needed(address: str, prepared: Path, cache: ShardCache) -> None:
    """The feed makes 4 steps ready; with one sample a step, what all next 64 need has come without being asked for."""
    stream = stream_of([address], cache)
    feed = StepFeed(stream, StepPlan(1, LENGTH), split_batch(1, 1, 1), 0, 0)
    with feed:
        needed = {wanted.digest for position in range(60) for wanted in stream.wanted(np.array([position]))}
        assert len(needed) == 4
        wait_until(lambda: all(cache.path(digest).exists() for digest in needed), "shards read ahead", 10)


def test_reading_ahead_keeps_within_its_half_of_the_cache(
    address: str, prepared: Path, tmp_path: Path, proxy: Proxy
) -> None:
    shards = open_corpus(prepared, "train").manifest.shards
    limit = 2 * max(shard.token_bytes for shard in shards)
    cache = ShardCache(tmp_path / "cache", limit, patience=QUICK)
    here, most = stream_of([str(prepared)]), 0
    plan, split = StepPlan(2, LENGTH), split_batch(2, 2, 1)
    feeds = [StepFeed(stream, plan, split, 0, 0) for stream in (stream_of([address], cache), here)]
    for _, found, expected in zip(range(40), *feeds, strict=False):
        assert found.sample_hash == expected.sample_hash
        most = max(most, bytes_in(cache.folder))
    for feed in feeds:
        feed.close()
    assert 0 < most <= limit + max(shard.token_bytes for shard in shards)


def test_a_shard_that_stays_wrong_is_fetched_so_often_and_no_oftener(
    address: str, cache: ShardCache, proxy: Proxy
) -> None:
    """Four times ahead of its need, and four when it is needed; many steps want it meanwhile."""
    proxy.fault("flip", "train/shard-00001.tok", times=1000)
    with StepFeed(stream_of([address], cache), StepPlan(1, LENGTH), split_batch(1, 1, 1), 0, 0) as feed:
        with pytest.raises(UserError, match="wrong bytes, fetched 4 times"):
            deque(feed, maxlen=0)
        assert 4 <= sum("train/shard-00001.tok" in name for name in proxy.fetched) <= 8


def test_a_feed_closes_while_it_waits_for_a_shard(address: str, cache: ShardCache, proxy: Proxy) -> None:
    stalled = ShardCache(cache.folder)  # with a minute's patience
    fault = proxy.fault("stall", ".tok.npy", times=100)
    feed = StepFeed(stream_of([address], stalled), StepPlan(4, LENGTH), split_batch(4, 4, 1), 0, 0)
    assert fault.met.wait(10)
    began_s = time.monotonic()
    feed.close()
    assert time.monotonic() - began_s < 2  # polls are 50 ms apart; the rest is for a busy machine
    assert not list(cache.folder.glob("*.part"))


def test_a_run_that_is_asked_to_stop_does_not_wait_for_a_stalled_shard(
    address: str, cache: ShardCache, proxy: Proxy
) -> None:
    asked = threading.Event()
    stalled = ShardCache(cache.folder, check=until_stopped(asked.is_set, grace_s=0.2))
    fault = proxy.fault("stall", ".tok.npy", times=100)
    with StepFeed(stream_of([address], stalled), StepPlan(4, LENGTH), split_batch(4, 4, 1), 0, 0) as feed:
        assert fault.met.wait(10)
        asked.set()
        began_s = time.monotonic()
        with pytest.raises(StoppedError):
            next(feed)
        assert time.monotonic() - began_s < 2  # the grace, polls, and a busy machine


def test_text_is_prepared_from_s3(s3: S3, tmp_path: Path) -> None:
    texts = documents(200)
    write_jsonl(tmp_path / "text/a.jsonl", texts[:120])
    write_jsonl(tmp_path / "text/deep/b.jsonl", texts[120:])
    there = s3.upload(tmp_path / "text", "text")
    for name, path in (("here", str(tmp_path / "text")), ("there", there)):
        prepare(DataConfig((SourceConfig(path=path),), workers=1), TokenizerConfig(vocab_size=400), tmp_path / name)
    assert contents(tmp_path / "here").keys() == contents(tmp_path / "there").keys()
    for (name, found), expected in zip(
        contents(tmp_path / "there").items(), contents(tmp_path / "here").values(), strict=True
    ):
        assert found == expected, name


def test_many_threads_of_a_process(address: str, prepared: Path, cache: ShardCache, proxy: Proxy) -> None:
    readers = [reader(address, cache) for _ in range(4)]
    failures: list[BaseException] = []

    def work(remote: RowReader) -> None:
        try:
            assert_same_rows(remote, prepared)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(remote,)) for remote in readers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    shards = [name for name in proxy.fetched if ".npy" in name]
    assert len(shards) == len(set(shards)), "a shard was fetched twice"
    assert list(itertools.chain(*[list(one._files) for one in readers])) == []
