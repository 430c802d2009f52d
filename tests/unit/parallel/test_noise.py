"""The gradient noise scale against one that is known."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gptscale.config.schema import OptimizerConfig, TrainConfig, TrainRoot
from gptscale.flow import Batch
from gptscale.parallel.noise import NoiseProbe
from gptscale.parallel.plain import PlainEngine
from gptscale.topology import split_batch
from gptscale.train.noise import SCALE, SIGNAL, TRACE, WINDOW, NoiseWindow

WIDTH, NOISE, STEPS = 6, 1.0, 400


class LinearRegression(torch.nn.Module):
    """½(w·x − y)² summed over rows, in place of a GPT. Two parameters, as a gradient's parts have to be added up."""

    def __init__(self) -> None:
        super().__init__()
        self.left = torch.nn.Parameter(torch.zeros(2))
        self.right = torch.nn.Parameter(torch.zeros(WIDTH - 2))

    def forward(self, x_BD: Tensor, shifted_BD: Tensor, documents: None = None) -> Tensor:
        return (x_BD @ torch.cat((self.left, self.right)) - shifted_BD[:, -1]).square().sum() / 2


def micro_batch(rows: int, truth_D: Tensor, generator: torch.Generator) -> Batch:
    x_BD = torch.randn(rows, WIDTH, generator=generator)
    y_B = x_BD @ truth_D + NOISE * torch.randn(rows, generator=generator)
    # As inputs and targets are cut from tokens: all columns but the last, and all but the first.
    return Batch(torch.cat([x_BD, y_B[:, None]], dim=1), rows)


@pytest.mark.parametrize("sizes", [(4, 4, 4, 4), (1, 7, 2)])
def test_the_noise_of_a_linear_regression_is_found(sizes: tuple[int, ...]) -> None:
    """With x ~ N(0, 1), y = t·x + ε and w = 0 the gradient is −y·x: its mean is −t, the trace of its covariance
    E y²|x|² − |t|² = |t|²(D + 2) + D·σ² − |t|².
    """
    truth_D = torch.linspace(-1.0, 2.0, WIDTH)
    square = float(truth_D.square().sum())
    expected = {"signal": square, "trace": square * (WIDTH + 1) + WIDTH * NOISE**2}
    model = LinearRegression()
    settings = TrainRoot(optimizer=OptimizerConfig(weight_decay=0.0))
    engine = PlainEngine(model, torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, fused=True), settings)
    generator = torch.Generator().manual_seed(0)
    found: dict[str, list[float]] = {"signal": [], "trace": []}
    for _ in range(STEPS):
        result = engine.train_step([micro_batch(rows, truth_D, generator) for rows in sizes], 0.0, measure_noise=True)
        assert result.noise_signal is not None
        assert result.noise_trace is not None
        found["signal"].append(float(result.noise_signal))
        found["trace"].append(float(result.noise_trace))
    for name, values in found.items():
        each = torch.tensor(values, dtype=torch.float64)
        error = float(each.std()) / math.sqrt(STEPS)
        print(f"{name}: {float(each.mean()):.3f} ± {error:.3f}, expected {expected[name]:.3f}")
        assert error < 0.07 * expected[name], "precise enough to notice a wrong formula"
        assert abs(float(each.mean()) - expected[name]) < 4 * error


def test_nothing_stays_on_a_parameter_that_is_not_measured() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    with NoiseProbe([parameter], torch.device("cpu")) as probe:
        (2 * parameter.sum()).backward()
        (3 * parameter.sum()).backward()
    parameter.sum().backward()
    assert float(probe.squares) == pytest.approx(3 * 4 + 3 * 9), "of each backward by itself"
    assert not parameter._backward_hooks


def test_the_average_over_measured_steps_goes_on_from_the_metrics_file() -> None:
    lines: list[dict[str, float | None]] = []
    straight = NoiseWindow()
    for step in range(2 * WINDOW + 5):
        values = {SIGNAL: 1.0 + step, TRACE: 50.0 * step}
        scale = straight.scale(values)
        resumed = NoiseWindow(lines)
        assert resumed.scale(values) == scale
        lines += [{"step": step, **values, SCALE: scale}, {"step": step}]
    last = range(WINDOW + 5, 2 * WINDOW + 5)
    assert scale == sum(50.0 * step for step in last) / sum(1.0 + step for step in last)
    assert straight.scale({SIGNAL: math.nan, TRACE: math.nan}) == scale, "a skipped step says nothing"
    assert NoiseWindow().scale({SIGNAL: -1.0, TRACE: 3.0}) is None, "noise alone"


def test_settings_that_leave_one_micro_batch_are_refused() -> None:
    from gptscale.config.rules import check
    from gptscale.runtime.errors import UserError

    train = TrainConfig(steps=1, global_batch=8, micro_batch=8, noise_scale_every_steps=10)
    with pytest.raises(UserError, match=r"train\.global_batch=8 is one") as raised:
        check(TrainRoot(train=train), 1)
    assert str(raised.value).count("\n") == 1
    check(TrainRoot(train=replace(train, micro_batch=4)), 1)
    check(TrainRoot(train=replace(train, micro_batch=4)), 2)
    check(TrainRoot(train=replace(train, noise_scale_every_steps=0)), 1)
    with pytest.raises(UserError, match=r"train\.ramp_from=2 is one"):
        check(TrainRoot(train=replace(train, micro_batch=4, ramp_from=2, ramp_tokens=4096)), 1)
    assert split_batch(8, 4, 2).accumulation == 1
