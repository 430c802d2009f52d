"""Real ranks hand over what the formulas say, byte for byte, and the comparison notices where they do not."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch.distributed as dist

from gptscale.bench.compare_layouts import check_sent
from gptscale.bench.contender import Contender, one_step
from gptscale.bench.group import BenchError
from gptscale.bench.layouts import build_layouts, expected
from gptscale.bench.workload import build_workload
from gptscale.config.compose import compose
from gptscale.config.schema import BenchLayoutsRoot, BenchRoot
from gptscale.parallel.ranks import Ranks
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
        return " ".join([f"{self.name} of {self.size}", *self.settings[-1:]])


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
    Case("tensor2-norms", 2, (*MODERN, *AGAIN)),
    Case("tensor2-norms", 2, (*BF16, "parallel.activation_checkpointing=selective")),
    Case("pipeline2-tensor2-norms", 4),
    Case("pipeline2", 2, (*BF16, "parallel.pipeline_layers=[3,1]")),
    Case("pipeline2-tensor2", 4, tuple(AGAIN)),
    Case("pipeline4", 4),
    Case("pipeline2", 6, ("train.global_batch=12",)),
    Case("tensor2-sequence2", 4, ("parallel.activation_checkpointing=selective",)),
)


def contender(case: Case) -> Contender:
    overrides = [*SMALL, *case.settings, f"bench.ranks={min(case.size, 4)}", f"bench.contenders=[{case.name}]"]
    found, _ = build_layouts(compose("bench_layouts", BenchLayoutsRoot, overrides).settings)
    chosen = next(one for one in found if one.name == case.name)
    if case.size <= 4:
        return chosen
    settings = chosen.settings
    assert isinstance(settings, BenchRoot)
    return one_step(case.name, chosen.kind, replace(settings, bench=replace(settings.bench, ranks=case.size)))


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


NEAR = [
    "parallel.deepspeed.zero_optimization.stage3_max_reuse_distance=700000",
    "parallel.deepspeed.zero_optimization.stage3_prefetch_bucket_size=1",
]
"""Elements: of two blocks there are more, of one fewer."""


def test_weights_that_are_let_go_are_gathered_again(tmp_path: Path) -> None:
    """Where their next use is far, which in small models it is not."""
    near, far = Case("zero3", 2, (*LARGE, "model.layers=3")), Case("zero3", 2, (*LARGE, "model.layers=3", *NEAR))
    assert expected(contender(near)) != expected(contender(far)), "a distance that makes no difference shows nothing"
    ranks.run(count, [far], 2, tmp_path)
