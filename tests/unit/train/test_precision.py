"""What `precision` switches on, and what it makes of an overflow."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from gptscale.config.compose import compose
from gptscale.config.rules import check
from gptscale.config.schema import GuardConfig, PrecisionConfig, TrainRoot
from gptscale.parallel.ranks import Ranks
from gptscale.runtime.errors import DivergedError, UserError
from gptscale.runtime.hardware import peak_flops
from gptscale.train.facts import products
from gptscale.train.guard import Guard
from gptscale.train.setup import use_precision


@pytest.fixture(autouse=True)
def _switches_as_before() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def on(device: str, rank: int = 0) -> Ranks:
    """What `use_precision` sees of a rank: there need not be such a device."""
    return cast(Ranks, SimpleNamespace(device=torch.device(device), rank=rank))


def precision(option: str) -> PrecisionConfig:
    return compose("train", TrainRoot, ["experiment=tiny", f"precision={option}"]).settings.precision


@pytest.mark.parametrize(("option", "switch", "peak"), [("tf32", "tf32", 494.7e12), ("fp32", "ieee", 66.9e12)])
def test_tf32_is_switched_on_and_measured_against_its_own_peak(option: str, switch: str, peak: float) -> None:
    torch.set_float32_matmul_precision("highest")
    use_precision(precision(option), on("cuda"))
    assert torch.backends.cuda.matmul.fp32_precision == switch
    assert torch.backends.cuda.matmul.allow_tf32 == (option == "tf32"), "older code reads it here"
    assert peak_flops("NVIDIA H100 80GB HBM3", products(precision(option))) == pytest.approx(peak)


def test_tf32_is_ignored_on_a_cpu_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    torch.set_float32_matmul_precision("highest")
    with caplog.at_level(logging.WARNING, "gptscale.train"):
        use_precision(precision("tf32"), on("cpu"))
        use_precision(precision("tf32"), on("cpu", rank=1))
    assert [record.getMessage().split(" is ")[0] for record in caplog.records] == ["precision.tf32"]
    assert torch.get_float32_matmul_precision() == "highest"
    assert products(PrecisionConfig(compute="bf16", tf32=True)) == "bf16"


def test_fp16_is_for_gpus() -> None:
    use_precision(precision("fp16"), on("cuda"))
    with pytest.raises(UserError, match=r"precision\.compute=fp16 needs a GPU") as raised:
        use_precision(precision("fp16"), on("cpu", rank=1))
    assert str(raised.value).count("\n") == 1


@pytest.mark.parametrize("key", ["loss_scale", "loss_scale_window", "loss_scale_hysteresis"])
def test_scales_below_one_are_refused(key: str) -> None:
    settings = compose("train", TrainRoot, ["experiment=tiny", f"precision.{key}=0"]).settings
    with pytest.raises(UserError, match=f"precision.{key}=0"):
        check(settings, 1)


def test_an_overflow_is_a_divergence_once_the_scale_cannot_fall() -> None:
    guard = Guard(GuardConfig(max_skipped_steps=2))
    for step in range(40):
        guard.watch(step, math.inf, 2.0 ** (40 - step))
    assert guard.skipped_in_a_row == 0
    guard.watch(40, math.inf, 1.0)
    with pytest.raises(DivergedError, match="2 updates in a row"):
        guard.watch(41, math.nan, 1.0)
    arguments: list[Any] = [(1, math.inf), (2, math.inf)]
    bf16 = Guard(GuardConfig(max_skipped_steps=2))
    bf16.watch(*arguments[0])
    with pytest.raises(DivergedError):
        bf16.watch(*arguments[1])


def test_bf16_on_a_cpu_that_emulates_it_is_warned_of(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for machine, multiplies, warned in (("x86_64", False, True), ("x86_64", True, False), ("aarch64", False, False)):
        monkeypatch.setattr("platform.machine", lambda machine=machine: machine)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda multiplies=multiplies: multiplies)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "gptscale.train"):
            use_precision(precision("bf16"), on("cpu"))
            use_precision(precision("bf16"), on("cuda"))
            use_precision(precision("fp32"), on("cpu"))
        assert bool(caplog.messages) is warned, (machine, multiplies)
        assert all("emulated by this CPU" in message for message in caplog.messages)
