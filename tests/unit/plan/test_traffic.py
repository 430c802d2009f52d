"""The formulas against numbers that were worked out by hand. That real ranks send as much: `tests/parity`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gptscale.config.schema import ModelConfig, ParallelConfig
from gptscale.plan.bubble import bubble, uneven_bubble
from gptscale.plan.collectives import on_the_wire, wire_bytes
from gptscale.plan.traffic import Step, Transfer, payload, step_traffic
from gptscale.topology import Topology, split_batch

# Embedding 128 × 8 and 4 positions × 8; two blocks of q, k, v, o 4·64, up and down 2·256, and no bias; norms 5 × 8.
MODEL = ModelConfig(layers=2, width=8, heads=2, bias=False)
TABLE, POSITIONS, BLOCK, NORM = 1024, 32, 768, 8
MATRICES, VECTORS = TABLE + 2 * BLOCK, POSITIONS + 5 * NORM
TOKENS = 4


def step(ranks: int, accumulation: int = 3, model: ModelConfig = MODEL, compute: Any = "fp32", **parallel: Any) -> Step:
    config = ParallelConfig(**parallel)
    topology = Topology(ranks, config.pipeline, config.sequence, config.tensor)
    split = split_batch(2 * accumulation * topology.data, 2, topology.data)
    return Step(model, 100, TOKENS, TOKENS, compute, config, topology, split)


def by_purpose(step: Step, stage: int = 0) -> dict[str, list[Transfer]]:
    found: dict[str, list[Transfer]] = {}
    for transfer in step_traffic(step, stage):
        found.setdefault(transfer.purpose, []).append(transfer)
    return found


def test_one_rank_sends_nothing() -> None:
    assert step_traffic(step(1)) == []


def test_zero_stages() -> None:
    everything = 4 * (MATRICES + VECTORS)
    stage0, stage1, stage2, stage3 = (by_purpose(step(2, zero_stage=stage)) for stage in range(4))
    assert stage0["gradients"] == [Transfer("gradients", "all-reduce", 2, everything)]
    assert "weights" not in stage0
    assert stage1["gradients"] == [Transfer("gradients", "reduce-scatter", 2, everything)]
    assert stage1["weights"] == stage2["weights"] == [Transfer("weights", "all-gather", 2, everything)]
    assert stage2["gradients"] == [Transfer("gradients", "reduce", 2, 3 * everything)]
    assert stage3["gradients"] == [Transfer("gradients", "reduce-scatter", 2, 3 * everything)]
    assert stage3["weights"] == [Transfer("weights", "all-gather", 2, everything)], "all are small enough to stay"
    # tokens as int64 and the loss; from stage 1 on the norm, of each of two groups in stage 3
    assert [sum(t.payload_bytes for t in s["numbers"]) for s in (stage0, stage1, stage2, stage3)] == [12, 16, 16, 20]


def test_flat_groups_are_filled_up() -> None:
    odd = replace(MODEL, width=6, head_width=3, vocab_multiple=1)
    # Each of both groups to a multiple of 2 · 4: matrices 100·6 + 2 · (4·36 + 2·144), vectors 4·6 + 5·6.
    (weights,) = by_purpose(step(4, model=odd))["weights"]
    assert weights.payload_bytes == 4 * (1464 + 56)
    # In stage 3 each parameter to a multiple of 4: of 6-vectors five, and 24 positions.
    (weights,) = by_purpose(step(4, model=odd, zero_stage=3))["weights"]
    assert weights.payload_bytes == 4 * (1464 + 24 + 5 * 8)


def test_stage_3_gathers_large_weights_in_every_micro_batch_and_far_ones_twice() -> None:
    # 4·512² + 2·512·2048 a block: its matrices are above 100,000 elements, and so is the table.
    large = replace(MODEL, width=512, heads=2)
    table, block, small = 128 * 512, 4 * 512**2 + 2 * 512 * 2048, 5 * 512 + 4 * 512
    (weights,) = by_purpose(step(2, model=large, zero_stage=3))["weights"]
    assert weights.payload_bytes == 4 * (3 * 2 * block + table + small)
    # Of 400 such blocks, 1.26e9 elements, 318 and the table are the most that are below 1e9: the first 81 go and come.
    deep = replace(large, layers=400)
    (weights,) = by_purpose(step(2, model=deep, zero_stage=3))["weights"]
    assert weights.payload_bytes == 4 * (3 * (400 + 82) * block + table + (2 * 400 + 1) * 512 + 4 * 512)


@pytest.mark.parametrize(("compute", "size"), [("fp32", 4), ("bf16", 2)])
def test_tensor_parallel_sums(compute: str, size: int) -> None:
    tokens = 3 * 2 * TOKENS
    (found,) = by_purpose(step(2, tensor=2, compute=compute))["tensor"]
    blocks, embedding, head, of_each_token = 4 * 2 * tokens * 8 * size, tokens * 8 * 4, tokens * 8 * size, 3 * 4
    assert found == Transfer("tensor", "all-reduce", 2, blocks + embedding + head + tokens * of_each_token)
    again = by_purpose(step(2, tensor=2, compute=compute, activation_checkpointing="full"))["tensor"][0]
    assert again.payload_bytes - found.payload_bytes == 2 * tokens * 8 * size
    every_second = {"activation_checkpointing": "full", "checkpoint_interval": 2}
    again = by_purpose(step(2, tensor=2, compute=compute, **every_second))["tensor"][0]
    assert again.payload_bytes - found.payload_bytes == tokens * 8 * size
    (normed,) = by_purpose(step(2, tensor=2, compute=compute, model=replace(MODEL, qk_norm=True)))["tensor"]
    assert normed.payload_bytes - found.payload_bytes == 3 * 2 * 2 * 4 * 4


def test_sequence_parallel_exchanges() -> None:
    grouped = replace(MODEL, heads=4, kv_heads=2)
    tokens = 3 * 2 * TOKENS
    (found,) = by_purpose(step(2, sequence=2, model=grouped, compute="bf16"))["sequence"]
    # Of half a row's tokens, 2 features of 4 + 2 + 2 + 4 heads, forward and backward, in two layers.
    assert found == Transfer("sequence", "all-to-all", 2, 2 * 2 * tokens // 2 * 2 * 12 * 2)
    (gradients,) = by_purpose(step(2, sequence=2))["gradients"]
    assert gradients.ranks == 2, "stretches of a row are replicas"


def test_pipeline_sends_and_sums_its_tied_weight() -> None:
    four = replace(MODEL, layers=4)
    stages = [by_purpose(step(4, model=four, pipeline=4), stage) for stage in range(4)]
    activation = 3 * 2 * TOKENS * 8 * 4
    sent = [stage["pipeline"] for stage in stages]
    assert sent == [[Transfer("pipeline", "send", 2, times * activation)] for times in (1, 2, 2, 1)]
    tied = [Transfer("tied embedding", "all-reduce", 2, 4 * TABLE)]
    assert [stage.get("tied embedding", []) for stage in stages] == [tied, [], [], tied]
    untied = replace(four, tied_embeddings=False)
    assert "tied embedding" not in by_purpose(step(4, model=untied, pipeline=4), 3)
    (halved,) = by_purpose(step(4, model=four, pipeline=2, tensor=2), 1)["tied embedding"]
    assert halved.payload_bytes == 2 * TABLE
    # ZeRO-1 within a stage: two of four blocks, and the table at both ends.
    weights = [by_purpose(step(4, model=four, pipeline=2), stage)["weights"][0].payload_bytes for stage in (0, 1)]
    assert weights == [4 * (TABLE + 2 * BLOCK + POSITIONS + 4 * NORM), 4 * (TABLE + 2 * BLOCK + 5 * NORM)]
    uneven = step(4, model=four, pipeline=2, pipeline_layers=(3, 1))
    assert by_purpose(uneven)["weights"][0].payload_bytes - weights[0] == 4 * (BLOCK + 2 * NORM)


def test_rings() -> None:
    assert [wire_bytes("all-reduce", 100, n) for n in (2, 4)] == [100, 150]
    for operation in ("reduce-scatter", "all-gather", "all-to-all"):
        assert [wire_bytes(operation, 100, n) for n in (2, 4)] == [50, 75]
    assert [wire_bytes(operation, 100, 4) for operation in ("broadcast", "send")] == [100, 100]
    # What ZeRO-1 sends is what an all-reduce does (Rajbhandari et al., section 7.1), but for a number of the norm.
    stage0, stage1 = (payload(step_traffic(step(4, zero_stage=stage))) for stage in (0, 1))
    assert on_the_wire(stage1) - on_the_wire(stage0) == wire_bytes("all-reduce", 4, 4)
    assert on_the_wire(stage0) == sum(t.wire_bytes for t in step_traffic(step(4, zero_stage=0)))


def test_a_bubble_is_what_a_schedule_leaves_empty() -> None:
    for stages, micro_batches in ((1, 4), (2, 2), (2, 8), (4, 4)):
        # One row a stage: forward of micro-batch m in turn s + m, backwards of all in the same order reversed.
        turns = 2 * (micro_batches + stages - 1)
        busy = {(stage, stage + micro) for stage in range(stages) for micro in range(micro_batches)}
        empty = stages * turns - 2 * len(busy)
        assert bubble(stages, micro_batches) == pytest.approx(empty / (stages * turns))
        assert uneven_bubble([2.5] * stages, micro_batches) == pytest.approx(bubble(stages, micro_batches))
    assert (bubble(2, 2), bubble(4, 4)) == (1 / 3, 3 / 7)
    # Stages of 1 and 2 seconds, two micro-batches: 1 + 2 + 2 seconds, of which the first works 2 and the second 4.
    assert uneven_bubble([1, 2], 2) == uneven_bubble([2, 1], 2) == pytest.approx(1 - 6 / (2 * 5))
