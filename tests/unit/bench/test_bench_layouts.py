"""`gptscale bench layouts` as a command: real processes, tiny shapes, no assertion on times."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.helpers.processes import tree

LIMIT_S = 150
TINY = [
    "model.layers=2",
    "model.width=32",
    "model.heads=2",
    "tokenizer.vocab_size=256",
    "data.sequence_length=16",
    "bench.steps_per_turn=1",
    "bench.rounds=1",
    "bench.together=2",
    "bench.micro_batches=[2,4]",
    "bench.contenders=[fsdp2,tensor2,pipeline2]",
]


def test_layouts_are_measured_and_counted_and_wrong_formulas_refused(tmp_path: Path) -> None:
    output = tmp_path / "layouts.json"
    program = [sys.executable, "-m", "tests.helpers.bench_layouts_in_turn", *TINY, f"bench.output={output}"]
    with tree(*program) as command:
        code, printed, progress = command.end(LIMIT_S)
        command.wait_until_gone(5)
    table, _, after = printed.partition("honest: ")
    assert after == "0\n", progress
    names = ["ddp", "fsdp2", "tensor2", "pipeline2"]
    assert [line.split()[0] for line in table.splitlines() if "MiB" in line] == names
    figures = json.loads(output.read_text())
    assert list(figures["contenders"]) == list(figures["sent"]) == names
    assert {name: row["built"] for name, row in figures["contenders"].items()} == {
        "ddp": "DistributedDataParallel, AdamW",
        "fsdp2": "fully_shard, AdamW",
        "tensor2": "ZeroEngine, stage 1",
        "pipeline2": "PipelineEngine, stage 1",
    }
    for name, sent in figures["sent"].items():
        assert sent["payload_bytes"] == sent["expected_bytes"] == sum(sent["by_operation"].values()) > 0
        assert f"{name}  " in table
        assert f"{sent['payload_bytes']:,}" in table
    assert [found["micro_batches"] for found in figures["bubbles"]] == [2, 4]
    for found, expected in zip(figures["bubbles"], (1 / 3, 1 / 5), strict=True):
        assert found["name"] == "pipeline2"
        assert abs(found["expected"] - expected) < 1e-9
        assert 0 < found["measured"] < 1
        assert len(found["stage_s"]) == 2
    # The formulas that forget something: after a fifth of the work, and without a word on stdout.
    assert code == 1
    ddp = figures["sent"]["ddp"]["payload_bytes"]
    assert f"ddp: rank 0 hands {ddp} bytes a step to all-reduce of 2 ranks, and by formula {ddp - 4}" in progress
    assert "no figures are reported" in progress
