"""Best-fit packing of text in a store: the plan comes with the shards, by way of the same cache, and is checked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from gptscale.config.schema import CorpusConfig
from gptscale.config.step_plan import StepPlan
from gptscale.data.cache import ShardCache
from gptscale.data.corpus import open_split
from gptscale.data.packing import PLAN, ensure_packed, packing_folder
from gptscale.data.stream import StepFeed, TrainingStream
from gptscale.runtime.errors import UserError
from gptscale.topology import split_batch
from tests.helpers.cache_worker import QUICK
from tests.helpers.processes import wait_until
from tests.helpers.s3 import S3, Proxy

LENGTH = 64


@pytest.fixture(scope="module")
def folder(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("packed") / "corpus"
    shutil.copytree(prepared, copy)
    ensure_packed(open_split(copy, "train"), LENGTH)
    return copy


@pytest.fixture(scope="module")
def address(s3: S3, folder: Path) -> str:
    return s3.upload(folder, "packed/corpus")


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(tmp_path / "cache", patience=QUICK)


def stream_of(path: str | Path, cache: ShardCache | None = None, **more: bool) -> TrainingStream:
    return TrainingStream(
        (CorpusConfig(str(path)),), LENGTH, 3, document_mask=True, boundary_loss=False, packed=True, cache=cache, **more
    )


@pytest.mark.parametrize("few", [False, True])
def test_packed_rows_are_those_of_the_folder(folder: Path, address: str, cache: ShardCache, few: bool) -> None:
    there, here = stream_of(address, cache, few=few), stream_of(folder)
    assert there.identity == here.identity
    assert there.samples_per_epoch == here.samples_per_epoch > 100
    for start in range(0, there.samples_per_epoch, 200 if few else 40):  # a row of a few costs several requests
        positions = np.arange(start, min(start + 40, there.samples_per_epoch))
        found, expected = there.read(positions), here.read(positions)
        for name in ("tokens", "used", "starts"):
            assert np.array_equal(getattr(found, name), getattr(expected, name)), name
        shown = positions[:4] if few else positions
        left, right = there.trace(shown), here.trace(shown)
        assert [one._replace(corpus=None) for one in left] == [one._replace(corpus=None) for one in right]  # type: ignore[arg-type]
    assert bool(list(cache.folder.glob("*.npy"))) is not few, "a look keeps nothing"


def test_every_file_is_fetched_once_and_ahead_of_its_need(folder: Path, address: str, cache: ShardCache) -> None:
    stream, here = stream_of(address, cache), stream_of(folder)
    shards = len(open_split(folder, "train").manifest.shards)
    plan, split = StepPlan(4, LENGTH), split_batch(4, 2, 1)
    with StepFeed(stream, plan, split, 0, 0) as feed, StepFeed(here, plan, split, 0, 0) as expected:
        needed = {wanted.digest for step in range(20) for wanted in stream.wanted(np.arange(4 * step, 4 * step + 4))}
        assert len(needed) == 3 * shards > 6
        wait_until(lambda: all(cache.path(digest).exists() for digest in needed), "plans and shards read ahead", 10)
        for _ in range(20):
            assert next(feed).sample_hash == next(expected).sample_hash


def test_a_cache_that_holds_little_is_enough(folder: Path, address: str, tmp_path: Path) -> None:
    largest = max(path.stat().st_size for path in (folder / "train").rglob("*.npy"))
    cache = ShardCache(tmp_path / "small", 2 * largest, patience=QUICK)
    there, here = stream_of(address, cache), stream_of(folder)
    plan, split = StepPlan(4, LENGTH), split_batch(4, 2, 1)
    with StepFeed(there, plan, split, 0, 0) as feed, StepFeed(here, plan, split, 0, 0) as expected:
        for _ in range(15):
            assert next(feed).sample_hash == next(expected).sample_hash


def test_wrong_bytes_of_a_plan_are_fetched_again(folder: Path, address: str, cache: ShardCache, proxy: Proxy) -> None:
    faults = [proxy.fault("flip", "piece.npy", times=2), proxy.fault("flip", "row.npy")]
    there, here = stream_of(address, cache), stream_of(folder)
    positions = np.arange(60)
    assert np.array_equal(there.rows(positions), here.rows(positions))
    assert all(fault.times == 0 for fault in faults), "they happened"


def test_a_plan_that_is_not_right_is_named(s3: S3, folder: Path, tmp_path: Path, cache: ShardCache) -> None:
    def says(copy: Path, name: str) -> str:
        with pytest.raises(UserError) as error:
            stream_of(s3.upload(copy, f"unpacked/{name}"), cache)
        message = str(error.value)
        assert len(message.splitlines()) == 2, message
        assert f"/{name}/train/packing/best-fit-{LENGTH}/" in message
        return message

    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    packed = packing_folder(open_split(copy, "train"), LENGTH)
    victim = packed / "shard-00001.piece.npy"
    healthy = victim.read_bytes()
    victim.write_bytes(healthy[:-8])
    assert "shard-00001.piece.npy: missing, or not of" in says(copy, "short")
    victim.unlink()
    assert "shard-00001.piece.npy: missing, or not of" in says(copy, "gone")
    victim.write_bytes(healthy)
    plan = json.loads((packed / PLAN).read_text())
    (packed / PLAN).write_text(json.dumps(plan | {"corpus": "0" * 64}))
    assert "a plan for other shards" in says(copy, "foreign")
    (packed / PLAN).write_text("{")
    assert "damaged" in says(copy, "damaged")
    (packed / PLAN).unlink()
    assert f"data.sequence_length={LENGTH}; or set data.packing=cut" in says(copy, "unplanned")
