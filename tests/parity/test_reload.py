"""State goes from any stage to any other and back without losing a bit, and nothing is compiled on the way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from gptscale.checkpoint.read import open_checkpoint
from gptscale.checkpoint.restore import restore_from
from gptscale.checkpoint.write import save_checkpoint
from gptscale.model.gpt import GPT
from gptscale.model.init import initialise
from gptscale.parallel.engine import build_engine
from gptscale.parallel.spread import spread
from gptscale.topology import split_batch
from gptscale.train.optimizer import build_optimizer
from tests.helpers import ranks as processes
from tests.parity.cells import CELLS, EXPERTS, GLOBAL_BATCH, LENGTH, PLAIN, VOCABULARY, Layout, batches, join, settings

Chain = tuple[tuple[Layout, int], ...]
ZERO_0, ZERO_1, ZERO_2, ZERO_3 = (Layout("deepspeed", stage) for stage in range(4))
CHAIN: Chain = (
    (PLAIN, 1),
    (ZERO_3, 2),
    (ZERO_1, 2),
    (Layout("deepspeed", 3, tensor=2), 4),
    (ZERO_0, 2),
    (Layout("deepspeed", 0, tensor=2), 4),
    (ZERO_2, 2),
    (Layout("deepspeed", 1, tensor=4), 4),
    (Layout("deepspeed", 1, pipeline=2), 4),
    (Layout("deepspeed", 1, pipeline=2, tensor=2), 4),
    (Layout("deepspeed", 2, tensor=2), 2),
    (ZERO_3, 1),
    (PLAIN, 1),
)
EXPERT_CHAIN: Chain = (
    (PLAIN, 1),
    (Layout("deepspeed", 1, expert=2), 2),
    (ZERO_3, 2),
    (Layout("deepspeed", 0, expert=2), 4),
    (Layout("deepspeed", 2, expert=4), 4),
    (Layout("deepspeed", 2, expert=2), 4),
    (ZERO_1, 2),
    (PLAIN, 1),
)
MUON_CHAIN: Chain = ((ZERO_1, 2), (ZERO_3, 2), (PLAIN, 1), (ZERO_2, 2))


def refuse_compilers() -> None:
    import torch.utils.cpp_extension as compilers

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("something wants to compile an operation")

    for name in ("load", "load_inline", "_jit_compile"):
        setattr(compilers, name, refuse)


def step_and_save(cell_name: str, layout: Layout, source: str | None, target: str) -> None:
    """Load what `source` holds into a fresh engine of another seed; save it again, or train three steps without one."""
    refuse_compilers()
    cell = next(cell for cell in CELLS + EXPERTS if cell.name == cell_name)
    root, ranks = settings(cell, layout, 2), join(layout)
    model = GPT(root.model, VOCABULARY, LENGTH, torch.float32)
    initialise(model, 0 if source is None else 17)
    cut = spread(model, ranks, root.parallel, 0)
    split = split_batch(GLOBAL_BATCH, 2, ranks.topology.data)
    engine = build_engine(model, cut, build_optimizer(model, root.optimizer), root, split, ranks)
    if source is None:
        for step in range(3):
            engine.train_step(batches(step, cell, split, ranks.at.data), cell.learning_rate)
        updates = engine.updates()
    else:
        updates = restore_from(Path(source), engine.pieces(), ranks, print).state["updates"]
        engine.loaded(updates)
        assert engine.updates() == updates
    save_checkpoint(
        Path(target),
        updates,
        engine.pieces(),
        state={"updates": updates},
        layout={},
        comm=ranks,
        keep=2,
        report=print,
    )
    # What was loaded is what the model computes with, not only what the optimizer holds.
    loss = ranks.sum_tensor(sum((engine.eval_step(b) for b in batches(9, cell, split, ranks.at.data)), torch.zeros(())))
    if ranks.rank == 0:
        Path(target, "loss.txt").write_text(repr(float(loss)))
    ranks.close()


@pytest.mark.parametrize(
    ("cell_name", "chain"), [("gpt3-tied", CHAIN), ("experts", EXPERT_CHAIN), ("muon", MUON_CHAIN)]
)
def test_a_state_survives_every_change_of_layout(
    cell_name: str, chain: tuple[tuple[Layout, int], ...], tmp_path: Path
) -> None:
    source = None
    for number, (layout, size) in enumerate(chain):
        target = tmp_path / str(number)
        processes.run(step_and_save, [cell_name, layout, source, str(target)], size, tmp_path / f"work-{number}")
        source = str(target / "step-00000003")
    first = open_checkpoint(tmp_path / "0" / "step-00000003")
    loss = float((tmp_path / "0" / "loss.txt").read_text())
    for name in first.shapes:
        for kind in kinds_of(cell_name, name):
            assert float(first.read_parameter(name, kind).abs().max()) > 0, (name, kind)
    for number in range(1, len(chain)):
        later = open_checkpoint(tmp_path / str(number) / "step-00000003")
        assert later.shapes == first.shapes
        for name in first.shapes:
            for kind in kinds_of(cell_name, name):
                one, other = first.read_parameter(name, kind), later.read_parameter(name, kind)
                assert np.array_equal(one.numpy(), other.numpy()), (chain[number], name, kind)
        assert float((tmp_path / str(number) / "loss.txt").read_text()) == pytest.approx(loss, rel=1e-6)


def kinds_of(cell_name: str, parameter: str) -> tuple[str, ...]:
    matrix = parameter.startswith("blocks.") and parameter.endswith("weight") and "norm" not in parameter
    if cell_name == "muon" and matrix:
        return ("weight", "momentum_buffer")
    return ("weight", "exp_avg", "exp_avg_sq")
