"""A rank makes its own part of a model and no more."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gptscale.config.schema import ModelConfig
from gptscale.model.gpt import GPT
from gptscale.model.init import initialise
from gptscale.parallel.engine import build_engine
from gptscale.parallel.ranks import Ranks
from gptscale.parallel.spread import spread
from gptscale.topology import split_batch
from gptscale.train.optimizer import build_optimizer
from tests.helpers import ranks
from tests.parity.cells import CELLS, Layout, join, settings

MEASURE = """
import sys
import torch
from gptscale.config.schema import ModelConfig
from gptscale.model.gpt import GPT
from gptscale.model.init import initialise
from gptscale.parallel.ranks import Group
from gptscale.parallel.stages import keep, parameter_weights
from gptscale.parallel.slices import take_slices
from gptscale.plan.stages import balanced, cuts

def kib(field):
    return int(next(line for line in open("/proc/self/status") if line.startswith(field)).split()[1])

tensor, pipeline, expert, on_meta = map(int, sys.argv[1:])
torch.set_num_threads(1)
torch.empty(1).normal_()
with torch.device("meta" if on_meta else "cpu"):
    model = GPT(
        ModelConfig(layers=8, width=512, heads=8, bias=False, experts=8 * (expert > 1), expert_width=1024),
        2000, 64, torch.float32,
    )
whole = sum(parameter.numel() for parameter in model.parameters()) * 4
cut = cuts(balanced(parameter_weights(model), pipeline))[0]
before = kib("VmRSS")
if not on_meta:
    initialise(model, 0)
keep(model, cut)
take_slices(model, Group(0, tensor, None), Group(0, expert, None), 0)
assert not any(parameter.is_meta for parameter in model.parameters())
print((kib("VmHWM") - before) * 1024 / whole)
"""


def share(tensor: int, pipeline: int, expert: int, on_meta: bool) -> float:
    """Most host memory while a rank's part is made, as a share of the whole model."""
    arguments = [str(tensor), str(pipeline), str(expert), str(int(on_meta))]
    # So that glibc gives back what is freed, as it does with matrices of more than 32 MiB, which these are not.
    environ = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        env=environ,
    )
    return float(done.stdout)


@pytest.mark.parametrize(("tensor", "pipeline", "expert"), [(4, 1, 1), (1, 4, 1), (2, 2, 1), (1, 1, 4)])
def test_memory_is_that_of_the_part(tensor: int, pipeline: int, expert: int) -> None:
    """A quarter, or more where not all are experts, and one whole matrix or stack beside it (4 to 6 % here)."""
    assert 0.2 < share(tensor, pipeline, expert, on_meta=True) < 0.45


def test_a_whole_model_takes_all_of_it() -> None:
    """The negative control."""
    assert share(4, 1, 1, on_meta=False) > 0.95


def test_with_zero_3_nobody_makes_the_whole(tmp_path: Path) -> None:
    """A rank of four holds a quarter of the weights, as much for gradients, and one whole matrix at a time (4 %)."""
    ranks.run(build_zero_3, [True], 4, tmp_path / "parts")
    ranks.run(build_zero_3, [False], 4, tmp_path / "whole")
    assert max(shares(tmp_path / "parts")) < 0.7
    assert min(shares(tmp_path / "whole")) > 1.0  # the negative control


def shares(folder: Path) -> list[float]:
    return [float((folder / f"{rank}.txt").read_text()) for rank in range(4)]


def build_zero_3(by_parts: bool) -> None:
    ctypes.CDLL("libc.so.6").mallopt(-3, 131072)  # M_MMAP_THRESHOLD: see `share`
    joined = join(ZERO_3)
    build(joined, 64, by_parts)  # what is imported on the way is not counted
    before_kib = kib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    whole_bytes = build(joined, 512, by_parts)
    Path(f"{joined.rank}.txt").write_text(str((kib("VmHWM") - before_kib) * 1024 / whole_bytes))
    joined.close()


ZERO_3 = Layout("deepspeed", 3)


def build(joined: Ranks, width: int, by_parts: bool) -> int:
    """An engine; returns the bytes of all weights together."""
    root = replace(settings(CELLS[1], ZERO_3, 2), model=ModelConfig(layers=8, width=width, heads=8))
    with torch.device("meta"):
        model = GPT(root.model, 2000, 64, torch.float32)
    weights = sum(parameter.numel() for parameter in model.parameters())
    if not by_parts:
        model.to_empty(device="cpu")
        initialise(model, 0)
    cut = spread(model, joined, root.parallel, 0)
    split = split_batch(8, 2, joined.topology.data)
    build_engine(model, cut, build_optimizer(model, root.optimizer), root, split, joined)
    return weights * 4


def kib(name: str) -> int:
    return int(next(line for line in Path("/proc/self/status").read_text().splitlines() if name in line).split()[1])
