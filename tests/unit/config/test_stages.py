"""Stages of a run's data: what they may be, and which steps they take."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gptscale.config.compose import compose
from gptscale.config.rules import check
from gptscale.config.schema import CorpusConfig, DataConfig, ModelConfig, StageConfig, TrainConfig, TrainRoot
from gptscale.config.stages import longest_sequence, stage_folders
from gptscale.config.step_plan import StageStart, run_steps, schedule_tokens, step_plan
from gptscale.runtime.errors import UserError
from gptscale.topology import split_batch


def root(*stages: StageConfig, positions: str = "rope", **train: Any) -> TrainRoot:
    """A step has 16 sequences of 64 tokens: 1024."""
    return TrainRoot(
        model=ModelConfig(positions=positions),  # type: ignore[arg-type]
        train=replace(TrainConfig(steps=100, global_batch=16, micro_batch=4), **train),
        data=DataConfig(path="base", sequence_length=64, stages=stages),
    )


LONG = StageConfig("long", 20_000, sequence_length=256)
MORE = StageConfig("more", 10_000, path=(CorpusConfig("web", 3.0), CorpusConfig("books")))


def test_a_stage_is_typed_like_any_setting() -> None:
    typed = compose(
        "train",
        TrainRoot,
        [
            "experiment=tiny",
            "data.stages=[{name: more, from_tokens: 1e4, path: [{path: web, weight: 3}, {path: books}]},"
            "{name: long, from_tokens: 2e4, sequence_length: 256}]",
        ],
    )
    assert typed.settings.data.stages == (MORE, LONG)
    assert stage_folders(typed.settings.data) == ("web", "books")
    with pytest.raises(UserError, match=r"data\.stages\[0\]\.from_token'"):
        compose("train", TrainRoot, ["experiment=tiny", "data.stages=[{name: a, from_token: 3}]"])


def test_steps_keep_their_tokens_and_begin_a_stage_whole() -> None:
    settings = root(MORE, LONG, replace(LONG, name="back", from_tokens=30_000, path="base", sequence_length=32))
    split = split_batch(16, 4, 2)
    check(settings, 2)
    plan = step_plan(settings)
    # 10,000 tokens are used after 10 steps, 20,000 after 20, 30,000 after 30.
    assert plan.stages == (StageStart(160, 64), StageStart(320, 256), StageStart(360, 32))
    assert [plan.batch(start) for start in (0, 160, 319, 320, 359, 360)] == [16, 16, 16, 4, 4, 32]
    assert [plan.split(start, split).micro_batch for start in (0, 320, 360)] == [4, 1, 8]
    assert [plan.split(start, split).per_rank for start in (0, 320, 360)] == [8, 2, 16]
    assert run_steps(settings) == 100
    assert schedule_tokens(settings) == 100 * 1024
    assert run_steps(replace(settings, train=replace(settings.train, steps=None, tokens=100_000))) == 98
    assert longest_sequence(settings.data) == 256
    assert longest_sequence(root().data) == 64


def test_starts_depend_on_nothing_that_may_change_on_resume() -> None:
    settings = root(MORE, LONG)
    starts = step_plan(settings).stages
    other = replace(settings, train=replace(settings.train, steps=7, micro_batch=1))
    assert step_plan(other).stages == starts
    later = replace(
        settings, data=replace(settings.data, stages=(MORE, LONG, replace(LONG, name="x", from_tokens=9**9)))
    )
    assert step_plan(later).stages[:2] == starts


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (root(replace(MORE, name="two words")), ["data.stages[0].name", "two words"]),
        (root(MORE, replace(LONG, name="more")), ["data.stages[1]", "more"]),
        (root(LONG, MORE), ["data.stages[1].from_tokens=10000", "20000", "order of from_tokens"]),
        (root(replace(MORE, from_tokens=0)), ["data.stages[0].from_tokens=0"]),
        (root(StageConfig("idle", 10)), ["idle", "changes nothing"]),
        (root(replace(MORE, path=())), ["data.stages[0].path"]),
        (root(replace(MORE, path="")), ["data.stages[0].path"]),
        (root(MORE, replace(LONG, from_tokens=10_001)), ["long", "more", "1024 tokens"]),
        (root(replace(LONG, sequence_length=0)), ["data.stages[0].sequence_length=0"]),
        (root(replace(LONG, sequence_length=250)), ["sequence_length=250", "1024 tokens", "sequence_length=256"]),
        (root(replace(LONG, sequence_length=512)), ["4 data ranks", "sequence_length=256"]),
        (root(LONG, positions="learned"), ["learned positions", "data.sequence_length=64", "model.positions=rope"]),
        (root(LONG, ramp_from=4, ramp_tokens=30_000), ["long", "train.ramp_tokens", "30000 or more"]),
        (root(LONG, length_from=16, length_tokens=30_000), ["long", "train.length_tokens", "30000 or more"]),
    ],
    ids=lambda item: item[0] if isinstance(item, list) else "",
)
def test_stages_that_cannot_be(settings: TrainRoot, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        check(settings, 4)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert len(str(error.value).splitlines()) == 2


def test_a_step_of_a_stage_has_two_micro_batches_where_noise_is_measured() -> None:
    settings = root(replace(LONG, sequence_length=1024), noise_scale_every_steps=5, micro_batch=8)
    with pytest.raises(UserError, match="stage long=1 is one"):
        check(settings, 1)
    check(root(LONG, noise_scale_every_steps=5), 4)  # one row of each of 4 ranks


def test_a_shorter_stage_needs_no_more_positions() -> None:
    check(root(replace(LONG, sequence_length=32), positions="learned"), 4)
