"""Who takes part, with which settings."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gptscale.bench.contender import build_contenders, kernel_timer, left_out, with_kernels
from gptscale.config.compose import compose
from gptscale.config.schema import BenchConfig, BenchRoot
from gptscale.runtime.errors import UserError


def settings(*overrides: str, **bench: Any) -> BenchRoot:
    root = compose("bench", BenchRoot, overrides).settings
    return replace(root, bench=BenchConfig(**bench))


def test_one_rank_has_a_bare_loop_for_reference_every_engine_and_peers() -> None:
    contenders = build_contenders(settings())
    engine_names = ["plain", "zero0", "zero1", "zero2", "zero3"]
    peers = ["nanogpt", "nanogpt-fused", "hf-gpt2", "hf-gpt2-eager"]
    assert [c.name for c in contenders] == ["bare", *engine_names, *peers, "products", "matmul"]
    assert [c.kind for c in contenders] == ["bare", *["engine"] * 5, *["peer"] * 4, "products", "matmul"]
    engines = {c.name: (c.settings.parallel.engine, c.settings.parallel.zero_stage) for c in contenders[1:6]}
    assert engines["plain"][0] == "plain"
    assert {name: engine for name, engine in engines.items() if name != "plain"} == {
        f"zero{stage}": ("deepspeed", stage) for stage in range(4)
    }


def test_contenders_differ_in_their_engine_alone() -> None:
    contenders = build_contenders(settings())
    same = contenders[0].settings.parallel
    assert len({replace(c.settings, parallel=same) == contenders[0].settings for c in contenders}) == 1
    assert {(c.ranks, c.threads, c.split) for c in contenders} == {(1, 1, contenders[0].split)}


LLAMA = [
    "model.positions=rope",
    "model.norm=rmsnorm",
    "model.feedforward=swiglu",
    "model.bias=false",
    "model.kv_heads=2",
]


def test_a_peer_takes_part_where_it_can_compute_the_same() -> None:
    llama = settings(*LLAMA)
    assert [c.name for c in build_contenders(llama) if c.kind == "peer"] == ["hf-llama", "hf-llama-eager"]
    assert set(left_out(llama)) == {"nanogpt", "nanogpt-fused", "hf-gpt2", "hf-gpt2-eager"}
    for changed in ("model.qk_norm=true", "model.logit_softcap=30", "model.dropout=0.1"):
        assert len(left_out(settings(*LLAMA, changed))) == 6, changed
    assert set(left_out(settings("data.document_mask=true")).values()) >= {"it has no document masks"}
    assert left_out(settings(contenders=("plain",))) == {}
    with pytest.raises(UserError, match="hf-llama cannot take part: it has no model"):
        build_contenders(settings(contenders=("hf-llama",)))


def test_ours_can_be_measured_with_something_changed() -> None:
    names = ("full-loss", "attention-blocked", "compile", "optimizer-muon")
    contenders = {c.name: c for c in build_contenders(settings(contenders=names))}
    assert list(contenders) == ["bare", *names, "matmul"]
    assert {c.kind for name, c in contenders.items() if name in names} == {"bare"}
    assert contenders["full-loss"].settings.model.loss_chunk == 512
    assert contenders["attention-blocked"].settings.train.attention_kernel == "blocked"
    assert contenders["compile"].settings.train.compile == "block"
    assert contenders["optimizer-muon"].settings.optimizer.name == "muon"
    assert [name for name, c in contenders.items() if not c.same_work] == ["optimizer-muon"]


def test_ours_take_the_kernels_that_were_timed_unless_they_name_one() -> None:
    names = ("plain", "nanogpt", "attention-blocked")
    contenders = build_contenders(settings(contenders=names))
    timer = kernel_timer(contenders[0])
    assert (timer.kind, timer.ranks, timer.settings.parallel.engine) == ("kernels", 1, "plain")
    found = {c.name: c.kernels for c in (with_kernels(c, {"full": "sdpa"}) for c in contenders)}
    timed = {"full": "sdpa"}
    assert found == {"bare": timed, "plain": timed, "nanogpt": {}, "attention-blocked": {}, "matmul": {}}


def test_several_ranks_are_compared_with_ddp() -> None:
    contenders = build_contenders(settings(ranks=2, contenders=("zero2",)))
    assert [(c.name, c.kind, c.ranks) for c in contenders] == [
        ("ddp", "ddp", 2),
        ("zero2", "engine", 2),
        ("matmul", "matmul", 2),
    ]
    assert contenders[0].split.accumulation * 2 == build_contenders(settings())[0].split.accumulation


def test_an_experiment_is_measured_as_it_would_train() -> None:
    composed = settings("experiment=first", "model.layers=3", ranks=2)
    first = build_contenders(composed)[0].settings
    assert (first.model.layers, first.model.width) == (3, composed.model.width)
    assert first.model.positions == "rope"
    assert first.train.micro_batch == composed.train.micro_batch


@pytest.mark.parametrize(
    ("bench", "lines"),
    [
        ({"contenders": ("zer2",)}, "there is no 'zer2'\ndid you mean zero2\\?"),
        ({"contenders": ("plain",), "ranks": 2}, "there is no 'plain'\n.*ddp, zero0"),
        ({"contenders": ("ddp",)}, "there is no 'ddp'\nwith bench.ranks=1 there are: bare"),
        ({"ranks": 3}, "train.global_batch"),
    ],
)
def test_what_cannot_be_is_answered_with_what_can(bench: dict[str, Any], lines: str) -> None:
    with pytest.raises(UserError, match=lines):
        build_contenders(settings(**bench))


def test_half_precision_has_no_bare_loop_beside_it() -> None:
    with pytest.raises(UserError, match="the bare loop does not scale its loss"):
        build_contenders(settings("precision=fp16"))


@pytest.mark.parametrize("key", ["rounds", "steps_per_turn", "warmup_steps", "ranks", "threads"])
def test_nothing_is_measured_zero_times(key: str) -> None:
    with pytest.raises(UserError, match=f"bench.{key}=0 is below 1\nset bench.{key}=1"):
        build_contenders(settings(**{key: 0}))
