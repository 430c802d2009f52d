"""A profiled run is bit for bit the run that is not, and leaves a trace and a page. Outside its window it is free."""

from __future__ import annotations

import gzip
import json
import logging
import re
from contextlib import nullcontext
from logging.handlers import QueueHandler
from pathlib import Path
from queue import SimpleQueue

import pytest
import torch

from gptscale.config.compose import compose
from gptscale.config.rules import check
from gptscale.config.schema import ProfileConfig, TrainRoot
from gptscale.runtime.errors import UserError
from gptscale.train.profiler import StepProfiler, backward_is_a_span, span
from tests.helpers.training import exact_part, read_metrics, run_training, small_run

LAYOUT = ["parallel=zero2", "train.steps=6", "schedule.total_steps=6", "logging.print_every_steps=1"]


def test_a_profiled_run_is_bit_for_bit_the_run_that_is_not(corpus: Path, tmp_path: Path) -> None:
    """On two ranks, of which rank 1 records; resumed with another window, as `profile` may change."""
    run_training([*small_run(corpus, tmp_path / "plain"), *LAYOUT], 2, tmp_path)
    profiled = [*small_run(corpus, tmp_path / "profiled"), *LAYOUT, "profile.ranks=[1]", "profile.memory=true"]
    first = run_training([*profiled, "profile.steps=[2,4]", "train.steps=4"], 2, tmp_path)
    second = run_training([*profiled, "profile.steps=[3,9]"], 2, tmp_path)
    steps = [
        [line for line in exact_part(read_metrics(tmp_path / name)) if "train/loss" in line]
        for name in ("plain", "profiled")
    ]
    assert len(steps[0]) == 6
    assert steps[0] == steps[1]

    marked = re.findall(r"^step (\d+)/.*not representative", first.text(), flags=re.MULTILINE)
    assert marked == ["2", "3", "4"]
    assert "warning: of profile.steps=[3,9] only steps 5 to 6 are recorded" in second.text()
    folder = tmp_path / "profiled" / "profile"
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()) == [
        f"steps-{window}/rank-1.{kind}"
        for window in ("00000002-00000004", "00000005-00000006")
        for kind in ("summary.txt", "trace.json.gz")
    ]
    with gzip.open(folder / "steps-00000002-00000004" / "rank-1.trace.json.gz") as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]
    assert [name for name in names if str(name).startswith("step ")] == ["step 2", "step 3", "step 4"]
    assert names.count("train step") == names.count("data wait") == 3
    assert names.count("backward") == 6  # two micro-batches a rank and step
    assert {"aten::addmm", "aten::_fused_adamw_"} <= set(names)

    page = (folder / "steps-00000002-00000004" / "rank-1.summary.txt").read_text()
    assert page.startswith("3 steps, rank 1 of 2, cpu\n")
    assert len(page.splitlines()) <= 66, "more than a page"
    shares = {name: float(share) for name, share in re.findall(r"^  (\w[\w ]+?)  .* ms a step +([\d.]+)%", page, re.M)}
    assert list(shares) == ["data wait", "forward", "backward", "update", "rest"]
    assert sum(shares.values()) == pytest.approx(100, abs=0.3)
    assert shares["backward"] > 5
    assert shares["forward"] > 5
    assert re.search(r"most memory held beyond the start of the window: [\d,]{6,} bytes", page)


def test_windows_that_cannot_be_recorded_are_said_once(tmp_path: Path) -> None:
    records = QueueHandler(SimpleQueue())  # not `caplog`: what that hears depends on how earlier tests set up logging
    logger = logging.getLogger("gptscale.train")

    def said(first: int, last: int, step: int) -> list[str]:
        profiler = StepProfiler(ProfileConfig(steps=(first, last)), tmp_path, 0, 1, torch.device("cpu"))
        profiler.announce(step, total_steps=20)
        return [records.queue.get().getMessage() for _ in range(records.queue.qsize())]

    logger.addHandler(records)
    try:
        assert said(10, 13, step=9) == []
        assert said(10, 13, step=13) == ["profile.steps=[10,13] is ignored: the run goes on from step 13"]
        assert said(21, 22, step=0) == ["profile.steps=[21,22] is ignored: the run ends at step 20"]
        (line,) = said(10, 30, step=11)
        assert line.startswith("of profile.steps=[10,30] only steps 12 to 20 are recorded")
    finally:
        logger.removeHandler(records)


def test_nothing_is_recorded_outside_of_the_window(tmp_path: Path) -> None:
    plain = torch.autograd.backward
    profiler = StepProfiler(ProfileConfig(steps=(2, 3)), tmp_path, 0, 1, torch.device("cpu"))
    weight = torch.ones(3, requires_grad=True)
    for number in range(1, 5):
        with profiler.step(number, total_steps=9):
            inside = number in (2, 3)
            assert torch.autograd._profiler_enabled() == inside
            assert isinstance(span("train step"), nullcontext) == (not inside)
            assert (torch.autograd.backward is plain) == (not inside)
            with span("train step"):
                weight.sum().backward()
    assert torch.equal(weight.grad, torch.full((3,), 4.0))
    assert len(list(tmp_path.rglob("*.txt"))) == 1


def test_a_run_that_ends_within_the_window_leaves_nothing_running(tmp_path: Path) -> None:
    plain = torch.autograd.backward
    profiler = StepProfiler(ProfileConfig(steps=(1, 3)), tmp_path, 0, 1, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="mid-step"), profiler.step(1, total_steps=9):
        raise RuntimeError("mid-step")
    profiler.close()
    assert not torch.autograd._profiler_enabled()
    assert torch.autograd.backward is plain
    assert not list(tmp_path.iterdir())


def test_gradients_pass_through_the_range_around_backward() -> None:
    weight = torch.tensor([2.0, 3.0], requires_grad=True)
    with backward_is_a_span():
        weight.square().sum().backward(retain_graph=True)
        torch.autograd.backward([(weight * 5).sum()])
    assert weight.grad is not None
    assert weight.grad.tolist() == [9.0, 11.0]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("profile.steps=[10]", "profile.steps=[10] is not a first and a last step"),
        ("profile.steps=[0,3]", "profile.steps=[0, 3] is not a first and a last step"),
        ("profile.steps=[5,3]", "profile.steps=[5, 3] is not a first and a last step"),
        ("profile.ranks=[2]", "profile.ranks=[2] names rank 2, but the run has 2"),
        ("profile.ranks=[]", "profile.ranks=[] names no rank"),
    ],
)
def test_windows_that_mean_nothing_are_refused(override: str, message: str) -> None:
    settings = compose("train", TrainRoot, ["experiment=tiny", override]).settings
    with pytest.raises(UserError) as refused:
        check(settings, 2)
    assert str(refused.value).startswith(message)
    assert str(refused.value).count("\n") == 1
