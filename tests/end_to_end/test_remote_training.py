"""Training on text in an object store: the samples of the local folder, and either goes on where the other stopped."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from gptscale.config.schema import DataConfig, SourceConfig, TokenizerConfig
from gptscale.data.prepare import prepare
from gptscale.runtime.errors import EXIT_STOPPED, EXIT_USER
from tests.helpers.processes import tree
from tests.helpers.s3 import S3, Proxy
from tests.helpers.training import exact_part, read_metrics, run_training, small_run, write_corpus

GPTSCALE = str(Path(sys.executable).parent / "gptscale")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder of some shards."""
    path = tmp_path_factory.mktemp("many")
    source = SourceConfig(path=str(write_corpus(path)))
    data = DataConfig((source,), heldout_fraction=0.1, workers=1, shard_tokens=8_000)
    return prepare(data, TokenizerConfig(vocab_size=384), path / "prepared").folder


def test_a_run_from_s3_is_the_run_from_the_folder_and_goes_on_there(
    s3: S3, proxy: Proxy, folder: Path, tmp_path: Path
) -> None:
    address = s3.upload(folder, "training")
    run_training(small_run(folder, tmp_path / "expected"), 2, tmp_path / "local")
    expected = exact_part(read_metrics(tmp_path / "expected"))
    fault = proxy.fault("flip", "train/shard-00001.tok")
    arguments = [
        *small_run(Path("x"), tmp_path / "run"),
        f"data.path={address}",
        f"data.cache_dir={tmp_path / 'cache'}",
        "data.cache_bytes=70000",
        "schedule.total_steps=12",
        "train.steps=6",
        "launch.ranks=2",
    ]
    with tree(GPTSCALE, "train", *arguments, environ={"OMP_NUM_THREADS": "1"}) as started:
        code, _, err = started.end(timeout_s=180)
    assert code == 0, err
    hashes = [line["data/sample_hash"] for line in expected if "data/sample_hash" in line]
    found = [line["data/sample_hash"] for line in read_metrics(tmp_path / "run") if "data/sample_hash" in line]
    assert found == hashes[:6]
    assert fault.met.is_set()
    for path in (tmp_path / "run").rglob("*"):
        assert not path.is_file() or b"canary" not in path.read_bytes(), f"credentials in {path}"
    for rank in (0, 1):
        with tree(GPTSCALE, "inspect", str(tmp_path / "run"), "step=3", f"rank={rank}") as started:
            code, out, err = started.end(timeout_s=60)
        assert code == 0, err
        assert "equal to what the run recorded" in out
    run_training([*small_run(folder, tmp_path / "run"), "schedule.total_steps=12"], 2, tmp_path / "resumed")
    steps = [line for line in exact_part(read_metrics(tmp_path / "run")) if "data/sample_hash" in line]
    assert steps == [line for line in expected if "data/sample_hash" in line]


def test_a_run_that_waits_for_a_stalled_store_ends_soon_when_told(
    s3: S3, proxy: Proxy, folder: Path, tmp_path: Path
) -> None:
    address = s3.upload(folder, "stalled")
    fault = proxy.fault("stall", "train/shard-00000.tok", times=100)
    arguments = [
        *small_run(Path("x"), tmp_path / "run"),
        f"data.path={address}",
        f"data.cache_dir={tmp_path / 'cache'}",
    ]
    with tree(GPTSCALE, "train", *arguments, environ={"OMP_NUM_THREADS": "1"}) as started:
        assert fault.met.wait(120)
        os.kill(started.process.pid, signal.SIGTERM)
        code, _, err = started.end(timeout_s=40)  # the grace of 5 s, and a busy machine
        started.wait_until_gone(5)
    assert code == EXIT_STOPPED, err
    assert "stopped while waiting for data" in err


def test_mistakes_are_named_before_a_rank_starts(s3: S3, proxy: Proxy, tmp_path: Path) -> None:
    for path, says in (
        ("s3://bucket/nothing", "s3://bucket/nothing/train/manifest.json is missing"),
        ("https://user:canary@host/corpus", "data.path=https://… holds a password"),
        ("s3://key:can/ary@bucket/corpus", "data.path=s3://… holds a password"),
    ):
        arguments = [*small_run(Path("x"), tmp_path / "run"), f"data.path='{path}'", f"data.corpora_dir={tmp_path}"]
        with tree(GPTSCALE, "train", *arguments) as started:
            code, _, err = started.end(timeout_s=60)
        assert code == EXIT_USER
        assert says in err
        assert len(err.splitlines()) == 2
        assert "canary" not in err
        assert not (tmp_path / "run").exists()
