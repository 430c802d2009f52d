"""`gptscale bench step` as a command: real processes, tiny shapes, no assertion on times."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from pathlib import Path

import pytest

from gptscale.cli.main import main
from tests.helpers.processes import Tree, tree

LIMIT_S = 120
TINY = [
    "model.layers=1",
    "model.width=32",
    "model.heads=2",
    "tokenizer.vocab_size=256",
    "data.sequence_length=16",
    "bench.steps_per_turn=2",
    "bench.warmup_steps=1",
]
COMMAND = [sys.executable, "-m", "gptscale.cli.main", "bench", "step", *TINY]


@pytest.fixture(scope="module")
def losses_by_mask() -> dict[str, float]:
    return {}


def wait_for_line(started: Tree, text: str) -> None:
    """Read the command's stderr up to a line with this text."""
    assert started.process.stderr is not None
    seen = []
    for line in started.process.stderr:
        seen.append(line)
        if text in line:
            return
    raise AssertionError(f"no line with {text!r}: {seen}")


def test_every_contender_is_measured_and_computes_the_same(tmp_path: Path) -> None:
    output = tmp_path / "step.json"
    with tree(*COMMAND, "bench.rounds=2", f"bench.output={output}") as command:
        code, table, progress = command.end(LIMIT_S)
        command.wait_until_gone(5)
    assert code == 0, progress
    engines = ["bare", "plain", "zero0", "zero1", "zero2", "zero3"]
    names = [*engines, "nanogpt", "nanogpt-fused", "hf-gpt2", "hf-gpt2-eager", "products"]
    assert [line.split()[0] for line in table.splitlines() if "MiB" in line] == names
    headings = [line for line in table.splitlines() if line.startswith("· ")]
    assert headings == ["· engines", "· other people's models", "· the least there is to do"]
    for expected in (
        "ours     full attention by sdpa (timed: sdpa ",
        "command  gptscale bench step model.layers=1",
        "vocabulary 256",
        "÷bare",
        "torch 2",
        "load ",
    ):
        assert expected in table
    figures = json.loads(output.read_text())
    assert list(figures["contenders"]) == names
    products = figures["contenders"].pop("products")
    assert re.fullmatch(r"\d+ products of 0\.0 GFLOP, none of a fused attention's", products["built"])
    assert {name: row["built"] for name, row in figures["contenders"].items()} == {
        "bare": "loop, AdamW",
        "plain": "PlainEngine",
        **{f"zero{stage}": f"ZeroEngine, stage {stage}" for stage in range(4)},
        "nanogpt": "NanoGPT, AdamW",
        "nanogpt-fused": "NanoGPT, fused AdamW",
        "hf-gpt2": "GPT2LMHeadModel, sdpa, fused AdamW",
        "hf-gpt2-eager": "GPT2LMHeadModel, eager, fused AdamW",
    }
    assert "not run: hf-llama: it has no model.positions=learned" in table
    for name, row in figures["contenders"].items():
        samples = figures["samples"][name]
        assert [len(turn) for turn in samples["wall_s"]] == [len(turn) for turn in samples["cpu_s"]] == [2, 2]
        assert len(samples["losses"]) == 5
        assert samples["losses"] == pytest.approx(figures["samples"]["bare"]["losses"], abs=1e-4)
        assert row["peak_bytes"] > 50e6
        assert 0 < row["cpu_ratio"]["lower"] <= row["cpu_ratio"]["median"] <= row["cpu_ratio"]["upper"]
    assert figures["contenders"]["bare"]["wall_ratio"]["median"] == 1
    assert len(set(figures["samples"]["bare"]["losses"])) == 5, "steps have no effect, or all batches are one"
    assert figures["tokens_per_step"] == 4 * 16
    assert figures["environment"]["threads"] == 1


@pytest.mark.parametrize(
    ("mask", "other", "ours"),
    [
        ("true", "zero3", "full attention by blocked (the only one that can), documents masked"),
        ("false", "attention-blocked", "full attention by sdpa (timed: sdpa "),
    ],
)
def test_ours_attend_as_a_run_would_and_documents_are_masked(
    mask: str, other: str, ours: str, tmp_path: Path, losses_by_mask: dict[str, float]
) -> None:
    """On a CPU one kernel can mask documents. Masked losses are others; equal ones are a condition for any figure."""
    output = tmp_path / "step.json"
    options = [f"bench.contenders=[{other}]", "bench.rounds=1", f"data.document_mask={mask}", "model.init_std=0.2"]
    with tree(*COMMAND, *options, "optimizer.learning_rate=1e-5", f"bench.output={output}") as command:
        code, table, progress = command.end(LIMIT_S)
    assert code == 0, progress
    assert f"\nours     {ours}" in table
    figures = json.loads(output.read_text())
    assert list(figures["contenders"]) == ["bare", other]
    section = "ours with something changed" if other == "attention-blocked" else "engines"
    assert figures["contenders"][other]["section"] == section
    losses_by_mask[mask] = figures["samples"]["bare"]["losses"][0]
    if len(losses_by_mask) == 2:
        assert abs(losses_by_mask["true"] - losses_by_mask["false"]) > 1e-3


def test_options_are_measured_in_bf16(tmp_path: Path) -> None:
    output = tmp_path / "step.json"
    options = ["bench.contenders=[plain,full-loss,optimizer-muon,nanogpt]", "precision=bf16", "bench.rounds=1"]
    with tree(*COMMAND, *options, f"bench.output={output}") as command:
        code, table, progress = command.end(LIMIT_S)
    assert code == 0, progress
    assert ", bf16\n" in table
    figures = json.loads(output.read_text())
    built = {name: row["built"] for name, row in figures["contenders"].items()}
    assert built == {
        "bare": "loop, AdamW",
        "plain": "PlainEngine",
        "nanogpt": "NanoGPT, AdamW",
        "full-loss": "loop, AdamW",
        "optimizer-muon": "loop, Muon",
    }
    samples = figures["samples"]
    assert samples["optimizer-muon"]["losses"][0] == samples["bare"]["losses"][0]
    assert samples["optimizer-muon"]["losses"][-1] != samples["bare"]["losses"][-1]


def test_other_peoples_models_are_compiled_on_request(tmp_path: Path) -> None:
    output = tmp_path / "step.json"
    options = ["bench.contenders=[nanogpt-compile,hf-gpt2-compile]", "bench.rounds=1", f"bench.output={output}"]
    with tree(*COMMAND, *options) as command:
        code, _, progress = command.end(LIMIT_S)
    assert code == 0, progress
    figures = json.loads(output.read_text())
    assert {name: row["built"] for name, row in figures["contenders"].items() if name != "bare"} == {
        "nanogpt-compile": "NanoGPT, compiled, fused AdamW",
        "hf-gpt2-compile": "GPT2LMHeadModel, sdpa, compiled, fused AdamW",
    }
    for name in figures["contenders"]:
        losses = figures["samples"]["bare"]["losses"]
        assert figures["samples"][name]["losses"] == pytest.approx(losses, abs=1e-4)


def test_different_work_is_refused_and_two_ranks_are_not_and_a_death_ends_it(tmp_path: Path) -> None:
    output = tmp_path / "step.json"
    with tree(sys.executable, "-m", "tests.helpers.bench_in_turn", *TINY, f"bench.output={output}") as command:
        wait_for_line(command, "plain does not compute what bare does: after ")
        wait_for_line(command, "no speed is reported for different work")
        assert not output.exists()
        wait_for_line(command, "round 2 of 2000")
        figures = json.loads(output.read_text())
        forked = [pid for pid in command.alive() if pid != command.process.pid]
        os.kill(max(forked), signal.SIGKILL)  # the contender that was started last
        wait_for_line(command, "died (exit code -9)")
        code, printed, _ = command.end(LIMIT_S)
        command.wait_until_gone(5)
    assert printed.startswith("unequal: 1\n")
    assert [line.split()[0] for line in printed.splitlines() if "MiB" in line] == ["ddp", "zero2"]
    assert printed.endswith("two ranks: 0\n")
    assert {name: row["built"] for name, row in figures["contenders"].items()} == {
        "ddp": "DistributedDataParallel, AdamW",
        "zero2": "ZeroEngine, stage 2",
    }
    assert figures["environment"]["ranks"] == 2
    assert code == 1


def test_nobody_survives_a_killed_measurement(tmp_path: Path) -> None:
    arguments = ["bench.contenders=[plain]", "bench.rounds=2000"]
    with tree(*COMMAND, *arguments, environ={"TMPDIR": str(tmp_path)}) as command:  # it cannot remove its logs
        wait_for_line(command, "round 2 ")
        command.process.kill()
        command.wait_until_gone(5)


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        ([], "bench needs to know what to measure\nthere are: step"),
        (["bench.rounds=3"], "bench needs to know what to measure\nthere are: step"),
        (["stepp"], "there is no benchmark 'stepp'\ndid you mean 'gptscale bench step'?"),
        (["throughput"], "there is no benchmark 'throughput'\nthere are: step"),
        (["step", "bench.round=3"], "there is no setting 'bench.round'\ndid you mean 'bench.rounds'?"),
        (["step", "bench.contenders=[zero9]"], "bench.contenders: there is no 'zero9'\ndid you mean zero3?"),
        (["step", "bench.output=/nowhere/at/all.json"], "bench.output=/nowhere/at/all.json cannot be written\n"),
        (["step", "train.global_batch=3"], "train.global_batch=3 "),
    ],
)
def test_mistakes_are_answered_in_two_lines(
    arguments: list[str], lines: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(lines)
    assert len(captured.err.splitlines()) == 2


@pytest.mark.parametrize("arguments", [["--help"], ["step", "--help"]])
def test_help_names_every_setting(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 0
    assert "bench.steps_per_turn=2" in capsys.readouterr().out
