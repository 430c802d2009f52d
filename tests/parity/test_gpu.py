"""On a CUDA device: the plain engine and each ZeRO stage against the plain engine on a CPU. Run by `make test-gpu`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers import ranks
from tests.parity.cells import CELLS, PLAIN, Cell, Layout, run_cells
from tests.parity.steps import wait_for_nothing
from tests.parity.test_steps import check_fp16, check_waits_and_skips
from tests.parity.test_steps import record as steps_of
from tests.parity.test_zero import Recorded, record, worst

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def plain_on_cpu(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Recorded]:
    folder = tmp_path_factory.mktemp("plain")
    started = ranks.start(run_cells, [PLAIN, 2, CELLS], 1, folder, {"CUDA_VISIBLE_DEVICES": ""})
    assert started.wait() == [0], started.text()
    return {cell.name: record(folder, cell, 1)[0] for cell in CELLS}


@pytest.mark.parametrize("stage", [None, 0, 1, 2, 3])
def test_a_device_computes_what_a_cpu_does(
    stage: int | None, plain_on_cpu: dict[str, Recorded], tmp_path: Path
) -> None:
    assert torch.cuda.is_available(), "make test-gpu needs a CUDA device"
    ranks.run(run_cells, [layout_of(stage), 2, CELLS], 1, tmp_path)
    for cell in CELLS:
        found, _ = record(tmp_path, cell, 1)
        differences = worst(plain_on_cpu[cell.name], found)
        print(cell.name, differences)
        assert differences["loss"] <= tolerance(cell)
        assert np.isfinite(found["loss"]).sum() >= len(found["loss"]) - (cell.poisoned is not None)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_is_updated_on_the_host(stage: int, plain_on_cpu: dict[str, Recorded], tmp_path: Path) -> None:
    cells = tuple(cell for cell in CELLS if cell.name in ("gpt3-tied", "skipped-step", "bf16"))
    ranks.run(run_cells, [replace(layout_of(stage), offload="cpu"), 2, cells], 1, tmp_path)
    for cell in cells:
        found, _ = record(tmp_path, cell, 1)
        assert worst(plain_on_cpu[cell.name], found)["loss"] <= tolerance(cell)


@pytest.mark.parametrize("stage", [None, 3])
def test_compiled_blocks(stage: int | None, plain_on_cpu: dict[str, Recorded], tmp_path: Path) -> None:
    cells = tuple(replace(cell, compiled=True) for cell in CELLS if cell.name in ("gpt3-tied", "documents", "bf16"))
    ranks.run(run_cells, [layout_of(stage), 2, cells], 1, tmp_path)
    for cell in cells:
        found, facts = record(tmp_path, cell, 1)
        assert facts[0]["graphs"] == 2
        assert worst(plain_on_cpu[cell.name], found)["loss"] <= tolerance(cell)


@pytest.mark.parametrize("stage", [None, 0, 1, 2, 3])
def test_a_step_waits_for_nothing(stage: int | None, tmp_path: Path) -> None:
    ranks.run(wait_for_nothing, [layout_of(stage)], 1, tmp_path)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_fp16_on_a_device(stage: int, tmp_path: Path) -> None:
    """The scale finds its value and is gone on with; that of the plain engine is compared on a CPU."""
    found = steps_of(tmp_path / "found", layout_of(stage), 1, None)
    check_waits_and_skips(found["fused"], waits=0)
    check_fp16(found["fp16"])


def layout_of(stage: int | None) -> Layout:
    return PLAIN if stage is None else Layout("deepspeed", stage)


def tolerance(cell: Cell) -> float:
    """fp32: the design's 1e-4. bf16: products are accumulated in another order, and round at 2⁻⁸."""
    return 1e-4 if cell.compute == "fp32" else 2e-2
