"""What is offloaded is updated on the host as it would be on the device: bit for bit, where that is a CPU too."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gptscale.config.schema import DeepSpeedConfig, DeepSpeedZeroConfig
from gptscale.model.gpt import GPT
from gptscale.model.init import initialise
from gptscale.parallel.engine import build_engine
from gptscale.parallel.offload import Host
from gptscale.parallel.spread import spread
from gptscale.runtime.errors import UserError
from gptscale.topology import split_batch
from gptscale.train.optimizer import build_optimizer
from tests.helpers import ranks
from tests.parity.cells import (
    CELLS,
    EXPERTS,
    GLOBAL_BATCH,
    LENGTH,
    VOCABULARY,
    Layout,
    batches,
    join,
    run_cells,
    settings,
)
from tests.parity.test_zero import record

ONE = Layout("deepspeed", 1)
SMALL_PARTS = DeepSpeedConfig(
    zero_optimization=DeepSpeedZeroConfig(
        reduce_bucket_size=5000, sub_group_size=20_000, stage3_param_persistence_threshold=0
    )
)
"""Several parts where there is usually one."""
CASES = {
    "ZeRO-1": (ONE, 2),
    "ZeRO-2": (replace(ONE, stage=2), 2),
    "ZeRO-3": (replace(ONE, stage=3), 2),
    "ZeRO-3, one rank": (replace(ONE, stage=3), 1),
    "ZeRO-3, small parts": (replace(ONE, stage=3, raw=SMALL_PARTS), 2),
    "TP2, ZeRO-3": (replace(ONE, stage=3, tensor=2), 2),
    "PP2": (replace(ONE, pipeline=2), 2),
    "EP2, ZeRO-2": (replace(ONE, stage=2, expert=2), 2),
}


@pytest.mark.parametrize("name", CASES)
def test_nothing_changes(name: str, tmp_path: Path) -> None:
    layout, size = CASES[name]
    names = ("experts", "experts-full") if layout.expert > 1 else ("gpt3-tied", "skipped-step")
    cells = tuple(cell for cell in CELLS + EXPERTS if cell.name in names)
    found = {}
    for offload in ("none", "nvme") if name != "ZeRO-1" else ("none", "nvme", "cpu"):  # which differ in memory alone
        ranks.run(run_cells, [replace(layout, offload=offload), 2, cells], size, tmp_path / offload)
        found[offload] = [record(tmp_path / offload, cell, size)[0] for cell in cells]
    for kept, *offloaded in zip(*found.values(), strict=True):
        for other in offloaded:
            assert kept.keys() == other.keys()
            assert all(kept[key].tobytes() == other[key].tobytes() for key in kept)


def test_small_parts_are_really_small(tmp_path: Path) -> None:
    """And what DeepSpeed is told by its own names reaches it."""
    for raw in (DeepSpeedConfig(), SMALL_PARTS):
        ranks.run(count_parts, [replace(ONE, stage=3, raw=raw)], 2, tmp_path / str(raw == SMALL_PARTS))
    usual, small = ((tmp_path / str(which) / "parts.txt").read_text().split() for which in (False, True))
    assert [int(part) for part in usual[:1]] == [2]  # one for what decays, one for what does not
    assert int(small[0]) == 4
    assert (usual[1], small[1]) == ("True", "False")


def count_parts(layout: Layout) -> None:
    joined, engine = built(layout)
    optimizer = engine._optimizer  # type: ignore[attr-defined]
    kept_whole = any(parameter.ds_persist for parameter in optimizer.module.parameters())
    Path("parts.txt").write_text(f"{len(optimizer.fp32_partitioned_groups_flat)} {kept_whole}")
    joined.close()


def built(layout: Layout):  # type: ignore[no-untyped-def]
    joined = join(layout)
    root = settings(CELLS[1], layout, 2)
    model = GPT(root.model, VOCABULARY, LENGTH, torch.float32)
    initialise(model, 0)
    cut = spread(model, joined, root.parallel, 0)
    split = split_batch(GLOBAL_BATCH, 2, joined.topology.data)
    return joined, build_engine(model, cut, build_optimizer(model, root.optimizer), root, split, joined)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_on_disk_is_a_file_that_has_no_name(stage: int, tmp_path: Path) -> None:
    ranks.run(look_at_files, [replace(ONE, stage=stage, offload="nvme")], 1, tmp_path)


def look_at_files(layout: Layout) -> None:
    joined, engine = built(layout)
    for batch in (batches(0, CELLS[1], split_batch(GLOBAL_BATCH, 2, 1), 0),):
        engine.train_step(batch, 1e-3)
    state = {piece.kind for piece in engine.pieces()}
    assert state == {"weight", "exp_avg", "exp_avg_sq"}
    inner = engine._optimizer.optimizer
    mapped = mapped_ranges(Path.cwd())
    for master, of_master in inner.state.items():
        for tensor in (master, of_master["exp_avg"], of_master["exp_avg_sq"]):
            assert lies_in(tensor, mapped), tensor.shape
    assert not lies_in(next(engine._engine.module.parameters()), mapped)
    assert not list(Path.cwd().glob("gptscale-offload-*"))
    joined.close()


def mapped_ranges(folder: Path) -> list[tuple[int, int]]:
    """Of files below the folder that this process has mapped, by what the kernel says."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if f"{folder}{os.sep}gptscale-offload-" in line:
            start, end = line.split()[0].split("-")
            found.append((int(start, 16), int(end, 16)))
    return found


def lies_in(tensor: Tensor, mapped: list[tuple[int, int]]) -> bool:
    return any(start <= tensor.data_ptr() < end for start, end in mapped)


def test_a_disk_without_room_is_named(tmp_path: Path) -> None:
    host = Host(str(tmp_path), pinned=False)
    with pytest.raises(UserError, match="no room for") as raised:
        host.zeros(2**50)
    assert str(raised.value).count("\n") == 1
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="No such file"):
        Host(str(tmp_path / "nowhere"), pinned=False).zeros(8)
