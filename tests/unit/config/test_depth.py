"""`model.depth` makes a family; what somebody sets stays; what cannot go together is refused."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest

from gptscale.config import compose as compose_module
from gptscale.config.compose import compose
from gptscale.config.depth import DERIVED_KEYS, batch_tokens, family_parameters, learning_rate, training_flops
from gptscale.config.rules import check
from gptscale.config.schema import TrainRoot
from gptscale.model.count import parameter_count
from gptscale.runtime.errors import UserError
from tests.helpers.processes import REPOSITORY


def composed(*overrides: str) -> TrainRoot:
    return compose("train", TrainRoot, overrides).settings


def at(depth: int, *overrides: str) -> TrainRoot:
    return composed("experiment=depth", f"model.depth={depth}", *overrides)


def value(settings: TrainRoot, key: str) -> object:
    group, _, name = key.partition(".")
    found: object = getattr(getattr(settings, group), name)
    return found


def test_a_family_grows_with_its_depth() -> None:
    family = [at(depth) for depth in range(1, 37)]
    counted = []
    for settings in family:
        check(settings, 1)
        check(settings, 2)
        model = settings.model
        parameters = parameter_count(model, settings.tokenizer.vocab_size, settings.data.sequence_length)
        counted.append(parameters)
        assert model.layers == model.depth
        assert model.head_width == (128 if model.width >= 1024 else 64)
        assert model.heads * (model.head_width or 0) == model.width
        # The rule's own count takes SwiGLU's width as exactly 8/3, and no norms: at most 1.3 % too few.
        estimated = family_parameters(model.layers, model.width, settings.tokenizer.vocab_size, model.tied_embeddings)
        assert estimated == pytest.approx(parameters, rel=0.015)
        assert settings.train.tokens == 20 * estimated
        assert settings.schedule.warmup_tokens == estimated
    assert counted == sorted(set(counted))
    assert counted[0] < 1e6
    assert counted[-1] > 2e9
    batches = [settings.train.global_batch for settings in family]
    rates = [settings.optimizer.learning_rate for settings in family]
    stds = [settings.model.init_std for settings in family]
    assert batches == sorted(batches)
    assert rates == sorted(rates, reverse=True)
    assert stds == sorted(stds, reverse=True)


def test_one_member_by_hand() -> None:
    settings = at(12, "tokenizer.vocab_size=32768", "data.sequence_length=2048")
    assert (settings.model.layers, settings.model.width, settings.model.heads) == (12, 768, 12)
    parameters = 12 * 12 * 768**2 + 32768 * 768
    assert settings.train.tokens == 20 * parameters == 2_202_009_600
    compute = (72 * 12 * 768**2 + 12 * 12 * 768 * 2048) * 20 * parameters
    assert settings.train.global_batch * 2048 == 2**18  # 264,000 tokens are best
    assert 0.2920 * compute**0.3271 == pytest.approx(264e3, rel=0.01)
    assert settings.optimizer.learning_rate == pytest.approx(0.3118 * compute**-0.125, rel=0.005)
    assert settings.optimizer.weight_decay == 0.1
    assert settings.model.init_std == pytest.approx(math.sqrt(2 / (5 * 768)), rel=0.005)


BY_HAND = {
    "model.layers": 7,
    "model.width": 512,
    "model.heads": 4,
    "model.head_width": 32,
    "model.init_std": 0.5,
    "train.tokens": 1_000_000,
    "train.global_batch": 24,
    "optimizer.learning_rate": 0.123,
    "schedule.warmup_tokens": 0,
}


@pytest.mark.parametrize("key", DERIVED_KEYS)
def test_what_is_set_by_hand_stays(key: str) -> None:
    wanted = BY_HAND[key]
    followed, settings = at(6), at(6, f"{key}={wanted}")
    assert value(settings, key) == wanted != value(followed, key)
    check(settings, 1)


def test_a_default_that_is_set_by_hand_stays() -> None:
    """What was set is known as such, not by its difference from a default."""
    defaults = TrainRoot()
    settings = at(6, f"train.global_batch={defaults.train.global_batch}", "optimizer.learning_rate=1e-3")
    assert settings.train.global_batch == defaults.train.global_batch != at(6).train.global_batch
    assert settings.optimizer.learning_rate == defaults.optimizer.learning_rate != at(6).optimizer.learning_rate


def test_what_a_file_sets_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(REPOSITORY / "conf", tmp_path / "conf")
    (tmp_path / "conf/experiment/mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /model: depth\n  - override /optimizer: mine\n"
        "model: {depth: 8, heads: 4}\ntrain: {global_batch: 48}\n"
    )
    (tmp_path / "conf/optimizer/mine.yaml").write_text("name: adamw\nlearning_rate: 0.01\n")
    monkeypatch.setattr(compose_module, "conf_folder", lambda: tmp_path / "conf")
    settings = composed("experiment=mine")
    assert (settings.model.width, settings.model.heads, settings.train.global_batch) == (512, 4, 48)
    assert settings.optimizer.learning_rate == 0.01
    assert composed("experiment=mine", "model.heads=2").model.heads == 2
    assert settings.schedule.warmup_tokens == composed("model=depth", "model.depth=8").schedule.warmup_tokens


def test_what_is_set_decides_on_what_follows() -> None:
    followed = at(6)
    deeper = at(6, "model.layers=24")
    assert deeper.model.width == followed.model.width
    assert (deeper.train.tokens or 0) > (followed.train.tokens or 0)
    assert deeper.optimizer.learning_rate < followed.optimizer.learning_rate
    # A batch by hand brings its own rate: by the root of what it is larger than the best one.
    compute = training_flops(6, 384, 1024, 20 * family_parameters(6, 384, 8192, tied=True))
    small = at(6, "train.global_batch=4")
    expected = learning_rate(compute) * math.sqrt(4 * 1024 / batch_tokens(compute))
    assert small.optimizer.learning_rate == pytest.approx(expected, rel=0.005)


def test_the_length_decides_on_nothing_so_that_a_run_may_go_on() -> None:
    followed = at(6)
    for length in ("train.steps=9", "train.tokens=10_000_000"):
        settings = at(6, length)
        assert settings.optimizer == followed.optimizer
        assert settings.schedule == followed.schedule
        assert settings.train.global_batch == followed.train.global_batch
    assert at(6, "train.steps=9").train.tokens is None


def test_what_is_stored_is_resolved() -> None:
    made = compose("train", TrainRoot, ["experiment=depth", "model.depth=4", "evaluation.every_steps=${model.layers}"])
    assert made.public["model"]["width"] == 256
    assert made.public["optimizer"]["learning_rate"] == made.settings.optimizer.learning_rate
    assert made.settings.evaluation.every_steps == 4
    assert "???" not in made.to_yaml()


def test_without_a_depth_nothing_follows() -> None:
    settings, defaults = composed("train.steps=1"), TrainRoot()
    for key in set(DERIVED_KEYS):
        assert value(settings, key) == value(defaults, key), key


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.depth=8"], ["model.depth=8", "model=tiny", "model.layers", "model=depth"]),
        (["model=gpt3-125m", "model.depth=8"], ["model=gpt3-125m", "leave model.depth out"]),
        (["experiment=depth", "model.depth=0"], ["model.depth=0", "model.depth=1"]),
        (["experiment=depth", "model.depth=many"], ["model.depth", "whole number"]),
        (["experiment=depth", "model.layers=0"], ["model.layers=0"]),
        (["experiment=depth", "model.layers=null"], ["model.layers", "whole number"]),
        (["experiment=depth", "model.head_width=0"], ["model.head_width=0"]),
        (["experiment=depth", "model.width=1000"], ["model.width=1000", "960 or 1024", "model.heads"]),
        (["experiment=depth", "data.sequence_length=0"], ["data.sequence_length=0"]),
        (["experiment=depth", "tokenizer.vocab_size=-99999999"], ["tokenizer.vocab_size=-99999999"]),
    ],
)
def test_what_cannot_go_together_is_refused(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as refused:
        composed(*overrides)
    assert len(str(refused.value).splitlines()) == 2
    for word in words:
        assert word in str(refused.value)
