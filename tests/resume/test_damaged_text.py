"""`data.verify=true` reads all text before a run begins."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.helpers.training import run_training, small_run


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_a_flipped_bit_is_named_before_the_first_step(split: str, corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    shutil.copytree(corpus, folder)
    shard = folder / split / "shard-00000.tok.npy"
    content = bytearray(shard.read_bytes())
    content[-2] ^= 1
    shard.write_bytes(content)
    run = [*small_run(folder, tmp_path / "run"), "parallel.engine=plain", "parallel.zero_stage=0", "data.verify=true"]
    refused = run_training(run, 1, tmp_path, code=2).text().strip().splitlines()
    assert len(refused) == 2, refused
    assert str(shard) in refused[0]
    assert "damaged" in refused[0]
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
