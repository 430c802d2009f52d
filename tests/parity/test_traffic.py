"""Real ranks hand over what the formulas say, byte for byte, and the comparison notices where they do not."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch.distributed as dist

from gptscale.bench.compare_layouts import check_sent
from gptscale.bench.contender import Contender
from gptscale.bench.group import BenchError
from gptscale.bench.layouts import build_layouts
from gptscale.bench.workload import build_workload
from gptscale.config.compose import compose
from gptscale.config.schema import BenchLayoutsRoot
from gptscale.parallel import zero
from gptscale.parallel.ranks import Ranks
from gptscale.plan import traffic
from gptscale.plan.collectives import Payload
from tests.helpers import ranks

SMALL = [
    "model.layers=4",
    "model.width=32",
    "model.heads=4",
    "tokenizer.vocab_size=250",
    "data.sequence_length=16",
    "train.global_batch=8",
    "train.attention_kernel=blocked",
    "bench.micro_batches=[2]",
]
MODERN = [
    *("model.positions=rope", "model.norm=rmsnorm", "model.feedforward=swiglu", "model.bias=false", "model.kv_heads=2"),
    *("model.qk_norm=true", "model.tied_embeddings=false", "data.document_mask=true"),
]
ODD = ["model.width=18", "model.heads=3", "model.vocab_multiple=1"]
"""Nothing divides by the ranks."""
LARGE = ["model.width=192", "model.layers=2", "tokenizer.vocab_size=1000"]
"""Embedding and feed-forward are above 100,000 elements, up to which stage 3 keeps a parameter whole."""
AGAIN = ["parallel.activation_checkpointing=full", "parallel.checkpoint_interval=2"]
BF16 = ["precision=bf16"]


@dataclass(frozen=True)
class Case:
    name: str
    size: int
    settings: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.name} of {self.size}"


CASES = (
    Case("ddp", 2, (*MODERN, *ODD[:2], "model.kv_heads=3")),
    Case("fsdp2", 4, (*ODD, *AGAIN)),
    Case("zero0", 2, tuple(MODERN)),
    Case("zero1", 4, tuple(ODD)),
    Case("zero2", 2, tuple(BF16)),
    Case("zero3", 4, tuple(ODD)),
    Case("zero3", 2, (*LARGE, *AGAIN)),
    Case("tensor2", 2, (*MODERN, *AGAIN, *BF16)),
    Case("tensor2-zero3", 4, (*LARGE, "model.heads=4")),
    Case("sequence2-zero3", 2, (*MODERN, *AGAIN)),
    Case("tensor2-sequence2", 4, tuple(BF16)),
    Case("pipeline2", 2, (*BF16, "parallel.pipeline_layers=[3,1]")),
    Case("pipeline2-tensor2", 4, tuple(AGAIN)),
    Case("pipeline4", 4),
)


def contender(case: Case) -> Contender:
    overrides = [*SMALL, *case.settings, f"bench.ranks={case.size}", f"bench.contenders=[{case.name}]"]
    found, _ = build_layouts(compose("bench_layouts", BenchLayoutsRoot, overrides).settings)
    return next(one for one in found if one.name == case.name)


def count(case: Case) -> None:
    """The third step of a rank."""
    chosen = contender(case)
    with patch.dict(sys.modules):
        if chosen.kind != "engine":  # the fork server has it, and a workload of torch's own refuses it
            del sys.modules["deepspeed"]
        workload = build_workload(chosen)
    for _ in range(2):
        workload.timed_step()
    _, mine = workload.counted_step()
    everybodys: list[Payload] = [{}] * case.size
    dist.all_gather_object(everybodys, mine)
    check_sent(chosen, everybodys)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ranks_hand_over_what_the_formulas_say(case: Case, tmp_path: Path) -> None:
    ranks.run(count, [case], case.size, tmp_path)


def count_and_be_refused(case: Case) -> None:
    """Ranks that sum the loss twice."""
    once, message = Ranks.sum_tensor, "zero1: rank 0 hands 20 bytes a step to all-reduce of 2 ranks, and by formula 16"
    twice = patch.object(Ranks, "sum_tensor", lambda self, values: once(self, once(self, values)) / 2)
    with twice, pytest.raises(BenchError, match=message):
        count(case)


def test_four_bytes_too_many_are_noticed(tmp_path: Path) -> None:
    ranks.run(count_and_be_refused, [Case("zero1", 2)], 2, tmp_path)


NEAR = 700_000
"""Elements: less than a block has, and more than the head."""


def gather_again(case: Case) -> None:
    """Stage 3 where weights are far from their next use, which those of small models are not: told to both sides."""
    stock = zero.zero_config

    def near(*args: Any) -> dict[str, Any]:
        config = stock(*args)
        config["zero_optimization"] |= {"stage3_max_reuse_distance": NEAR, "stage3_prefetch_bucket_size": 0}
        return config

    with patch.object(zero, "zero_config", near), patch.object(traffic, "_REUSE_DISTANCE", NEAR):
        count(case)


def test_weights_that_are_let_go_are_gathered_again(tmp_path: Path) -> None:
    case = Case("zero3", 2, (*LARGE, "model.layers=3"))
    chosen = contender(case)
    step = traffic.Step.of(chosen.settings, chosen.split, 2)
    with patch.object(traffic, "_REUSE_DISTANCE", NEAR):
        far = traffic.step_traffic(step)
    assert far != traffic.step_traffic(step), "a distance that makes no difference shows nothing"
    ranks.run(gather_again, [case], 2, tmp_path)
