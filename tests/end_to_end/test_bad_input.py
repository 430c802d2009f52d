"""What a user can get wrong: exit 2, at most two lines that name the key or file and the fix, nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gptscale.cli.main import main
from tests.helpers.processes import tree
from tests.helpers.training import run_training, small_run, write_corpus

GPTSCALE = str(Path(sys.executable).parent / "gptscale")


TINY = ("experiment=tiny",)
PP2 = ("parallel.pipeline=2", "launch.ranks=2")
BY_TIME = ("parallel.pipeline_balance=time",)
SP2 = ("parallel.sequence=2", "launch.ranks=2")
CUT_NORMS = ("parallel.tensor=2", "launch.ranks=2", "parallel.shard_norms=true")
RAW = "parallel.deepspeed.zero_optimization"
YARN = ("model.positions=rope", "model.rope_scaling=yarn", "model.rope_factor=2")
AT_64 = ("model.rope_original_length=64",)
SELECTIVE = ("parallel.activation_checkpointing=selective",)
EP2 = ["parallel.expert=2", "launch.ranks=2"]
EXPERTS = ["model.experts=4", "model.bias=false"]
TP2 = ("parallel.tensor=2", "launch.ranks=2")


def refused(code: int, err: str, *words: str) -> None:
    lines = err.strip().splitlines()
    assert code == 2, err
    assert 1 <= len(lines) <= 2, err
    for word in words:
        assert word in err, err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "model.layerz=2"], ["model.layerz", "model.layers"]),
        (["train", "experiment=[tiny]"], ["more than one experiment", "experiment=depth"]),
        (["train", "model.depth=8"], ["model.depth=8", "model=tiny", "model=depth"]),
        (["train", "experiment=gpt3-125m"], ["data.sources", "data.path"]),
        (["train", "--hepl"], ["--hepl", "--help"]),
        (["train", "experiment=tiny", "~model"], ["~model", "taken away"]),
        (["train", "experiment=tiny", "hydra.run.dir=x"], ["hydra.run.dir"]),
        (["train", "experiment=tiny", "logging.project='${oc.env:NO_SUCH}'"], ["logging.project", "NO_SUCH"]),
        (["train", "experiment=tiny", "model.layers='${model.none}'"], ["model.layers", "model.none"]),
        (["prepare", "target="], ["target"]),
        (["train", "layers=2"], ["layers", "model.layers"]),
        (["train", "experiment=tinny"], ["experiment=tinny", "experiment=tiny"]),
        (["train", "model=gpt"], ["model=gpt"]),
        (["train", "train.steps=many"], ["train.steps", "whole number"]),
        (["train", "experiment=tiny", "model.norm=rms"], ["model.norm", "rmsnorm"]),
        (["train", "experiment=tiny", "model.attention_pattern=[full,window]"], ["model.window"]),
        (["train", "experiment=tiny", "model.rope_factor=4"], ["model.rope_factor=4", "model.rope_scaling"]),
        (["train", "experiment=tiny", "model.rope_scaling=yarn"], ["model.rope_scaling=yarn", "model.positions=rope"]),
        (["train", "experiment=tiny", "model.width=65"], ["model.heads=4", "model.width=65", "64"]),
        (["train", "experiment=tiny", "train.global_batch=9", "launch.ranks=2"], ["train.global_batch=9", "8 or 10"]),
        (["train", "experiment=tiny", "train.tokens=100"], ["train.steps", "train.tokens"]),
        (["train", "experiment=tiny", "parallel.tensor=2"], ["parallel.tensor", "launch.ranks=2"]),
        (["train", "experiment=tiny", "parallel.tensor=3", "launch.ranks=3"], ["parallel.tensor=3", "model.heads=4"]),
        (["train", "experiment=tiny", *TP2, "optimizer=muon"], ["optimizer.name=muon", "parallel.tensor=1"]),
        (["train", "experiment=tiny", *TP2, "train.compile=block"], ["train.compile=block", "train.compile=none"]),
        (["train", "experiment=tiny", *TP2, "parallel=plain"], ["parallel.engine=plain"]),
        (["train", "experiment=tiny", *TP2, "model.kv_heads=1"], ["parallel.tensor=2", "model.kv_heads=1"]),
        (["train", "experiment=tiny", *TP2, "model.vocab_multiple=1"], ["parallel.tensor=2", "model.vocab_multiple"]),
        (["train", "experiment=tiny", "parallel.tensor=0"], ["parallel.tensor=0"]),
        (["train", "experiment=tiny", "parallel.pipeline=2"], ["parallel.pipeline", "launch.ranks=2"]),
        (["train", "experiment=tiny", "parallel.pipeline=0"], ["parallel.pipeline=0"]),
        (
            ["train", "experiment=tiny", "parallel.pipeline=9", "launch.ranks=9"],
            ["parallel.pipeline=9", "model.layers"],
        ),
        (["train", "experiment=tiny", *PP2, "parallel=zero2"], ["parallel.zero_stage=2", "parallel.zero_stage=1"]),
        (["train", "experiment=tiny", *PP2, "parallel.pipeline_layers=[1,9]"], ["parallel.pipeline_layers=[1,9]"]),
        (["train", "experiment=tiny", "parallel.pipeline_balance=time"], ["no effect", "parallel.pipeline=1"]),
        (["train", "experiment=tiny", *PP2, *BY_TIME, "parallel.pipeline_layers=[1,1]"], ["no effect", "_layers"]),
        (["train", "experiment=tiny", "parallel.checkpoint_interval=2"], ["checkpoint_interval=2", "=full"]),
        (
            ["train", "experiment=tiny", "schedule.decay_tokens=10", "schedule.warmup_tokens=10"],
            ["decay_tokens=10", "warm-up"],
        ),
        (["train", "experiment=tiny", *YARN, "model.rope_original_length=0"], ["rope_original_length=0", "1"]),
        (
            ["train", "experiment=tiny", *YARN, "model.rope_original_length=64", "model.rope_theta=1"],
            ["rope_theta=1", "above 1"],
        ),
        (["train", "experiment=tiny", *PP2, "parallel.sequence=2"], ["parallel.sequence=2", "parallel.pipeline=1"]),
        (["train", "experiment=tiny", *PP2, "optimizer=muon"], ["optimizer.name=muon", "parallel.pipeline=1"]),
        (["train", "experiment=tiny", *PP2, "train.noise_scale_every_steps=1"], ["noise_scale", "parallel.pipeline=1"]),
        (["train", "experiment=tiny", *SP2, "data.sequence_length=63"], ["parallel.sequence=2", "sequence_length=63"]),
        (["train", "experiment=tiny", *SP2, "model.kv_heads=1"], ["parallel.sequence=2", "model.kv_heads=1"]),
        (["train", "experiment=tiny", *SP2, "train.compile=block"], ["train.compile=block", "parallel.sequence=1"]),
        (["train", "experiment=tiny", *EP2], ["parallel.expert=2", "model.experts=8"]),
        (["train", "experiment=tiny", *EP2, *EXPERTS, "model.experts=3"], ["parallel.expert=2", "model.experts=3"]),
        (
            ["train", "experiment=tiny", *EP2, *EXPERTS, "parallel=zero3"],
            ["parallel.zero_stage=3", "parallel.expert=2"],
        ),
        (["train", "experiment=tiny", *EXPERTS, "parallel.expert=2"], ["parallel.expert=2", "1 data-parallel"]),
        (["train", "experiment=tiny", *EXPERTS, *TP2], ["model.experts=4", "parallel.tensor=1"]),
        (["train", "experiment=tiny", *EXPERTS, *PP2], ["model.experts=4", "parallel.pipeline=1"]),
        (["train", "experiment=tiny", *EXPERTS, *SP2], ["model.experts=4", "parallel.sequence=1"]),
        (["train", "experiment=tiny", *EXPERTS, "optimizer=muon"], ["optimizer.name=muon", "adamw"]),
        (["train", "experiment=tiny", *EXPERTS, "train.compile=block"], ["train.compile=block", "train.compile=none"]),
        (["train", "experiment=tiny", "model.experts=4"], ["model.experts=4", "model.bias=false"]),
        (["train", "experiment=tiny", *EXPERTS, "model.experts_per_token=5"], ["experts_per_token=5", "experts=4"]),
        (["train", "experiment=tiny", *EXPERTS, "model.expert_layers=[dense]"], ["expert_layers", "[experts]"]),
        (["train", "experiment=tiny", "parallel.offload=nvme"], ["parallel.offload=nvme", "parallel.offload_path"]),
        (["train", "experiment=tiny", "parallel.offload_path=/tmp"], ["offload_path=/tmp", "parallel.offload=nvme"]),
        (["train", "experiment=tiny", "parallel=zero0", "parallel.offload=cpu"], ["parallel.offload=cpu", "zero1"]),
        (["train", "experiment=tiny", "optimizer=muon", "parallel.offload=cpu"], ["parallel.offload=cpu", "adamw"]),
        (["train", "experiment=tiny", f"{RAW}.stage3_prefetch_size=1"], [f"{RAW}.stage3_prefetch_bucket_size"]),
        (["train", "experiment=tiny", f"{RAW}.reduce_bucket_size=9"], ["reduce_bucket_size", "zero_stage=2"]),
        (["train", "experiment=tiny", f"{RAW}.sub_group_size=9", "parallel=zero2"], ["sub_group_size", "zero_stage=3"]),
        (["train", "experiment=tiny", "parallel.deepspeed.gradient_clipping=1"], ["parallel.deepspeed.gradient_clip"]),
        (["train", "experiment=tiny", "parallel=plain", "parallel.deepspeed.dump_state=true"], ["parallel.deepspeed"]),
        (["train", "experiment=tiny", *PP2, "parallel.deepspeed.flops_profiler.enabled=true"], ["flops_profiler"]),
        (["train", "experiment=tiny", *PP2, "parallel.deepspeed.wall_clock_breakdown=true"], ["steps_per_print=10"]),
        (["train", "experiment=tiny", "parallel.shard_norms=true"], ["shard_norms=true", "parallel.tensor"]),
        (["train", "experiment=tiny", *CUT_NORMS, "model.dropout=0.1"], ["shard_norms=true", "model.dropout=0"]),
        (["train", "experiment=tiny", *CUT_NORMS, "data.sequence_length=63"], ["parallel.tensor=2", "length=63"]),
        (["train", "experiment=tiny", *SELECTIVE, "train.compile=block"], ["selective", "train.compile=none"]),
        (["train", "experiment=tiny", "parallel.zero_stage=4"], ["parallel.zero_stage=4"]),
        (["train", "experiment=tiny", "parallel=plain", "launch.ranks=2"], ["parallel.engine=plain"]),
        (["train", "experiment=tiny", "checkpoint.keep=1"], ["checkpoint.keep=1"]),
        (["train", "experiment=tiny", "optimizer.learning_rate=0"], ["optimizer.learning_rate"]),
        (["train", "experiment=tiny", "optimizer.learning_rate=inf"], ["optimizer.learning_rate=inf", "finite"]),
        (["train", "experiment=tiny", "optimizer.clip_norm=nan"], ["optimizer.clip_norm=nan", "finite"]),
        (["train", "experiment=tiny", "optimizer.beta2=1"], ["optimizer.beta2=1"]),
        (["train", "experiment=tiny", "parallel.timeout_s=-1"], ["parallel.timeout_s=-1"]),
        (["train", "experiment=tiny", "launch.threads=0"], ["launch.threads=0"]),
        (["train", "experiment=tiny", "launch.nodes=2"], ["launch.nodes=2", "srun"]),
        (["train", "experiment=tiny", "model.kv_heads=0"], ["model.kv_heads=0"]),
        (["train", "experiment=tiny", "model.init_std=0"], ["model.init_std=0", "0.02"]),
        (["train", "experiment=tiny", "precision.compute=fp8"], ["precision.compute=fp8", "bf16"]),
        (["train", "experiment=tiny", "precision.loss_scale=0"], ["precision.loss_scale=0", "65536"]),
        (["train", "experiment=tiny", "schedule.name=cosin"], ["schedule.name=cosin", "cosine"]),
        (["train", "experiment=tiny", "optimizer.name=adam"], ["optimizer.name=adam", "adamw"]),
        (["train", "experiment=tiny", "run.resume=newer"], ["run.resume=newer", "never"]),
        (["train", "experiment=tiny", "run.name="], ["run.name"]),
        (["train", "experiment=tiny", "run=mine"], ["run", "group"]),
        (["train", "experiment=tiny", "data.path=/nowhere"], ["/nowhere"]),
        (["train", "data.path=[]", *TINY], ["data.path", "names no text"]),
        (["train", "data.path=[{path: /a, weight: -1}, {path: /b}]", *TINY], ["data.path[0].weight=-1", "above 0"]),
        (["train", "data.path=[{path: /a}, {path: /b, weight: nan}]", *TINY], ["data.path[1].weight=nan", "finite"]),
        (["train", "data.sources=[{path: 's3://key:se/cret@b/x', format: jsonl}]", *TINY], ["data.sources=s3://…"]),
        (["prepare", "target=x", "data.sources=[{path: 'https://me:secret@b/x'}]"], ["data.sources=https://…"]),
        (["train", "data.stages=[{name: a, from_tokens: 9, path: []}]", *TINY], ["data.stages[0].path", "no text"]),
        (["train", "data.stages=[{name: a, from_tokens: 9, path: /nowhere}]", *TINY], ["/nowhere"]),
        (["train", "data.stages=[{name: a, from_tokens: 9, seqence_length: 9}]", *TINY], ["sequence_length"]),
        (["train", "data.stages=[{name: a, from_tokens: 9, sequence_length: 512}]", *TINY], ["positions=rope"]),
        (["train", "data.stages=[{name: a, from_tokens: 9}]", *TINY], ["data.stages[0]", "changes nothing"]),
        (["train", "data.order=blocks", *TINY], ["data.order=blocks", "block"]),
        (["train", "data.order=block", "data.window_blocks=0", *TINY], ["data.window_blocks=0"]),
        (["train", "a b"], ["key=value"]),
        (["trian"], ["train"]),
        (["generate"], ["source"]),
        (["generate", "source=/nowhere", "prompt=x"], ["/nowhere"]),
    ],
    ids=lambda item: " ".join(item) if isinstance(item, list) else "",
)
def test_settings(
    arguments: list[str],
    words: list[str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    code = main(arguments)
    said = capsys.readouterr().err
    refused(code, said, *words)
    assert "cret@" not in said
    assert list(tmp_path.iterdir()) == []


def empty(folder: Path) -> Path:
    (folder / "text.jsonl").write_text("")
    return folder / "text.jsonl"


def without_text(folder: Path) -> Path:
    (folder / "text.jsonl").write_text('{"text": "fine"}\n{"txt": "not"}\n')
    return folder / "text.jsonl"


def binary(folder: Path) -> Path:
    (folder / "text.txt").write_bytes(bytes(range(256)) * 20)
    return folder / "text.txt"


def broken_utf8(folder: Path) -> Path:
    (folder / "text.txt").write_bytes("a good start é".encode() + b"\xff\xfe and an end")
    return folder / "text.txt"


def missing(folder: Path) -> Path:
    return folder / "nothing.jsonl"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (empty, []),
        (without_text, ["text.jsonl:2", "text"]),
        (binary, ["text.txt"]),
        (broken_utf8, ["text.txt"]),
        (missing, ["nothing.jsonl"]),
    ],
)
def test_text(
    make: Callable[[Path], Path], words: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    source = make(tmp_path)
    target = tmp_path / "prepared"
    code = main(["prepare", f"target={target}", f"data.sources=[{{path: {source}}}]", "data.workers=1"])
    refused(code, capsys.readouterr().err, *words)
    assert not target.exists()
    assert {path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")} <= {source.name}


def test_a_vocabulary_that_the_corpus_cannot_support(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    source = write_corpus(tmp_path, documents=40)
    target = tmp_path / "prepared"
    arguments = ["prepare", f"target={target}", f"data.sources=[{{path: {source}}}]", "data.workers=1"]
    refused(main([*arguments, "tokenizer.vocab_size=20000"]), capsys.readouterr().err, "tokenizer.vocab_size")
    assert not target.exists()


def test_a_missing_shard_is_named_before_the_first_step(corpus: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(corpus, damaged)
    (damaged / "train" / "shard-00000.tok.npy").unlink()
    started = run_training([*small_run(damaged, tmp_path / "run"), "parallel.engine=plain"], 1, tmp_path, code=2)
    refused(2, started.text(), "shard-00000.tok.npy")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_resume_with_other_settings_shows_the_difference(corpus: Path, tmp_path: Path) -> None:
    arguments = [*small_run(corpus, tmp_path / "run"), "parallel.engine=plain", "train.steps=4"]
    run_training(arguments, 1, tmp_path)
    before = snapshot(tmp_path / "run")
    more = ["train.steps=8", "model.layers=3", "tokenizer.vocab_size=400"]
    started = run_training([*arguments, *more], 1, tmp_path, code=2)
    refused(2, started.text(), "model.layers: 2 → 3", "tokenizer.vocab_size: 512 → 400")
    started = run_training([*arguments, "run.resume=never"], 1, tmp_path, code=2)
    refused(2, started.text(), "run.resume=never")
    assert snapshot(tmp_path / "run") == before


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_resume_with_another_vocabulary_is_refused(corpus: Path, tmp_path: Path) -> None:
    """The same settings over a folder that was prepared anew with other tokens."""
    arguments = [*small_run(corpus, tmp_path / "run"), "parallel.engine=plain", "train.steps=4"]
    run_training(arguments, 1, tmp_path)
    other = tmp_path / "other"
    source = write_corpus(tmp_path / "text")
    assert main(["prepare", f"target={other}", f"data.sources=[{{path: {source}}}]", "tokenizer.vocab_size=390"]) == 0
    again = [item for item in arguments if not item.startswith("data.path")]
    started = run_training([*again, f"data.path={other}", "train.steps=8"], 1, tmp_path, code=2)
    refused(2, started.text(), "data identity")


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.skipif(os.getuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_ends_the_run_and_keeps_older_checkpoints(corpus: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "4m") as disk:
        arguments = [
            *small_run(corpus, disk / "run"),
            "model.width=64",
            "checkpoint.every_steps=1",
            "checkpoint.keep=9",
        ]
        started = run_training([*arguments, "parallel.engine=plain"], 1, tmp_path, code=2)
        assert "no space" in started.text().lower()
        assert "Traceback" not in started.text()
        checkpoints = sorted(path.name for path in (disk / "run" / "checkpoints").iterdir())
        assert checkpoints
        assert all(name.startswith("step-") for name in checkpoints), "something half-written is left"
        done = subprocess.run(
            [GPTSCALE, "generate", f"source={disk / 'run'}", "prompt=the", "generate.max_new_tokens=4"],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        # Space again, and the run goes on from there.
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        run_training([*arguments, "parallel.engine=plain"], 1, tmp_path)
        steps = [json.loads(line)["step"] for line in (disk / "run" / "metrics.jsonl").read_text().splitlines()]
        assert max(steps) == 12


@pytest.mark.skipif(os.getuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_ends_every_rank_at_once_and_is_told_once(corpus: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "4m") as disk:
        arguments = [
            *small_run(corpus, disk / "run"),
            "model.width=64",
            "checkpoint.every_steps=1",
            "checkpoint.keep=9",
        ]
        with tree(GPTSCALE, "train", "launch.ranks=2", "logging.print_every_steps=99", *arguments) as started:
            code, _, err = started.end(timeout_s=120)
            started.wait_until_gone(2)
        told = [line for line in err.splitlines() if "step-" in line]
        assert code == 2, err
        assert len(told) == 1, err
        assert "no space" in told[0].lower()
        assert "Traceback" not in err
        assert "lost a peer" not in err
