"""Which attention kernels a run takes, and from where it knows."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from gptscale.config.schema import DataConfig, ModelConfig, RunConfig, TrainConfig, TrainRoot
from gptscale.model.attention import Attention
from gptscale.model.gpt import GPT
from gptscale.parallel.ranks import Ranks
from gptscale.runtime.errors import UserError
from gptscale.runtime.process import ALONE
from gptscale.train import kernels
from gptscale.train.kernels import as_json, check_kernel, choose_kernels, described, kept, layer_cases
from gptscale.train.setup import check_blocks

MODEL = ModelConfig(layers=3, width=32, heads=4, attention_pattern=("full", "window"), window=16)
CPU = torch.device("cpu")


def chosen(
    settings: TrainRoot, recorded: dict[str, str], monkeypatch: pytest.MonkeyPatch, times_s: dict[str, float] | None
) -> tuple[kernels.Choice, GPT, int]:
    """The choice where timing gives `times_s`, the model in which it is set, and how often kernels were timed."""
    calls = []

    def time_kernels(*asked: Any) -> dict[str, float]:
        calls.append(asked)
        assert times_s is not None, "nothing was to be timed"
        return times_s

    monkeypatch.setattr(kernels, "time_kernels", time_kernels)
    model = GPT(settings.model, 100, settings.data.sequence_length, torch.float32)
    choice = choose_kernels(model, settings, None, recorded, Ranks(ALONE, deepspeed=False, timeout_s=60))
    return choice, model, len(calls)


def run(model: ModelConfig = MODEL, **train: Any) -> TrainRoot:
    return TrainRoot(model=model, data=DataConfig(sequence_length=64), train=TrainConfig(steps=1, **train))


def used(model: GPT) -> list[str]:
    return [module.kernel for module in model.modules() if isinstance(module, Attention)]


def test_the_fastest_is_taken_for_each_kind_of_layer_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    choice, model, calls = chosen(run(), {}, monkeypatch, {"sdpa": 2.0, "blocked": 1.0})
    assert calls == 1, "windows have one kernel on a CPU: nothing to time"
    assert used(model) == ["blocked", "blocked", "blocked"]
    assert kept(choice, {}) == {"full": "blocked"}
    assert described(choice).startswith(
        "full attention by blocked (timed: sdpa 2000.00 ms, blocked 1000.00 ms); window"
    )
    recorded = json.loads(as_json(choice, "cpu"))
    assert recorded["layers"]["full"] == {
        "kernel": "blocked",
        "how": "timed: sdpa 2000.00 ms, blocked 1000.00 ms",
        "seconds": {"sdpa": 2.0, "blocked": 1.0},
    }
    choice, model, _ = chosen(run(), {}, monkeypatch, {"sdpa": 1.1, "blocked": 1.0})
    assert used(model) == ["sdpa", "blocked", "sdpa"]
    assert kept(choice, {}) == {"full": "sdpa"}


def test_a_recorded_choice_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    choice, model, _ = chosen(run(), {"full": "blocked"}, monkeypatch, None)
    assert used(model) == ["blocked", "blocked", "blocked"]
    assert kept(choice, {}) == {"full": "blocked"}


def test_a_session_by_a_named_kernel_forgets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = {"full": "blocked"}
    named, model, _ = chosen(run(attention_kernel="sdpa"), recorded, monkeypatch, None)
    assert used(model)[0] == "sdpa"
    assert kept(named, recorded) == recorded


def test_a_recorded_kernel_that_is_gone_is_timed_again_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kernels.LOG, "propagate", True)
    choice, model, calls = chosen(run(), {"full": "flash"}, monkeypatch, {"sdpa": 1.0, "blocked": 3.0})
    assert calls == 1
    assert used(model)[0] == "sdpa"
    assert kept(choice, {}) == {"full": "sdpa"}
    assert "full attention was by flash, which cannot be used here" in caplog.text


def test_nothing_is_timed_where_the_settings_say_which(monkeypatch: pytest.MonkeyPatch) -> None:
    choice, model, _ = chosen(run(attention_kernel="blocked"), {"full": "sdpa"}, monkeypatch, None)
    assert used(model) == ["blocked", "blocked", "blocked"]
    assert kept(choice, {}) == {}, "what the settings say is not what timing said"
    deterministic = replace(run(), run=RunConfig(deterministic=True))
    choice, model, _ = chosen(deterministic, {}, monkeypatch, None)
    assert used(model) == ["sdpa", "blocked", "sdpa"]
    fastest = replace(run(attention_kernel="fastest"), run=RunConfig(deterministic=True))
    assert chosen(fastest, {}, monkeypatch, {"sdpa": 1.0, "blocked": 1.0})[2] == 1
    dropped = replace(MODEL, dropout=0.1)
    assert used(chosen(run(dropped), {}, monkeypatch, None)[1]) == ["blocked", "blocked", "blocked"]


def test_a_shape_that_is_too_large_is_left_to_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    choice, model, _ = chosen(run(), {}, monkeypatch, {})
    assert used(model) == ["sdpa", "blocked", "sdpa"]
    assert "too large" in choice["full"].how


def test_a_kernel_that_cannot_do_a_layer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    full = replace(MODEL, attention_pattern=("full",), window=None)
    documents = replace(run(full, attention_kernel="sdpa"), data=DataConfig(sequence_length=64, document_mask=True))
    for settings, words in (
        (run(attention_kernel="sdpa"), "cannot do layers of window attention here: it would need a whole T×T mask"),
        (documents, "cannot do layers with document masks here"),
        (run(full, attention_kernel="flex"), "backward on CUDA only"),
        (run(full, attention_kernel="flash"), "not installed"),
        (run(replace(full, dropout=0.1), attention_kernel="sdpa"), "no CPU kernel with dropout"),
    ):
        model = GPT(settings.model, 100, 64, torch.float32)
        with pytest.raises(UserError, match=words) as refused:
            check_kernel(model, settings, CPU)
        assert str(refused.value).count("\n") == 1
    for kernel in ("auto", "fastest", "blocked"):
        check_kernel(GPT(MODEL, 100, 64, torch.float32), run(attention_kernel=kernel), CPU)
    short = replace(run(), data=DataConfig(sequence_length=16))
    assert {case.window for case in layer_cases(GPT(MODEL, 100, 16, torch.float32), short, CPU).values()} == {None}


def test_a_block_that_knows_no_documents_is_refused() -> None:
    model = GPT(MODEL, 100, 64, torch.float32)
    check_blocks(model, "gpt")
    model.blocks[1] = torch.nn.Linear(32, 32)
    with pytest.raises(UserError, match="the block mine takes no documents"):
        check_blocks(model, "mine")
