"""Every parallel layout computes what one plain process computes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from gptscale.config.rules import check
from gptscale.config.schema import ModelConfig, ParallelConfig
from gptscale.model.gpt import GPT
from gptscale.model.init import initialise
from gptscale.parallel.engine import build_engine
from gptscale.parallel.spread import spread
from gptscale.train.optimizer import build_optimizer
from tests.helpers import ranks
from tests.parity.cells import (
    AT_ONCE,
    BY_ONE,
    CELLS,
    DEEP,
    EXPERTS,
    GLOBAL_BATCH,
    LENGTH,
    PLAIN,
    VOCABULARY,
    Cell,
    Layout,
    batches,
    join,
    run_cells,
    settings,
    zero,
)
from tests.parity.test_zero import Recorded, assert_equal_in_fp32, initial_weights_are_equal, record, worst


@dataclass(frozen=True)
class Case:
    name: str
    layout: Layout
    size: int


CASES = (
    *(Case(f"DP2, ZeRO-{stage}", zero(stage), 2) for stage in range(4)),
    Case("PP2", zero(1, pipeline=2), 2),
    Case("PP2 x DP2", zero(1, pipeline=2), 4),
    Case("PP4", zero(1, pipeline=4), 4),
    Case("TP2 x PP2", zero(1, pipeline=2, tensor=2), 4),
    Case("PP2 x TP2 x DP2", zero(1, pipeline=2, tensor=2), 8),
    *(Case(f"TP2, ZeRO-{stage}", zero(stage, tensor=2), 2) for stage in range(4)),
    *(Case(f"TP2 x DP2, ZeRO-{stage}", zero(stage, tensor=2), 4) for stage in (1, 3)),
    *(Case(f"TP2, norms cut, ZeRO-{stage}", zero(stage, tensor=2, shard_norms=True), 2) for stage in (1, 3)),
    Case("TP2 x DP2, norms cut, ZeRO-3", zero(3, tensor=2, shard_norms=True), 4),
    Case("TP2 x PP2, norms cut", zero(1, pipeline=2, tensor=2, shard_norms=True), 4),
    Case("TP4, ZeRO-1", zero(1, tensor=4), 4),
    *(Case(f"SP2, ZeRO-{stage}", zero(stage, sequence=2), 2) for stage in range(4)),
    *(Case(f"SP2 x DP2, ZeRO-{stage}", zero(stage, sequence=2), 4) for stage in range(4)),
    Case("SP2 x TP2, ZeRO-1", zero(1, tensor=2, sequence=2), 4),
    *(Case(f"EP2, ZeRO-{stage}", zero(stage, expert=2), 2) for stage in range(3)),
    *(Case(f"EP2 x DP2, ZeRO-{stage}", zero(stage, expert=2), 4) for stage in range(3)),
    Case("EP4, ZeRO-1", zero(1, expert=4), 4),
)
REFERENCES = CELLS + DEEP + EXPERTS
ALL = (*REFERENCES, BY_ONE, AT_ONCE)


FEW = ("bf16", "skipped-step", "documents", "extras", "growing")
"""On more ranks than there are cores: tied and not, dense, banded, with document masks and all else."""


def fits(cell: Cell, layout: Layout, size: int) -> bool:
    """What `gptscale.config.parallel_rules` lets through, and is worth the time."""
    cut = layout.tensor * layout.pipeline * layout.sequence > 1
    if cell.experts:
        return not cut and (layout.expert > 1 or layout.stage in (1, 3))
    if layout.expert > 1:
        return False
    if (cell.layers > 2) != (layout.pipeline > 2):
        return False
    if size > 2 and cell.layers == 2 and cell.name not in FEW:
        return False
    if size > 4 and cell.name not in ("growing", "documents"):
        return False
    if layout.tensor * layout.pipeline > 1 and cell.optimizer == "muon":
        return False
    # The modern block has two key/value heads.
    return layout.tensor * layout.sequence <= 2 or cell.block == "gpt3"


@dataclass
class Row:
    """What is told of a layout: the largest differences from one plain process in fp32, and how far bf16 is off."""

    case: Case
    losses: list[float] = field(default_factory=list)
    gradients: list[float] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    bf16: float | None = None

    def __str__(self) -> str:
        bf16 = "" if self.bf16 is None else f"{self.bf16:.2f}"
        worst = " | ".join(f"{max(found):.0e}" for found in (self.losses, self.gradients, self.weights))
        return f"| {self.case.name} | {self.case.size} | {len(self.losses)} | {worst} | {bf16} |"


HEAD = """\
| layout | ranks | models | loss | gradients | weights | bf16 |
| --- | --- | --- | --- | --- | --- | --- |"""


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Iterator[list[Row]]:
    """Shown when all is done, where one process runs the tests (`make test-layouts`)."""
    rows: list[Row] = []
    yield rows
    if "PYTEST_XDIST_WORKER" not in os.environ:
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print("", HEAD, *(row for row in rows if row.losses), sep="\n")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Recorded]:
    folder = tmp_path_factory.mktemp("plain")
    ranks.run(run_cells, [PLAIN, 2, REFERENCES], 1, folder)
    found = {cell.name: record(folder, cell, 1)[0] for cell in REFERENCES}
    return found | {cell.name: found["gpt3-tied"] for cell in (BY_ONE, AT_ONCE)}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_layout_equals_one_plain_process(
    case: Case, plain: dict[str, Recorded], table: list[Row], tmp_path: Path
) -> None:
    row = Row(case)
    table.append(row)
    cells = tuple(cell for cell in ALL if fits(cell, case.layout, case.size))
    ranks.run(run_cells, [case.layout, 2, cells], case.size, tmp_path)
    for cell in cells:
        found, facts = record(tmp_path, cell, case.size)
        differences = worst(plain[cell.name], found)
        print(case.name, cell.name, {key: f"{value:.1e}" for key, value in differences.items()})
        assert_layout_is_real(facts, cell, case)
        assert initial_weights_are_equal(plain[cell.name], found)
        if cell.compute == "fp32":
            assert_equal_in_fp32(differences)
            row.losses.append(differences["loss"])
            row.gradients.append(differences["gradient"])
            row.weights.append(differences["weight"])
        else:
            assert differences["loss"] <= 1e-2
            exact = plain["experts-exact" if cell.experts else "gpt3-tied"]
            row.bf16 = inexactness(found, plain[cell.name], exact)
            assert row.bf16 <= 2
        if cell.poisoned is not None:
            assert not np.isfinite(found["norm"][cell.poisoned])
            assert facts[0]["updates"] == len(found["loss"]) - 1


def inexactness(found: Recorded, plain_bf16: Recorded, plain_fp32: Recorded) -> float:
    """How far bf16 gradients are from fp32's, those of one plain bf16 process being 1: of the worst parameter.

    Plain ones are 1 to 3 % off. Parts of a product are rounded before they are summed, so that a layout's bf16 is not
    plain bf16 within float order. 2 is allowed; up to 1.38 was seen.
    """
    ratios = [
        float(np.linalg.norm(found[key] - exact) / np.linalg.norm(plain_bf16[key] - exact))
        for key, exact in plain_fp32.items()
        if key.startswith("gradient:") and not key.endswith("attention.k.bias")
    ]
    assert min(ratios) > 0
    return max(ratios)


def assert_layout_is_real(facts: list[dict[str, Any]], cell: Cell, case: Case) -> None:
    """Each rank holds its share: all but norms, biases and positions is cut by tensor parallelism."""
    layout, stage = case.layout, case.layout.stage
    replicas = case.size // layout.tensor // layout.pipeline
    for fact in facts:
        assert fact["engine"] == ("PipelineEngine" if layout.pipeline > 1 else "ZeroEngine")
        assert fact["stage"] == stage
        assert fact["blocks_held"] == cell.layers // layout.pipeline
        if cell.micro_batch is not None:
            sequences = GLOBAL_BATCH * layout.tensor * layout.pipeline * layout.sequence // case.size
            assert fact["accumulation"] == (sequences if cell.micro_batch else 1)
        of_experts = fact["expert_parameters"]
        here = (fact["stage_parameters"] - of_experts) / layout.tensor + of_experts / layout.expert
        assert fact["weights_held"] == pytest.approx(here / (replicas if stage == 3 else 1), rel=0.05)
        # The ranks that hold the same experts share out their state, those that hold others have others'.
        moments = fact["parameters"] / replicas if cell.experts and stage > 0 else here / (replicas if stage > 0 else 1)
        assert fact["moments_held"] == pytest.approx(moments, rel=0.05)
        assert (of_experts > 0.1 * fact["parameters"]) == (cell.experts > 0)
    assert sum(fact["written"] for fact in facts) == facts[0]["parameters"]
    stages = [facts[number]["stage_parameters"] for number in range(0, case.size, case.size // layout.pipeline)]
    vocabulary = 2048 * 64
    assert sum(stages) == facts[0]["parameters"] + (vocabulary if layout.pipeline > 1 and cell.tied else 0)


def test_dropout_is_drawn_alike_but_not_in_attention(tmp_path: Path) -> None:
    """`record` compares bit by bit what tensor peers hold alike: it would drift apart with what they drop.

    Activation checkpointing draws the same again, or its gradients would be of another model.
    """
    kept = Cell("kept", "modern", True, "fp32", dropout=0.3, documents=True)
    again = replace(kept, name="again", recompute="full")
    ranks.run(run_cells, [Layout("deepspeed", 1, tensor=2), 2, (kept, again)], 2, tmp_path)
    first, second = (record(tmp_path, cell, 2)[0] for cell in (kept, again))
    assert {key: value.tobytes() for key, value in first.items()} == {
        key: value.tobytes() for key, value in second.items()
    }
    ranks.run(dropped_heads, [], 2, tmp_path / "heads")
    masks = [np.load(tmp_path / "heads" / f"{rank}.npy") for rank in range(2)]
    assert (masks[0] != masks[1]).any()


def dropped_heads() -> None:
    """Attention over values of one: what comes out of each head tells what was dropped."""
    joined = join(Layout("deepspeed", 0, tensor=2))
    model = GPT(ModelConfig(layers=1, width=16, heads=4, dropout=0.5), 100, 8, torch.float32)
    initialise(model, 0)
    spread(model, joined, ParallelConfig(), 0)
    torch.manual_seed(0)
    q_BTHW, ones_BTHW = torch.zeros(1, 8, 2, 4), torch.ones(1, 8, 2, 4)
    np.save(f"{joined.rank}.npy", model.blocks[0].attention.attend(q_BTHW, q_BTHW, ones_BTHW).detach().numpy())
    joined.close()


MISTAKES: dict[str, tuple[str, Any]] = {
    "gradients of what is used by all are not summed": ("gptscale.parallel.tensor._copy_output", lambda *_: None),
    "a norm of heads learns from this rank's alone": ("gptscale.parallel.tensor._sum_of_heads", lambda _, x: x),
    "the vocabulary's parts overlap": ("gptscale.parallel.tensor._first_row", lambda *_: 0),
    "what peers hold alike counts twice": ("gptscale.parallel.flat_zero.counted", lambda gradients, *_: gradients),
}
NORM_MISTAKES: dict[str, tuple[str, Any]] = {
    "norms learn from a stretch alone": ("gptscale.parallel.norms._summed", lambda _, gradient: gradient),
}
PIPELINE_MISTAKES: dict[str, tuple[str, Any]] = {
    "ends do not sum what they tie": ("gptscale.parallel.pipeline.Pipeline.get_tied_weights_and_groups", lambda _: []),
    "documents are those of another micro-batch": (
        "gptscale.parallel.pipeline.Stage.begin",
        lambda stage, jobs: setattr(stage, "_jobs", iter([*jobs[1:], *jobs[:1]])),
    ),
}
SEQUENCE_MISTAKES: dict[str, tuple[str, Any]] = {
    "every stretch begins at the row's beginning": (
        "gptscale.parallel.sequence.Stretch.positions",
        lambda _, tokens, device: torch.arange(tokens, device=device).unsqueeze(0),
    ),
}
ZERO_MISTAKES: dict[str, tuple[str, Any]] = {
    "a mean over replicas is taken for a sum": (
        "gptscale.parallel.flat_zero.FlatZeroOptimizer._shares",
        lambda *_: 1,
    ),
}
EXPERT_MISTAKES: dict[str, tuple[str, Any]] = {
    "experts learn from their holders' tokens alone": (
        "gptscale.parallel.flat_zero.FlatZeroOptimizer._shares",
        lambda optimizer, group: optimizer._ranks(group),
    ),
    "auxiliary losses are left out": (
        "gptscale.model.experts.Router._losses",
        lambda _, logits, *__: torch.zeros((), device=logits.device),
    ),
    "tokens get what experts made of others": ("gptscale.parallel.expert.inverse", lambda order: order),
}


CONTROLS: tuple[tuple[dict[str, tuple[str, Any]], str, Layout], ...] = (
    (MISTAKES, "extras", zero(1, tensor=2)),
    (NORM_MISTAKES, "extras", zero(1, tensor=2, shard_norms=True)),
    (PIPELINE_MISTAKES, "documents", zero(1, pipeline=2)),
    (SEQUENCE_MISTAKES, "gpt3-tied", zero(1, sequence=2)),
    (ZERO_MISTAKES, "gpt3-tied", zero(2)),
    (EXPERT_MISTAKES, "experts", zero(1, expert=2)),
)
"""Where each mistake would be made, and in which model."""


def run_with(mistake: str, layout: Layout, cells: tuple[Cell, ...]) -> None:
    ((target, replacement),) = (mistakes[mistake] for mistakes, *_ in CONTROLS if mistake in mistakes)
    with patch(target, replacement):
        run_cells(layout, 2, cells)


@pytest.mark.parametrize(
    ("mistake", "name", "layout"),
    [(mistake, name, layout) for mistakes, name, layout in CONTROLS for mistake in mistakes],
    ids=[mistake for mistakes, *_ in CONTROLS for mistake in mistakes],
)
def test_the_comparison_notices(
    mistake: str, name: str, layout: Layout, plain: dict[str, Recorded], tmp_path: Path
) -> None:
    (cell,) = (cell for cell in ALL if cell.name == name)
    ranks.run(run_with, [mistake, layout, (cell,)], 2, tmp_path)
    found, _ = record(tmp_path, cell, 2, alike=False)
    differences = worst(plain[cell.name], found)
    print(mistake, differences)
    with pytest.raises(AssertionError):
        assert_equal_in_fp32(differences)


def test_both_ends_hold_the_same_tied_weight_to_the_bit(tmp_path: Path) -> None:
    """Each sums gradients over its replicas, three and so in an order of its own. What is saved is the first's."""
    ranks.run(train_tied, [], 6, tmp_path)
    weights = [np.load(tmp_path / f"{rank}.npy") for rank in range(6)]
    assert np.abs(weights[0]).max() > 0.1
    assert len({weight.tobytes() for weight in weights}) == 1


def train_tied() -> None:
    layout = Layout("deepspeed", 1, pipeline=2)
    joined = join(layout)
    (cell,) = (cell for cell in CELLS if cell.name == "gpt3-tied")
    root = settings(cell, layout, 1)
    root = replace(
        root,
        parallel=replace(root.parallel, pipeline_layers=(3, 1)),
        model=replace(root.model, layers=4),
        train=replace(root.train, global_batch=6),
    )
    model = GPT(root.model, VOCABULARY, LENGTH, torch.float32)
    initialise(model, 0)
    cut = spread(model, joined, root.parallel, 0)
    split = check(root, joined.size)
    engine = build_engine(model, cut, build_optimizer(model, root.optimizer), root, split, joined)
    for step in range(6):
        engine.train_step(batches(step, cell, split, joined.at.data), cell.learning_rate)
    np.save(f"{joined.rank}.npy", model.head.weight.detach().numpy())
    joined.close()
