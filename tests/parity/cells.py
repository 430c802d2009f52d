"""Ten optimizer steps of a small model on one layout, recorded for comparison. Runs inside a rank."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch._dynamo.utils import counters

from gptscale.config.parallel_rules import topology_of
from gptscale.config.rules import check
from gptscale.config.schema import (
    Checkpointing,
    DataConfig,
    DeepSpeedConfig,
    DeepSpeedZeroConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    TrainConfig,
    TrainRoot,
)
from gptscale.data.rows import document_starts
from gptscale.flow import Batch, Piece
from gptscale.model.compiling import compile_blocks
from gptscale.model.gpt import GPT, Block
from gptscale.model.init import initialise
from gptscale.parallel.engine import Engine, build_engine
from gptscale.parallel.held import holdings
from gptscale.parallel.ranks import Ranks
from gptscale.parallel.slices import is_of_experts
from gptscale.parallel.spread import by_parts, spread
from gptscale.runtime.process import find_process
from gptscale.topology import BatchSplit
from gptscale.train.optimizer import build_optimizer

STEPS, GLOBAL_BATCH, LENGTH, VOCABULARY = 10, 8, 32, 2000
ROWS = torch.randint(0, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(99))
LAST = torch.tensor([6, 2, 4])
"""What is generated from: rows of a length that no rank has a half of."""
FIRST_MOMENTS = ("exp_avg", "momentum_buffer")
"""AdamW's and Muon's."""
END_OF_TEXT = 7


@dataclass(frozen=True)
class Cell:
    """One model and way of computing it, on whatever layout."""

    name: str
    block: Literal["gpt3", "gelu", "modern"]
    """GPT-3's; the same without biases; or the usual one of today."""
    tied: bool
    compute: Literal["fp32", "bf16"]
    masks: bool = True
    """Targets that carry no loss, more of them in every next sequence: micro-batches and ranks weigh differently."""
    poisoned: int | None = None
    """A step whose batch makes the loss infinite."""
    documents: bool = False
    """Rows of several documents, which do not see each other."""
    windows: bool = False
    """Every other layer looks back on a few tokens only."""
    recompute: Checkpointing = "none"
    """Activation checkpointing of every block on the layout under test; the plain reference keeps its activations."""
    compiled: bool = False
    """Blocks by `torch.compile`."""
    layers: int = 2
    extras: bool = False
    """Norms of queries and keys, a soft cap, a z-loss, a scaled embedding."""
    dropout: float = 0.0
    learning_rate: float = 1e-3
    optimizer: str = "adamw"
    clip_norm: float = 1.0
    seed: int = 0
    """Of the initial weights."""
    experts: int = 0
    experts_per_token: int = 2
    shared_experts: int = 0
    expert_capacity: float = 0.0
    micro_batch: int | None = None
    """Sequences of a micro-batch: as many as this, or, where it is 0, all that a rank has. None: what the test says."""
    smaller_steps: int = GLOBAL_BATCH
    """Sequences of every other step, from the first on."""


CELLS = (
    Cell("bf16", "gpt3", True, "bf16"),
    Cell("gpt3-tied", "gpt3", True, "fp32"),
    Cell("modern-untied", "modern", False, "fp32"),
    Cell("recomputed", "modern", True, "fp32", recompute="full"),
    Cell("skipped-step", "modern", True, "fp32", poisoned=3),
    Cell("muon", "gpt3", True, "fp32", poisoned=3, optimizer="muon"),
    Cell("documents", "gpt3", True, "fp32", documents=True, windows=True, recompute="selective"),
    Cell("extras", "modern", False, "fp32", documents=True, windows=True, extras=True),
    Cell("growing", "gpt3", True, "fp32", smaller_steps=6),
)
BY_ONE, AT_ONCE = (
    Cell("by-one", "gpt3", True, "fp32", micro_batch=1),
    Cell("at-once", "gpt3", True, "fp32", micro_batch=0),
)
"""Of "gpt3-tied" as many micro-batches as a rank has sequences, and one: it is the plain reference of both."""
DEEP = (
    Cell("deep-tied", "gpt3", True, "fp32", documents=True, windows=True, layers=4),
    Cell("deep-untied", "modern", False, "fp32", poisoned=3, layers=4),
)
"""For pipelines of more stages."""
EXPERTS = (
    Cell("experts", "modern", True, "fp32", experts=4, shared_experts=1),
    Cell("experts-full", "modern", False, "fp32", experts=8, expert_capacity=0.75, recompute="full", poisoned=3),
    Cell(
        "experts-of-one",
        "gelu",
        True,
        "fp32",
        experts=4,
        experts_per_token=1,
        documents=True,
        windows=True,
        recompute="selective",
    ),
    Cell("experts-bf16", "modern", True, "bf16", experts=4),
    Cell("experts-exact", "modern", True, "fp32", experts=4),
)
"""Of two layers the second has them, but where experts are full: there both."""


@dataclass(frozen=True)
class Layout:
    """How a cell is spread over ranks."""

    engine: Literal["plain", "deepspeed"]
    stage: int = 0
    tensor: int = 1
    shard_norms: bool = False
    sequence: int = 1
    pipeline: int = 1
    expert: int = 1
    offload: Literal["none", "cpu", "nvme"] = "none"
    raw: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)

    @property
    def config(self) -> ParallelConfig:
        return ParallelConfig(
            self.engine,
            self.stage,
            pipeline=self.pipeline,
            tensor=self.tensor,
            shard_norms=self.shard_norms,
            sequence=self.sequence,
            expert=self.expert,
            offload=self.offload,
            offload_path="." if self.offload == "nvme" else None,
            deepspeed=self.raw,
        )


PLAIN = Layout("plain")


def zero(stage: int, **axes: Any) -> Layout:
    """Stage 3 partitions every parameter here, and not the largest alone, and lets go of each after every use."""
    small = DeepSpeedZeroConfig(
        stage3_param_persistence_threshold=0, stage3_max_reuse_distance=1, stage3_prefetch_bucket_size=1
    )
    raw = DeepSpeedConfig(zero_optimization=small) if stage == 3 else DeepSpeedConfig()
    return Layout("deepspeed", stage, raw=raw, **axes)


def settings(cell: Cell, layout: Layout, micro_batch: int) -> TrainRoot:
    # init_std 0.2: weights large enough that a wrong mask or a missing scale shows. The embedding is above DeepSpeed's
    # threshold (100,000 elements) below which stage 3 keeps a parameter whole.
    model = ModelConfig(layers=cell.layers, width=64, heads=4, init_std=0.2, tied_embeddings=cell.tied)
    if cell.block == "modern":
        model = ModelConfig(
            layers=cell.layers,
            width=64,
            heads=4,
            kv_heads=2,
            init_std=0.2,
            tied_embeddings=cell.tied,
            positions="rope",
            norm="rmsnorm",
            feedforward="swiglu",
            bias=False,
        )
    if cell.block == "gelu":
        model = replace(model, bias=False)
    if cell.experts:
        model = replace(
            model,
            experts=cell.experts,
            experts_per_token=cell.experts_per_token,
            shared_experts=cell.shared_experts,
            expert_capacity=cell.expert_capacity,
            expert_width=48,
            expert_layers=("experts",) if cell.expert_capacity else ("dense", "experts"),
            balance_loss=0.1,  # ten times the usual, so that one left out would show
            router_z_loss=0.01,
        )
    if cell.extras:
        model = replace(model, qk_norm=True, logit_softcap=20.0, z_loss=1e-3, embedding_scale=2.0)
    if cell.windows:
        model = replace(model, attention_pattern=("full", "window"), window=5)
    model = replace(model, dropout=cell.dropout)
    return TrainRoot(
        model=model,
        parallel=layout.config,
        precision=PrecisionConfig(cell.compute),
        # With the usual epsilon of 1e-8 an element whose gradient is rounding noise moves by the whole learning rate:
        # one of 131,072 did, by 5e-5, between two plain runs that differ in the micro-batch alone.
        optimizer=OptimizerConfig(
            cell.optimizer, learning_rate=cell.learning_rate, clip_norm=cell.clip_norm, epsilon=1e-5
        ),
        data=DataConfig(sequence_length=LENGTH),
        train=TrainConfig(steps=STEPS, global_batch=GLOBAL_BATCH, micro_batch=micro_batch),
    )


def join(layout: Layout) -> Ranks:
    """This process among the ranks of its layout."""
    torch.set_num_threads(1)
    process = find_process(os.environ)
    return Ranks(process, layout.engine == "deepspeed", 60, topology_of(layout.config, process.world_size))


def run_cells(layout: Layout, micro_batch: int, cells: tuple[Cell, ...]) -> None:
    """Train every cell on this layout; rank r leaves `<cell>-r.npz` and `<cell>-r.json` in the working directory."""
    ranks = join(layout)
    for cell in cells:
        sequences = GLOBAL_BATCH // ranks.topology.data if cell.micro_batch == 0 else cell.micro_batch or micro_batch
        recorded, facts = _train(cell, settings(cell, layout, sequences), ranks)
        np.savez(Path(f"{cell.name}-{ranks.rank}.npz"), **recorded)
        Path(f"{cell.name}-{ranks.rank}.json").write_text(json.dumps(facts))
    ranks.close()


def _train(cell: Cell, root: TrainRoot, ranks: Ranks) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
    compute = {"fp32": torch.float32, "bf16": torch.bfloat16}[cell.compute]
    with torch.device("meta") if by_parts(ranks, root.parallel, "gpt") else nullcontext():  # as training does
        model = GPT(root.model, VOCABULARY, LENGTH, compute)
    model.activation_checkpointing = "none" if root.parallel.engine == "plain" else cell.recompute
    if not by_parts(ranks, root.parallel, "gpt"):
        initialise(model, cell.seed)
    if cell.compiled:
        torch._dynamo.reset()
        counters.clear()
        compile_blocks(model)
    split = check(root, ranks.size)
    parameters = sum(p.numel() for p in model.parameters())
    cut = spread(model, ranks, root.parallel, cell.seed)
    whole = {held.name: prod(held.shape) for held in holdings(model, ranks).values()}
    engine = build_engine(model, cut, build_optimizer(model, root.optimizer), root, split, ranks)
    recorded: dict[str, npt.NDArray[Any]] = {f"initial:{name}": x for name, x in gathered(engine, "weight").items()}
    losses, norms, heldout = [], [], []
    for step in range(STEPS):
        now = split if step % 2 else split.of(cell.smaller_steps)
        microbatches = batches(step, cell, now, ranks.at.data)
        torch.manual_seed(1000 * step + ranks.at.pipeline * 100 + ranks.replicas.rank)
        if step == cell.poisoned:
            with poison(model):
                result = engine.train_step(microbatches, cell.learning_rate)
        else:
            result = engine.train_step(microbatches, cell.learning_rate)
        # Evaluation leaves what ZeRO-3 has just gathered, as it will be wanted again.
        held = sum(max(p.numel(), getattr(p, "ds_tensor", p).numel()) for p in model.parameters())
        losses.append(float(result.loss))
        norms.append(float(result.grad_norm))
        if step == 0:  # the first moment after one step is the clipped gradient, times 1 − β1 or 1 − momentum
            for kind in FIRST_MOMENTS:
                recorded |= {f"gradient:{name}": value for name, value in gathered(engine, kind).items()}
        sums = [engine.eval_step(batch) for batch in microbatches]
        heldout.append(float(ranks.sum_tensor(torch.stack(sums).sum())))
    recorded |= {f"weight:{name}": value for name, value in gathered(engine, "weight").items()}
    recorded |= {"loss": np.array(losses), "norm": np.array(norms), "heldout": np.array(heldout)}
    recorded["logits"] = engine.next_logits(ROWS, LAST).float().cpu().numpy()
    after = sum((engine.eval_step(batch) for batch in microbatches), torch.zeros(()))
    assert float(ranks.sum_tensor(after)) == pytest.approx(heldout[-1], rel=1e-6), "evaluation after generation"
    pieces = engine.pieces()
    inner = getattr(engine, "_engine", None)
    facts = {
        "engine": type(engine).__name__,
        "optimizer": type(getattr(engine, "_optimizer", None)).__name__,
        "stage": None if inner is None else inner.zero_optimization_stage(),
        "updates": engine.updates(),
        "accumulation": split.accumulation,
        "parameters": parameters,
        "stage_parameters": sum(whole.values()),
        "expert_parameters": sum(size for name, size in whole.items() if is_of_experts(name)),
        "written": sum(piece.values.numel() for piece in pieces if piece.writes and piece.kind == "weight"),
        "moments_held": sum(piece.values.numel() for piece in pieces if piece.kind in FIRST_MOMENTS),
        "graphs": counters["stats"]["unique_graphs"] if cell.compiled else 0,
        "weights_held": held,
        "blocks_held": sum(isinstance(block, Block) for block in model.blocks),
    }
    return recorded, facts


def gathered(engine: Engine, kind: str) -> dict[str, npt.NDArray[Any]]:
    """This rank's pieces of one kind, under `place_of`."""
    return {place_of(piece): piece.values.cpu().numpy().copy() for piece in engine.pieces() if piece.kind == kind}


def place_of(piece: Piece) -> str:
    """Name, whole shape, slice and first element, for `assembled`."""
    shard = piece.shard
    return f"{piece.parameter}@{json.dumps([piece.shape, shard and [shard.dim, shard.start, shard.size], piece.start])}"


def assembled(places: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """A whole parameter from everybody's pieces of it, by what follows the `@` of their places."""
    flat: dict[str, dict[int, npt.NDArray[Any]]] = defaultdict(dict)
    for place, values in places.items():
        shape, shard, start = json.loads(place)
        flat[json.dumps(shard)][start] = values
    whole = np.full(shape, np.nan, dtype=np.float32)
    for text, pieces in flat.items():
        shard = json.loads(text)
        dim, first, size = shard or [0, 0, shape[0]]
        cut = whole[(slice(None),) * dim + (slice(first, first + size),)]
        cut[...] = np.concatenate([pieces[start] for start in sorted(pieces)]).reshape(cut.shape)
    assert not np.isnan(whole).any()
    return whole


def batches(step: int, cell: Cell, split: BatchSplit, data_rank: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(step)
    rows = torch.randint(0, VOCABULARY, (GLOBAL_BATCH, LENGTH + 1), generator=generator)
    silent = torch.zeros(GLOBAL_BATCH, LENGTH, dtype=torch.bool)
    if cell.masks:
        for row in range(GLOBAL_BATCH):
            silent[row, : 3 * row] = True
    mine = list(split.rows(data_rank))
    return [
        Batch(tokens, int((~quiet).sum()), starts(tokens[:, :-1]) if cell.documents else None, quiet)
        for tokens, quiet in zip(
            rows[mine].split(split.micro_batch), silent[mine].split(split.micro_batch), strict=True
        )
    ]


def starts(inputs: torch.Tensor) -> torch.Tensor:
    """Documents that end at one token of eight."""
    ended = np.where(inputs < VOCABULARY // 8, END_OF_TEXT, 0)
    return torch.from_numpy(document_starts(ended, END_OF_TEXT))


class poison:  # noqa: N801 (reads as a verb where it is used)
    """Makes the embedding's output infinite, and so every gradient not finite, for one step."""

    def __init__(self, model: GPT) -> None:
        # A later stage of a pipeline has the module too, and never calls it.
        self._handle = model.embedding.register_forward_hook(lambda module, inputs, output: output * float("inf"))

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self._handle.remove()
