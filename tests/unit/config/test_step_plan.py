"""The batch ramp and the sequence-length schedule."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptscale.config.rules import check
from gptscale.config.schema import DataConfig, ScheduleConfig, TrainConfig, TrainRoot
from gptscale.config.step_plan import StageStart, StepPlan, run_steps, schedule_tokens, step_plan
from gptscale.runtime.errors import UserError


@st.composite
def plans(draw: st.DrawFn) -> StepPlan:
    start, doublings = draw(st.integers(1, 8)), draw(st.integers(0, 4))
    return StepPlan(
        global_batch=start * draw(st.integers(1, 9)),
        sequence_length=4 << doublings,
        ramp_from=start,
        ramp_samples=draw(st.integers(0, 400)),
        length_from=4,
        length_samples=draw(st.integers(0, 400)),
    )


@given(plans(), st.integers(0, 120))
def test_whole_stretches_are_what_single_steps_add_up_to(plan: StepPlan, steps: int) -> None:
    lengths, batches = walked(plan, steps)
    assert lengths == sorted(lengths)
    assert batches == sorted(batches)
    assert all(plan.sequence_length % length == 0 for length in lengths)


def walked(plan: StepPlan, steps: int) -> tuple[list[int], list[int]]:
    """Sequence lengths and batches of the steps, one by one; what the plan says of all together has to agree."""
    used, tokens, lengths, batches = 0, 0, [], []
    for step in range(steps):
        assert plan.steps_to(used) == step
        assert plan.at_tokens(tokens) == (step, used, tokens)
        lengths.append(plan.length(used))
        batches.append(plan.batch(used))
        tokens += batches[-1] * plan.row_length(used)
        used += batches[-1]
    assert plan.samples_after(steps) == used
    assert plan.tokens_after(steps) == tokens
    assert plan.steps_to(used) == steps
    assert plan.steps_to(used + 1) == steps + 1
    assert plan.at_tokens(tokens + 1).steps == steps + 1
    return lengths, batches


@given(plans(), st.lists(st.tuples(st.integers(1, 3000), st.integers(-2, 2)), max_size=4), st.integers(0, 150))
def test_stages_begin_on_whole_steps_that_keep_their_tokens(
    plan: StepPlan, wanted: list[tuple[int, int]], steps: int
) -> None:
    """Of lengths 2^n times as long, where a step's tokens allow it; starts are the first steps to have the tokens."""
    grown = max(plan.ramp_samples, plan.length_samples) * plan.sequence_length
    for more, doublings in wanted:
        length = plan.sequence_length * 2**doublings if doublings >= 0 else plan.sequence_length >> -doublings
        if (plan.global_batch * plan.sequence_length) % length:
            continue
        before = plan.at_tokens(grown + more)
        plan = replace(plan, stages=(*plan.stages, StageStart(before.samples, length)))
        grown += more
        assert plan.at_tokens(grown) == before, "a stage changes nothing before it"
        assert plan.batch(before.samples) * length == plan.global_batch * plan.sequence_length
    walked(plan, steps)


def test_gpt3s_ramp() -> None:
    """175B: from 32k tokens to 3.2M over 12B tokens, 300B in all; about 94k steps at the full batch."""
    plan = StepPlan(1600, 2048, ramp_from=16, ramp_samples=12_000_000_000 // 2048)
    assert plan.batch(0) == 16
    assert plan.batch(plan.ramp_samples // 2) == pytest.approx(808, abs=16)
    assert plan.batch(plan.ramp_samples) == 1600
    full = 300_000_000_000 // 2048 // 1600
    # 99 levels of 16, 32, … sequences share the ramp's R samples: Σ (R / 99) / 16k steps, in place of R / 1600.
    extra = plan.ramp_samples * (sum(1 / k for k in range(1, 100)) / 1584 - 1 / 1600)
    assert plan.steps_to(300_000_000_000 // 2048) == pytest.approx(full + extra, rel=1e-3)


def test_the_schedule_ends_where_it_is_told_to() -> None:
    root = TrainRoot(
        train=TrainConfig(tokens=100_000, global_batch=8, micro_batch=2), data=DataConfig(sequence_length=64)
    )
    assert run_steps(root) == 196
    assert schedule_tokens(root) == 196 * 512
    assert schedule_tokens(replace(root, schedule=ScheduleConfig(total_steps=10))) == 5120
    assert schedule_tokens(replace(root, schedule=ScheduleConfig(decay_tokens=777))) == 777
    ramped = replace(root, train=replace(root.train, ramp_from=2, ramp_tokens=6400))
    assert run_steps(ramped) > 196
    assert step_plan(ramped).samples_after(run_steps(ramped)) * 64 == schedule_tokens(ramped)


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ({"ramp_from": 4}, ["train.ramp_tokens"]),
        ({"length_tokens": 4}, ["train.length_from"]),
        ({"ramp_from": 3, "ramp_tokens": 100}, ["train.ramp_from=3", "train.ramp_from=2"]),
        ({"ramp_from": 2, "ramp_tokens": 100, "micro_batch": 1}, ["4 data ranks"]),
        ({"length_from": 24, "length_tokens": 100}, ["train.length_from=24", "train.length_from=16"]),
        ({"length_from": 128, "length_tokens": 100}, ["train.length_from=128"]),
        ({"ramp_from": 0, "ramp_tokens": 100}, ["train.ramp_from=0"]),
    ],
)
def test_ramps_that_cannot_be(train: dict[str, int], words: list[str]) -> None:
    root = TrainRoot(
        train=replace(TrainConfig(steps=10, global_batch=8, micro_batch=2), **train),  # type: ignore[arg-type]
        data=DataConfig(sequence_length=64),
    )
    with pytest.raises(UserError) as error:
        check(root, 4)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert len(str(error.value).splitlines()) == 2
