"""A run that is killed and started again is the run that was never stopped: bit for bit, whatever the moment."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import gptscale.checkpoint.write
from gptscale.checkpoint.folder import list_checkpoints
from gptscale.checkpoint.manifest import read_manifest
from gptscale.data.order import Ints
from gptscale.data.rows import Rows
from gptscale.data.stream import TrainingStream
from gptscale.runtime.files import write_bytes_atomically
from tests.helpers import ranks
from tests.helpers.training import EXACT, SOME_RUNS_ONLY, exact_part, read_metrics, run_training, small_run, train

LAYOUTS = [
    ("plain", 0, 1, ""),
    *(("deepspeed", stage, ranks, "") for stage in (0, 1, 2, 3) for ranks in (1, 2)),
    ("deepspeed", 1, 2, "tensor"),
    ("deepspeed", 3, 4, "tensor"),
    ("deepspeed", 2, 4, "sequence"),
    ("deepspeed", 1, 2, "pipeline"),
    ("deepspeed", 2, 4, "expert"),
    ("deepspeed", 3, 2, "offload"),
]
"""Engine, ZeRO stage, ranks, and which axis is 2, or that state is on disk."""


def layout(engine: str, stage: int, axis: str = "") -> list[str]:
    found = [f"parallel.engine={engine}", f"parallel.zero_stage={stage}"]
    if axis == "expert":
        found += ["model.experts=4", "model.expert_capacity=1.0", "model.bias=false"]
    if axis == "offload":
        return [*found, "parallel.offload=nvme", "parallel.offload_path=."]
    return [*found, f"parallel.{axis}=2"] if axis else found


@pytest.mark.parametrize(("engine", "stage", "count", "axis"), LAYOUTS)
def test_a_killed_run_goes_on_bit_for_bit(
    engine: str, stage: int, count: int, axis: str, corpus: Path, tmp_path: Path
) -> None:
    every_steps = 0 if axis in ("pipeline", "sequence", "expert") else 2
    noise = f"train.noise_scale_every_steps={every_steps}"
    whole = [*small_run(corpus, tmp_path / "whole"), *layout(engine, stage, axis), noise]
    run_training(whole, count, tmp_path)
    expected = exact_part(read_metrics(tmp_path / "whole"))
    assert [line["step"] for line in expected if "train/loss" in line] == list(range(1, 13))
    assert len([line for line in expected if "eval/loss" in line]) == 4
    measured = [line["step"] for line in expected if "train/noise_scale_tokens" in line]
    assert measured == ([2, 4, 6, 8, 10, 12] if every_steps else [])

    killed = [*small_run(corpus, tmp_path / "killed"), *layout(engine, stage, axis), noise]
    # Once between two checkpoints, and once while a checkpoint is being written.
    kill_when(killed, count, tmp_path, lambda folder: steps_in(folder) >= 5)
    assert steps_in(tmp_path / "killed") < 12, "the run ended before it was killed"
    unfinished = tmp_path / "killed" / "checkpoints" / ".writing-step-00000008"
    kill_when(killed, count, tmp_path, lambda _: any(unfinished.glob("*.safetensors")), slowly_saved)
    assert list(unfinished.glob("*.safetensors"))
    assert not (unfinished / "manifest.json").exists()
    run_training(killed, count, tmp_path)
    assert exact_part(read_metrics(tmp_path / "killed")) == expected


def steps_in(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"train/loss") if path.exists() else 0


def kill_when(
    arguments: list[str],
    count: int,
    tmp_path: Path,
    reached: Callable[[Path], bool],
    function: Callable[[list[str]], int] = train,
) -> None:
    """Start the run and SIGKILL every rank as soon as `reached` says so (or the run has ended before)."""
    folder = Path(next(item for item in arguments if item.startswith("run.dir=")).removeprefix("run.dir="))
    started = ranks.start(function, [arguments], count, tmp_path)
    deadline_s = time.monotonic() + 60
    while not reached(folder) and all(process.is_alive() for process in started.processes):
        assert time.monotonic() < deadline_s, f"never got there\n{started.text()}"
        time.sleep(0.001)
    started.kill()


def slowly_saved(arguments: list[str]) -> int:
    """One rank whose checkpoints lie without a manifest for a second, so that the kill surely comes in between."""

    def write_late(path: Path, content: bytes) -> None:
        time.sleep(1)
        write_bytes_atomically(path, content)

    gptscale.checkpoint.write.write_bytes_atomically = write_late  # type: ignore[attr-defined]
    return train(arguments)


READ_SO_FAR = "read-so-far"


def train_and_tell_what_was_read(arguments: list[str]) -> int:
    """One rank that writes down, beside its run, up to which position rows were read."""
    folder = Path(next(item for item in arguments if item.startswith("run.dir=")).removeprefix("run.dir="))
    read = TrainingStream.read

    def telling(stream: TrainingStream, positions: Ints) -> Rows:
        with (folder.parent / READ_SO_FAR).open("a") as file:
            file.write(f"{positions.max() + 1}\n")
        return read(stream, positions)

    TrainingStream.read = telling  # type: ignore[method-assign]
    return train(arguments)


@pytest.mark.parametrize("order", ["full", "block"])
def test_what_was_only_prefetched_counts_for_nothing(order: str, corpus: Path, tmp_path: Path) -> None:
    """The position moves when the optimizer has stepped: a run that is killed with steps ready in memory goes on with
    the first of those that it did not take."""
    extra = [*layout("plain", 0), f"data.order={order}", "data.block_sequences=4", "data.window_blocks=3"]
    run_training([*small_run(corpus, tmp_path / "whole"), *extra], 1, tmp_path)
    killed = [*small_run(corpus, tmp_path / "killed"), *extra, "checkpoint.every_steps=2", "evaluation.every_steps=0"]
    newest = tmp_path / "killed" / "checkpoints" / "step-00000004"
    kill_when(killed, 1, tmp_path, lambda _: (newest / "manifest.json").exists(), train_and_tell_what_was_read)
    assert steps_in(tmp_path / "killed") < 12, "the run ended before it was killed"
    read = max(int(line) for line in (tmp_path / READ_SO_FAR).read_text().split())
    for saved in list_checkpoints(tmp_path / "killed" / "checkpoints"):
        manifest = read_manifest(saved)
        position = manifest.state["progress"]["position"]["samples"]
        assert position == 8 * manifest.step
        assert read >= position + 2 * 8, "nothing was prefetched"
    run_training(killed, 1, tmp_path)
    expected, found = (
        [line["data/sample_hash"] for line in read_metrics(tmp_path / name) if "train/loss" in line]
        for name in ("whole", "killed")
    )
    assert found == expected


def test_dropout_and_evaluation_are_really_on(corpus: Path, tmp_path: Path) -> None:
    """Negative controls of the test above: without dropout the losses differ, and another seed changes the samples."""
    arguments = [*small_run(corpus, tmp_path / "a"), *layout("plain", 0)]
    run_training(arguments, 1, tmp_path)
    run_training([*small_run(corpus, tmp_path / "b"), *layout("plain", 0), "model.dropout=0"], 1, tmp_path)
    run_training([*small_run(corpus, tmp_path / "c"), *layout("plain", 0), "run.seed=1"], 1, tmp_path)
    first, dry, other = (read_metrics(tmp_path / name) for name in "abc")
    assert [line.get("train/loss") for line in first] != [line.get("train/loss") for line in dry]
    assert [line.get("data/sample_hash") for line in first] == [line.get("data/sample_hash") for line in dry]
    assert first[0]["data/sample_hash"] != other[0]["data/sample_hash"]
    assert set(EXACT) - SOME_RUNS_ONLY <= {key for line in first for key in line}


def test_any_layout_goes_on_from_any_other(corpus: Path, tmp_path: Path) -> None:
    """Without dropout (whose masks belong to ranks), a run that changes layout at every stop keeps samples and losses.

    The tolerance is the design's: fp32, losses within 1e-4 over tens of steps. Measured here: below 2e-6.
    """
    base = [*small_run(corpus, tmp_path / "whole"), "model.dropout=0"]
    run_training([*base, *layout("plain", 0)], 1, tmp_path)
    expected = read_metrics(tmp_path / "whole")
    moving = [*small_run(corpus, tmp_path / "moving"), "model.dropout=0"]
    for steps, (engine, stage), count, micro_batch in (
        (4, ("plain", 0), 1, 8),
        (6, ("deepspeed", 3), 2, 2),
        (8, ("deepspeed", 1), 2, 1),
        (10, ("deepspeed", 2), 1, 4),
        (12, ("deepspeed", 0), 2, 2),
    ):
        extra = [f"train.steps={steps}", "schedule.total_steps=12", f"train.micro_batch={micro_batch}"]
        run_training([*moving, *layout(engine, stage), *extra], count, tmp_path)
    found = {line["step"]: line for line in read_metrics(tmp_path / "moving") if "train/loss" in line}
    for line in expected:
        if "train/loss" in line:
            assert found[line["step"]]["data/sample_hash"] == line["data/sample_hash"]
            assert found[line["step"]]["train/loss"] == pytest.approx(line["train/loss"], abs=1e-5)
            assert found[line["step"]]["train/grad_norm"] == pytest.approx(line["train/grad_norm"], rel=1e-4)


def test_a_finished_run_is_left_untouched(corpus: Path, tmp_path: Path) -> None:
    arguments = [*small_run(corpus, tmp_path / "run"), *layout("plain", 0)]
    run_training(arguments, 1, tmp_path)
    # The last checkpoint is what makes a run finished: all else is there by then, or a kill in between would lose it.
    last = tmp_path / "run" / "checkpoints" / "step-00000012" / "manifest.json"
    assert (tmp_path / "run" / "report.html").stat().st_mtime_ns < last.stat().st_mtime_ns
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    started = run_training(arguments, 1, tmp_path)
    assert "is done" in started.outputs[0].read_text()
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_a_run_from_a_named_checkpoint_goes_on_when_the_command_is_given_again(corpus: Path, tmp_path: Path) -> None:
    """As a requeued job gives it. Here the checkpoint is the run's own, and retention deletes it on the way."""
    base = [*layout("plain", 0), "schedule.total_steps=12", "checkpoint.every_steps=2", "checkpoint.keep=2"]
    arguments = [*small_run(corpus, tmp_path / "run"), *base]
    run_training([*arguments, "train.steps=6"], 1, tmp_path)
    first = tmp_path / "run" / "checkpoints" / "step-00000004"
    again = [*arguments, f"run.resume={first}"]
    run_training([*again, "train.steps=8"], 1, tmp_path)
    assert started_after(tmp_path / "run") == [4]
    run_training([*again, "train.steps=10"], 1, tmp_path)
    assert not first.exists()
    run_training(again, 1, tmp_path)
    assert started_after(tmp_path / "run") == [4, 8, 10]
    started = run_training([*arguments, f"run.resume={tmp_path / 'other'}"], 1, tmp_path, code=2)
    assert "is not a checkpoint" in started.text()


def started_after(folder: Path) -> list[int]:
    """The steps from which the run has gone on, as its log tells."""
    log = (folder / "logs" / "rank-0.log").read_text()
    return [int(step) for step in re.findall(r"from step (\d+)", log)]


def test_a_longer_run_goes_on_without_reordering(corpus: Path, tmp_path: Path) -> None:
    arguments = [*small_run(corpus, tmp_path / "run"), *layout("plain", 0), "schedule.total_steps=12"]
    run_training([*arguments, "train.steps=6"], 1, tmp_path)
    run_training(arguments, 1, tmp_path)
    run_training([*small_run(corpus, tmp_path / "whole"), *layout("plain", 0), "schedule.total_steps=12"], 1, tmp_path)
    steps = [
        [line for line in exact_part(read_metrics(tmp_path / name)) if "train/loss" in line]
        for name in ("run", "whole")
    ]
    assert steps[0] == steps[1]
