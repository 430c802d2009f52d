"""Advice follows the settings and what was held; every fix that it names can be composed and passes the rules."""

from __future__ import annotations

import pytest

from gptscale.config.build import build, defaults
from gptscale.config.compose import compose
from gptscale.config.rules import check
from gptscale.config.schema import TrainRoot
from gptscale.train.memory_advice import Shortage, advice, readable

GIB = 2**30


def settings(*overrides: str) -> TrainRoot:
    """As Hydra composes them, in a hundredth of the time."""
    values = defaults(TrainRoot)
    base = ["train.steps=1", "train.global_batch=32", "train.micro_batch=4", "tokenizer.vocab_size=50257"]
    for override in [*base, "data.sequence_length=1024", *overrides]:
        key, value = OPTIONS.get(override, override).split("=")
        group, name = key.split(".")
        values[group][name] = int(value) if value.isdigit() else value
    return build(TrainRoot, values)


OPTIONS = {f"parallel=zero{stage}": f"parallel.zero_stage={stage}" for stage in range(4)}
OPTIONS["precision=bf16"] = "precision.compute=bf16"


def tried(*overrides: str, **facts: object) -> list[str]:
    shortage = {"moment": "step", "ranks": 4, "state_bytes": GIB, "rest_bytes": 4 * GIB, **facts}
    return [fix.setting for fix in advice(settings(*overrides), Shortage(**shortage))]  # type: ignore[arg-type]


MICRO, FULL, CHUNK = "train.micro_batch=2", "parallel.activation_checkpointing=full", "model.loss_chunk=256"


def test_activations_or_state_first_whichever_is_larger() -> None:
    activations = [MICRO, FULL, CHUNK]
    state = ["parallel.zero_stage=2", "launch.ranks=8"]
    assert tried() == [*activations, *state, "precision=bf16"]
    assert tried(state_bytes=8 * GIB) == [*state, *activations, "precision=bf16"]
    assert tried("precision=bf16") == [*activations, *state]


def test_what_cannot_help_is_not_named() -> None:
    assert tried("train.micro_batch=1")[0] == FULL
    assert FULL not in tried(FULL)
    assert FULL not in tried(moment="evaluation")
    assert tried(FULL, "parallel.checkpoint_interval=2")[1] == "parallel.checkpoint_interval=1"
    assert not [fix for fix in tried("parallel.pipeline=2", ranks=4) if "zero_stage" in fix]
    assert CHUNK not in tried(rest_bytes=400 * GIB)
    assert "model.loss_chunk=128" not in tried("model.loss_chunk=128")
    assert "parallel.zero_stage=4" not in tried("parallel.zero_stage=3")
    assert tried("parallel=zero0", state_bytes=8 * GIB)[:2] == [
        "parallel.zero_stage=1",
        "parallel=zero3 launch.ranks=8",
    ]
    assert tried(ranks=1, state_bytes=8 * GIB)[0] == "launch.ranks=2"
    assert tried(ranks=32, state_bytes=8 * GIB, moment="start") == [
        "parallel.zero_stage=2",
        "a smaller model.width or model.layers",
    ]


def test_what_a_gpu_cannot_hold_goes_to_the_host() -> None:
    there = {"state_bytes": 8 * GIB, "on_gpu": True}
    assert tried(**there)[:3] == ["parallel.zero_stage=2", "launch.ranks=8", "parallel.offload=cpu"]
    assert "parallel.offload=cpu" not in tried(state_bytes=8 * GIB), "a CPU has no other memory"
    for other in ("parallel.offload=cpu", "parallel.engine=plain", "parallel=zero0", "optimizer.name=muon"):
        ranks = 1 if other == "parallel.engine=plain" else 4
        assert "parallel.offload=cpu" not in tried(other, ranks=ranks, **there), other


def test_a_row_that_is_all_there_is_is_shared() -> None:
    assert "parallel.sequence=2 launch.ranks=8" in tried("train.micro_batch=1", FULL)
    assert "parallel.sequence=4 launch.ranks=8" in tried("train.micro_batch=1", FULL, "parallel.sequence=2")
    assert not [fix for fix in tried(FULL) if "sequence" in fix], "a smaller micro-batch first"
    assert not [fix for fix in tried("train.micro_batch=1", FULL, "model.heads=1") if "sequence" in fix]


def test_a_micro_batch_divides_what_a_rank_has() -> None:
    assert tried("train.global_batch=36", "train.micro_batch=9")[0] == "train.micro_batch=3"
    assert tried("train.global_batch=36", "train.micro_batch=9", ranks=1)[0] == "train.micro_batch=4"
    assert tried("train.global_batch=8", "train.micro_batch=2", ranks=4, state_bytes=8 * GIB)[1] == (
        "launch.ranks=8 train.micro_batch=1"
    )


def test_memory_in_pieces_too_small_is_told_from_too_little_memory() -> None:
    assert tried(asked_bytes=2 * GIB, unused_bytes=3 * GIB)[0].startswith("PYTORCH_CUDA_ALLOC_CONF=")
    assert tried(asked_bytes=2 * GIB, unused_bytes=GIB)[0] == MICRO


@pytest.mark.parametrize("world", [1, 4])
@pytest.mark.parametrize("layout", ["parallel=zero0", "parallel=zero2", "parallel=zero3"])
def test_every_fix_is_a_run_that_starts(world: int, layout: str) -> None:
    facts = {"ranks": world, "state_bytes": 8 * GIB}
    fixes = tried(layout, **facts)  # type: ignore[arg-type]
    assert len(fixes) >= 4
    for fix in fixes:
        overridden = settings(layout, *fix.split())
        check(overridden, overridden.launch.ranks if "launch.ranks" in fix else world)


def test_fixes_are_spelt_as_the_command_line_takes_them() -> None:
    fixes = [FULL, CHUNK, "precision=bf16", "parallel=zero3", "launch.ranks=8", "train.micro_batch=1"]
    composed = compose("train", TrainRoot, ["experiment=tiny", *fixes]).settings
    assert (composed.parallel.zero_stage, composed.model.loss_chunk, composed.precision.compute) == (3, 256, "bf16")


def test_bytes_are_readable() -> None:
    assert [readable(size) for size in (0, 1023, 1536, 5 * 2**20, 1.25 * GIB, 3 * 2**40)] == [
        "0 bytes",
        "1,023 bytes",
        "1.50 KiB",
        "5.00 MiB",
        "1.25 GiB",
        "3.00 TiB",
    ]
