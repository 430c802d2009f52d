"""Document masks and the choice of kernels in whole runs, on real ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import gptscale.train.kernels
from tests.helpers import ranks
from tests.helpers.training import exact_part, read_metrics, run_training, small_run, train

PLAIN = ["parallel.engine=plain", "launch.ranks=1"]
ZERO3 = ["parallel.zero_stage=3", "parallel.activation_checkpointing=full"]


def test_masked_runs_agree(corpus: Path, tmp_path: Path) -> None:
    """Two ranks with ZeRO-3 and recomputation against the plain engine, on packed rows whose targets are masked
    unevenly; and neither the mask nor the packing may change on the way."""

    def run(name: str, mask: bool, extra: list[str]) -> list[str]:
        arguments = [*small_run(corpus, tmp_path / name), "model.dropout=0", "data.sequence_length=64"]
        windows = ["model.attention_pattern=[full,window]", "model.window=9"]
        packed = ["data.packing=best_fit", "data.boundary_loss=false"]
        return [*arguments, *windows, *packed, f"data.document_mask={str(mask).lower()}", "train.steps=6", *extra]

    run_training(run("plain", True, PLAIN), 1, tmp_path)
    run_training(run("zero", True, ZERO3), 2, tmp_path)
    run_training(run("unmasked", False, PLAIN), 1, tmp_path)
    refused = run_training(run("plain", False, PLAIN), 1, tmp_path, code=2)
    assert "data.document_mask: True → False" in refused.text()
    refused = run_training([*run("plain", True, PLAIN), "data.packing=cut"], 1, tmp_path, code=2)
    assert "data.packing: best_fit → cut" in refused.text()
    plain, zero, unmasked = (read_metrics(tmp_path / name) for name in ("plain", "zero", "unmasked"))
    assert [line["step"] for line in plain] == [line["step"] for line in zero]
    for key in ("train/loss", "eval/loss"):
        ours, theirs, without = ([line[key] for line in lines if key in line] for lines in (zero, plain, unmasked))
        # Float order: another sum over ranks. Without a mask, which is the control, losses differ from step 1 on.
        assert ours == pytest.approx(theirs, abs=1e-5)
        assert all(abs(a - b) > 1e-5 for a, b in zip(theirs, without, strict=True))
    hashes = [[line["data/sample_hash"] for line in lines if "train/loss" in line] for lines in (plain, zero, unmasked)]
    assert hashes[0] == hashes[1] == hashes[2]


def test_a_timed_choice_is_recorded_and_kept(corpus: Path, tmp_path: Path) -> None:
    def run(name: str, *extra: str) -> list[str]:
        # At usual initial weights attention is so even that kernels may round alike.
        large = ("model.dropout=0", "model.init_std=0.2")
        return [*small_run(corpus, tmp_path / name), *large, "schedule.total_steps=4", *extra]

    def kernel(name: str) -> tuple[str, str]:
        found = json.loads((tmp_path / name / "attention.json").read_text())["layers"]["full"]
        return found["kernel"], found["how"]

    def losses(name: str) -> list[object]:
        return [line for line in exact_part(read_metrics(tmp_path / name)) if line["step"] > 2]

    # On these shapes the rule's kernel wins by far, and says so.
    run_training(run("usual", "train.steps=4"), 2, tmp_path)
    assert kernel("usual")[0] == "sdpa"
    assert kernel("usual")[1].startswith("timed: sdpa ")
    log = (tmp_path / "usual" / "logs" / "rank-0.log").read_text()
    assert "full attention by sdpa (timed: sdpa" in log

    # A machine on which another one wins: rank 0 tells it to the others, and here, where it would not win, it is kept.
    started = ranks.start(train_where_blocked_wins, [run("kept", "train.steps=2")], 2, tmp_path)
    assert started.wait() == [0, 0], started.text()
    manifest = json.loads((tmp_path / "kept" / "checkpoints" / "step-00000002" / "manifest.json").read_text())
    assert manifest["state"]["progress"]["attention_kernels"] == {"full": "blocked"}
    run_training(run("kept", "train.steps=4"), 2, tmp_path)
    assert kernel("kept") == ("blocked", "timed when the run started")

    # It is really used: bit for bit what the same kernel gives by name, and not what the usual one gives.
    run_training(run("named", "train.steps=4", "train.attention_kernel=blocked"), 2, tmp_path)
    assert kernel("named") == ("blocked", "as train.attention_kernel says")
    assert losses("kept") == losses("named") != losses("usual")
    refused = run_training(run("flex", *PLAIN, "train.attention_kernel=flex"), 1, tmp_path, code=2)
    assert "train.attention_kernel=flex cannot do" in refused.text()


def train_where_blocked_wins(arguments: list[str]) -> int:
    gptscale.train.kernels.fastest = lambda times_s, by_rule: "blocked" if times_s else by_rule
    return train(arguments)
