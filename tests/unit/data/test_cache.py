"""One cache and many who use it: what is in use stays, what is not gives room, and the dead hold nothing up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import xxhash

from gptscale.data.cache import ShardCache, Wanted
from gptscale.data.corpus import read_manifest
from gptscale.data.transfer import RemoteStore
from gptscale.runtime.locks import FileLock
from tests.helpers.cache_worker import QUICK, bytes_in
from tests.helpers.processes import REPOSITORY, wait_until
from tests.helpers.s3 import S3, Kind, Proxy

SIZE = 1000


@pytest.fixture
def shards(tmp_path: Path) -> list[Wanted]:
    """Ten objects of 1000 bytes; their content is of no interest to a cache."""
    (tmp_path / "store").mkdir()
    store = RemoteStore(f"file://{tmp_path}/store", QUICK)
    found = []
    for number in range(10):
        data = bytes([number]) * SIZE
        (tmp_path / f"store/{number}").write_bytes(data)
        found.append(Wanted(store, str(number), SIZE, xxhash.xxh3_128_hexdigest(data)))
    return found


def used(cache: ShardCache, wanted: Wanted) -> None:
    descriptor = cache.hold(wanted)
    assert os.pread(descriptor, SIZE + 1, 0) == bytes([int(wanted.name)]) * SIZE
    cache.release(descriptor)


def there(cache: ShardCache, shards: list[Wanted]) -> list[int]:
    return [number for number, wanted in enumerate(shards) if cache.path(wanted.digest).exists()]


def test_what_was_used_least_lately_gives_room(tmp_path: Path, shards: list[Wanted]) -> None:
    cache = ShardCache(tmp_path / "cache", limit_bytes=3 * SIZE, patience=QUICK)
    for number in (0, 1, 2, 0, 3):
        used(cache, shards[number])
    assert there(cache, shards) == [0, 2, 3]
    for number in (2, 4, 5):
        used(cache, shards[number])
    assert there(cache, shards) == [2, 4, 5]


def test_what_is_in_use_stays_and_the_limit_gives_way_by_one(tmp_path: Path, shards: list[Wanted]) -> None:
    one, other = (ShardCache(tmp_path / "cache", limit_bytes=2 * SIZE, patience=QUICK) for _ in range(2))
    held = [one.hold(shards[0]), one.hold(shards[1])]
    beyond = other.hold(shards[2])
    assert there(one, shards) == [0, 1, 2]
    assert not other.fetch_ahead(shards[3]), "reading ahead is not worth going beyond the limit"
    assert other.fetch_ahead(shards[2])
    other.release(beyond)
    used(other, shards[3])
    assert there(one, shards) == [0, 1, 3]
    for descriptor in held:
        one.release(descriptor)
    used(other, shards[4])
    assert bytes_in(one.folder) == 2 * SIZE


def test_beyond_the_limit_threads_of_a_process_take_turns(tmp_path: Path, shards: list[Wanted]) -> None:
    other = ShardCache(tmp_path / "cache", limit_bytes=SIZE, patience=QUICK)
    held = other.hold(shards[0])
    cache = ShardCache(tmp_path / "cache", limit_bytes=SIZE, patience=QUICK)
    mine = cache.hold(shards[1])
    thread = threading.Thread(target=used, args=(cache, shards[2]))
    thread.start()
    thread.join(0.3)
    assert thread.is_alive()
    assert bytes_in(cache.folder) == 2 * SIZE
    cache.release(mine)
    thread.join(10)
    assert not thread.is_alive()
    other.release(held)


def test_what_a_dead_process_left_is_removed(tmp_path: Path, shards: list[Wanted]) -> None:
    cache = ShardCache(tmp_path / "cache", limit_bytes=None, patience=QUICK)
    left = cache.folder / f"{shards[0].digest}.1-00000000.part"
    left.write_bytes(b"x" * 500)
    used(cache, shards[1])
    assert not left.exists()


def test_a_shard_that_another_fetches_is_waited_for(tmp_path: Path, shards: list[Wanted]) -> None:
    """Until it is there, or its process has shown no sign of life for longer than any store is borne with."""
    cache = ShardCache(tmp_path / "cache", patience=QUICK)
    lock = FileLock(cache.folder / f"{shards[0].digest}.lock")
    lock.acquire(blocking=False)
    assert cache.fetch_ahead(shards[0]), "on its way"
    assert there(cache, shards) == []
    thread = threading.Thread(target=used, args=(cache, shards[0]))
    thread.start()
    thread.join(0.3)
    assert thread.is_alive()
    thread.join(2 * (QUICK.timeout_s + QUICK.longest_wait_s) + 10)
    assert not thread.is_alive()
    assert there(cache, shards) == [0]
    lock.release()


class Worker:
    """`tests.helpers.cache_worker` in a process of its own."""

    def __init__(self, address: str, local: Path, folder: Path, limit: int = 0, seed: int = 0, reads: int = 15) -> None:
        arguments = [address, str(local), str(folder), str(limit), str(seed), str(reads)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.cache_worker", *arguments],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def most_bytes(self) -> int:
        out, err = self.process.communicate(timeout=60)
        assert self.process.returncode == 0, err
        return int(out)


def test_processes_share_a_cache_that_holds_one_shard(s3: S3, proxy: Proxy, prepared: Path, tmp_path: Path) -> None:
    address = s3.upload(prepared, "corpus")
    largest = max(shard.token_bytes for shard in read_manifest(prepared, "train").shards)
    kinds: tuple[Kind, ...] = ("flip", "cut", "short", "refuse")
    for kind in kinds:
        proxy.fault(kind, ".tok.npy")
    workers = [Worker(address, prepared, tmp_path / "cache", limit=largest, seed=seed) for seed in range(3)]
    most = max(worker.most_bytes() for worker in workers)
    assert 0 < most <= largest + len(workers) * largest
    assert bytes_in(tmp_path / "cache") <= largest + len(workers) * largest
    assert not list((tmp_path / "cache").glob("*.part"))


def test_processes_that_start_together_fetch_each_shard_once(
    s3: S3, proxy: Proxy, prepared: Path, tmp_path: Path
) -> None:
    address = s3.upload(prepared, "corpus")
    proxy.forget()
    workers = [Worker(address, prepared, tmp_path / "cache", seed=seed) for seed in range(2)]
    for worker in workers:
        worker.most_bytes()
    shards = [name for name in proxy.fetched if ".tok.npy" in name]
    assert sorted(shards) == sorted(set(shards))
    assert len(shards) == len(read_manifest(prepared, "train").shards)


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_that_ends_or_stops_in_the_midst_of_a_transfer_is_in_nobodys_way(
    ending: signal.Signals, s3: S3, proxy: Proxy, prepared: Path, tmp_path: Path
) -> None:
    address = s3.upload(prepared, "corpus")
    fault = proxy.fault("stall", ".tok.npy")
    first = Worker(address, prepared, tmp_path / "cache")
    try:
        assert fault.met.wait(30)
        wait_until(lambda: list((tmp_path / "cache").glob("*.part")) != [], "a file on its way", 10)
        first.process.send_signal(ending)
        assert Worker(address, prepared, tmp_path / "cache", seed=1).most_bytes() > 0
        if ending == signal.SIGKILL:
            assert not list((tmp_path / "cache").glob("*.part"))
        else:
            first.process.send_signal(signal.SIGCONT)
            first.most_bytes()
    finally:
        first.process.kill()
        first.process.communicate()
