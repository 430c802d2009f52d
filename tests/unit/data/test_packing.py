"""Best-fit packing: every token a target once, rows that are nearly full, and plans that are made once."""

from __future__ import annotations

import errno
import itertools
import json
import multiprocessing
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptscale.cli.main import main
from gptscale.config.schema import CorpusConfig
from gptscale.data import packing
from gptscale.data.corpus import Corpus, open_split
from gptscale.data.packing import PLAN, ensure_packed, pack, packing_folder
from gptscale.data.stream import TrainingStream
from gptscale.runtime.errors import UserError
from tests.helpers.text import documents, write_jsonl


def by_hand(sizes: list[int], room: int) -> list[list[int]]:
    """Best fit as its definition reads: rows of sizes."""
    rows: list[list[int]] = []
    for size in sorted(sizes, reverse=True):
        fitting = [row for row in rows if room - sum(row) >= size]
        if fitting:
            min(fitting, key=lambda row: room - sum(row)).append(size)
        else:
            rows.append([size])
    return rows


@settings(max_examples=200, deadline=None)
@given(documents=st.lists(st.integers(1, 40), min_size=1, max_size=60), room=st.integers(2, 16))
def test_every_token_but_a_documents_first_is_a_target_once(documents: list[int], room: int) -> None:
    ends = np.cumsum(documents).astype(np.uint64)
    pieces, first_piece = pack(ends, room)
    targets = np.zeros(int(ends[-1]), dtype=int)
    sizes = []
    for row in range(len(first_piece) - 1):
        of_row = pieces[int(first_piece[row]) : int(first_piece[row + 1])].tolist()
        assert 2 <= sum(size for _, size in of_row) <= room
        for start, size in of_row:
            targets[start + 1 : start + size] += 1
            document = np.searchsorted(ends, start, side="right")
            assert start + size <= ends[document], "a piece is of one document"
            sizes.append(size)
    expected = np.ones(len(targets), dtype=int)
    expected[[0, *ends[:-1].astype(int).tolist()]] = 0
    assert (targets == expected).all()
    assert int(first_piece[-1]) == len(pieces)
    fullness = sorted(
        sum(size for _, size in pieces[int(a) : int(b)].tolist()) for a, b in itertools.pairwise(first_piece)
    )
    assert fullness == sorted(sum(row) for row in by_hand(sizes, room))


def test_rows_are_nearly_full_and_few_documents_are_cut() -> None:
    draw = np.random.default_rng(0)
    lengths = np.maximum(draw.lognormal(6, 1, 20_000).astype(int), 2)
    length = 2048
    pieces, first_piece = pack(np.cumsum(lengths).astype(np.uint64), length + 1)
    rows = len(first_piece) - 1
    used = int((pieces[:, 1]).sum())
    assert used / (rows * (length + 1)) > 0.999
    begun = np.isin(np.cumsum(lengths) - lengths, pieces[:, 0])
    assert begun.all()
    whole = int((lengths <= length + 1).sum())
    assert len(pieces) - whole == sum(-(-(n - 1) // length) for n in lengths.tolist() if n > length + 1)


def test_a_plan_is_made_once_and_pinned_to_its_shards(prepared: Path, tmp_path: Path) -> None:
    corpus = copied(prepared, tmp_path)
    seen: list[tuple[int, int]] = []
    plan = ensure_packed(corpus, 64, lambda done, all: seen.append((done, all)))
    assert seen == [(number + 1, len(plan.shards)) for number in range(len(corpus.manifest.shards))]
    assert len(seen) > 1
    assert ensure_packed(corpus, 64, lambda done, all: seen.append((0, 0))) == plan
    assert (0, 0) not in seen
    assert plan.rows == sum(shard.rows for shard in plan.shards) > 0
    open_split(corpus.folder, "train", verify=True)  # the plan lies beside the shards, and is none of them
    other = ensure_packed(corpus, 32)
    assert other.rows > plan.rows


def copied(prepared: Path, folder: Path) -> Corpus:
    shutil.copytree(prepared, folder / "corpus")
    return open_split(folder / "corpus", "train")


def plan_in_process(folder: Path) -> None:
    ensure_packed(open_split(folder, "train"), 64)


def test_processes_plan_at_once(prepared: Path, tmp_path: Path) -> None:
    corpus = copied(prepared, tmp_path)
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=plan_in_process, args=(corpus.folder,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    made = {path.name: path.read_bytes() for path in packing_folder(corpus, 64).iterdir()}
    shutil.rmtree(packing_folder(corpus, 64))
    ensure_packed(corpus, 64)
    assert {path.name: path.read_bytes() for path in packing_folder(corpus, 64).iterdir()} == made


def test_damage_is_named(prepared: Path, tmp_path: Path) -> None:
    corpus = copied(prepared, tmp_path)
    ensure_packed(corpus, 64)
    folder = packing_folder(corpus, 64)
    victim = folder / "shard-00000.piece.npy"
    healthy = victim.read_bytes()
    for content in (healthy[:-1], healthy + b"0", None):
        victim.unlink() if content is None else victim.write_bytes(content)
        with pytest.raises(UserError, match=r"piece.npy: missing or damaged.*\nremove .*best-fit-64"):
            ensure_packed(corpus, 64)
    victim.write_bytes(healthy[:-1] + bytes([healthy[-1] ^ 1]))
    ensure_packed(corpus, 64)
    with pytest.raises(UserError, match=r"piece.npy: damaged \(xxh3-128\)\nremove .*best-fit-64"):
        TrainingStream((CorpusConfig(str(corpus.folder)),), 64, 0, verify=True, packed=True)
    victim.write_bytes(healthy)
    plan = json.loads((folder / PLAN).read_text())
    (folder / PLAN).write_text(json.dumps(plan | {"corpus": "0" * 64}))
    with pytest.raises(UserError, match="a plan for other shards"):
        ensure_packed(corpus, 64)
    (folder / PLAN).write_text(json.dumps(plan)[:-9])
    with pytest.raises(UserError, match="damaged"):
        ensure_packed(corpus, 64)
    (folder / PLAN).unlink()  # as of a process that was killed
    victim.write_bytes(b"half")
    ensure_packed(corpus, 64)
    assert victim.read_bytes() == healthy


def test_a_full_disk_is_the_users_to_know(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(packing, "_make", full)
    with pytest.raises(UserError, match="No space left on device"):
        ensure_packed(copied(prepared, tmp_path), 64)


def test_prepare_plans_the_packing_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_jsonl(tmp_path / "text.jsonl", documents(60))
    target = tmp_path / "out"
    asked = [
        "data.packing=best_fit",
        "data.sequence_length=64",
        "tokenizer.vocab_size=400",
        "data.heldout_fraction=0.2",
    ]
    assert main(["prepare", f"target={target}", f"data.sources=[{{path: {source}}}]", *asked]) == 0
    plan = json.loads((packing_folder(open_split(target, "train"), 64) / PLAN).read_text())
    rows = sum(shard["rows"] for shard in plan["shards"])
    assert f"packed into {rows:,} rows of 64 tokens" in capsys.readouterr().err
