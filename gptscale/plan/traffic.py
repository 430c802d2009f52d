"""What a rank hands to its peers in one optimizer step, by purpose: formulas, of our own block with AdamW.

Mixtures of experts have none here: how many tokens go to another rank depends on the text.

They are what `gptscale.parallel` does, read there, not what it should do at best; `gptscale bench layouts` counts the
bytes and refuses to report where they differ. Gradients and weights travel in fp32, activations in the compute type.

Shape legend of the formulas: B sequences of a micro-batch, T tokens, D width; n ranks of a group; M micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from gptscale.config.parallel_rules import topology_of
from gptscale.config.schema import Checkpointing, ModelConfig, ParallelConfig, TrainRoot
from gptscale.config.shape import head_width, kv_heads
from gptscale.config.stages import longest_sequence
from gptscale.plan.collectives import Operation, Payload, wire_bytes
from gptscale.plan.parameters import Parameter, held, parts
from gptscale.plan.stages import Cut, balanced, cuts
from gptscale.topology import BatchSplit, Topology

Purpose = Literal["gradients", "weights", "tensor", "sequence", "pipeline", "tied embedding", "numbers"]

_FP32, _INT64 = 4, 8
_COMPUTE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
_ALIGNED = 2
"""DeepSpeed 0.19.8 fills flat groups up to a multiple of so many elements a rank (`nccl_start_alignment_factor`)."""
_PERSISTENT = 100_000
"""ZeRO-3 keeps parameters of so many elements or fewer whole: DeepSpeed's `stage3_param_persistence_threshold`."""
_REUSE_DISTANCE = 10**9
"""It keeps a gathered weight that is used again within so many elements: its `stage3_max_reuse_distance`."""


@dataclass(frozen=True)
class Transfer:
    """What one rank hands to one kind of operation in a step, all calls together."""

    purpose: Purpose
    operation: Operation
    ranks: int
    """Of the group, this one included; 2 for a send."""
    payload_bytes: int
    """The larger side of the operation, padding included; see `wire_bytes`."""

    @property
    def wire_bytes(self) -> float:
        """Bytes that the rank sends if a ring does it."""
        return wire_bytes(self.operation, self.payload_bytes, self.ranks)


@dataclass(frozen=True)
class Step:
    """All that the traffic of an optimizer step follows from."""

    model: ModelConfig
    vocab_size: int
    sequence_length: int
    positions: int
    """That a learned table has: of the longest sequences of a run."""
    compute: Literal["fp32", "bf16", "fp16"]
    parallel: ParallelConfig
    topology: Topology
    split: BatchSplit

    @classmethod
    def of(cls, settings: TrainRoot, split: BatchSplit, world_size: int) -> Step:
        """Settings that are checked; `split` says how the step's batch is cut."""
        return cls(
            settings.model,
            settings.tokenizer.vocab_size,
            settings.data.sequence_length,
            longest_sequence(settings.data),
            settings.precision.compute,
            settings.parallel,
            topology_of(settings.parallel, world_size),
            split,
        )

    @property
    def replicas(self) -> int:
        """Ranks that hold the same part of the model."""
        return self.topology.data * self.topology.sequence

    @property
    def activation_bytes(self) -> int:
        """Of the residual stream [B, T, D] of all micro-batches of a step, of whole rows."""
        return self._tokens * self.model.width * _COMPUTE_BYTES[self.compute]

    @property
    def _tokens(self) -> int:
        """That a data rank sees in a step."""
        return self.split.per_rank * self.sequence_length


def step_traffic(step: Step, stage: int = 0) -> list[Transfer]:
    """What each rank of this stage of the pipeline hands to its peers, where any are asked; the stage's are alike."""
    whole = parts(step.model, step.vocab_size, step.positions)
    topology = step.topology
    blocks = step.parallel.pipeline_layers or balanced(
        [sum(parameter.numel for parameter in part) for part in whole], topology.pipeline
    )
    cut = cuts(blocks)[stage]
    mine = held(whole, cut, topology.tensor)
    found = [
        *_data_parallel(step, whole, mine),
        *_tensor_parallel(step, cut),
        *_sequence_parallel(step),
        *_pipeline(step, cut),
        *_numbers(step, cut, mine),
    ]
    return [transfer for transfer in found if transfer.ranks > 1 and transfer.payload_bytes]


def payload(transfers: Sequence[Transfer]) -> Payload:
    """The same by operation and ranks: what a logger can tell apart."""
    found: dict[tuple[Operation, int], int] = {}
    for transfer in transfers:
        key = transfer.operation, transfer.ranks
        found[key] = found.get(key, 0) + transfer.payload_bytes
    return found


def _data_parallel(step: Step, whole: Sequence[Sequence[Parameter]], mine: Sequence[Parameter]) -> Iterator[Transfer]:
    """Gradients and weights, by the stage of ZeRO (Rajbhandari et al., arXiv 1910.02054, section 7)."""
    n, accumulation = step.replicas, step.split.accumulation
    every = _FP32 * sum(parameter.numel for parameter in mine)
    match step.parallel.zero_stage:
        case 0:
            yield Transfer("gradients", "all-reduce", n, every)
        case 1:
            yield Transfer("gradients", "reduce-scatter", n, _flat_bytes(mine, n))
            yield Transfer("weights", "all-gather", n, _flat_bytes(mine, n))
        case 2:
            # In every micro-batch: no rank keeps a whole gradient until the next.
            yield Transfer("gradients", "reduce", n, every * accumulation)
            yield Transfer("weights", "all-gather", n, _flat_bytes(mine, n))
        case 3:
            scattered = sum(_partitioned_bytes(parameter, n) for parameter in mine)
            yield Transfer("gradients", "reduce-scatter", n, scattered * accumulation)
            yield Transfer("weights", "all-gather", n, _gathered_bytes(step, whole))


def _flat_bytes(parameters: Sequence[Parameter], ranks: int) -> int:
    """Stages 1 and 2: of both groups of the optimizer, each flat and filled up so that all ranks have equal parts."""
    unit = _ALIGNED * ranks
    groups = [sum(p.numel for p in parameters if p.decays is decays) for decays in (True, False)]
    return _FP32 * sum(-(-elements // unit) * unit for elements in groups)


def _partitioned_bytes(parameter: Parameter, ranks: int) -> int:
    """Stage 3: of a parameter, filled up so that all ranks have equal parts."""
    return _FP32 * -(-parameter.numel // ranks) * ranks


def _gathered_bytes(step: Step, whole: Sequence[Sequence[Parameter]]) -> int:
    """Stage 3: small parameters once, after the update; others in each micro-batch, before forward.

    And once more for backward only where DeepSpeed let go of them in between: where the modules that it finds in its
    trace before their next use have as many elements as its reuse distance. From a block it looks through later blocks
    and the head up to the whole model, with which backward begins; from the embedding through the head twice, and not
    into blocks, which are units to it (`gptscale.parallel.deepspeed_config`). Far below that, it frees nothing before
    backward. Nor does it where its prefetching (`stage3_prefetch_bucket_size`) has come by the next use by then.
    """
    raw = step.parallel.deepspeed.zero_optimization
    small, near = raw.stage3_param_persistence_threshold, raw.stage3_max_reuse_distance
    small, near = _PERSISTENT if small is None else small, _REUSE_DISTANCE if near is None else near
    n, accumulation = step.replicas, step.split.accumulation
    embedding, *blocks, head = [[parameter.sliced(step.topology.tensor) for parameter in part] for part in whole]
    sizes = [sum(parameter.numel for parameter in part) for part in (*blocks, head)]
    distances = [2 * sizes[-1], *(sum(sizes[number + 1 :]) for number in range(len(blocks))), 0]
    total, counted = 0, set[str]()
    for part, distance in zip((embedding, *blocks, head), distances, strict=True):
        for parameter in part:
            if parameter.name in counted:
                continue
            counted.add(parameter.name)
            kept = distance < near or (part is embedding and parameter in head)
            times = 1 if parameter.numel <= small else accumulation * (1 if kept else 2)
            total += times * _partitioned_bytes(parameter, n)
    return total


def _tensor_parallel(step: Step, cut: Cut) -> Iterator[Transfer]:
    """Sums over activations (Shoeybi et al., arXiv 1909.08053, section 3), and over what the loss asks of each token.

    A block has two sums in forward and two in backward. The embedding's rows are summed in fp32, before they are cast;
    the gradient of the head's input is summed once. A token's loss takes its largest logit, the sum of exponentials
    and the target's logit, in fp32.
    """
    n = step.topology.tensor
    stretch = step.activation_bytes // step.topology.sequence
    tokens = step._tokens // step.topology.sequence
    total = 0
    if step.parallel.shard_norms:
        yield from _sharded_norms(step, cut)
    else:  # of the two in forward, the second need not be done again
        total = (4 * len(cut.blocks) + _recomputed(step, cut)) * stretch
    if cut.first:
        total += tokens * step.model.width * _FP32
    if cut.last:
        total += stretch + 3 * tokens * _FP32
    if step.model.qk_norm:  # gradients of what all heads share
        total += 2 * head_width(step.model) * _FP32 * len(cut.blocks) * step.split.accumulation
    yield Transfer("tensor", "all-reduce", n, total)


def _sharded_norms(step: Step, cut: Cut) -> Iterator[Transfer]:
    """In place of sums: rows are gathered before products and scattered behind them, in forward and in backward
    (Korthikanti et al., arXiv 2205.05198, section 3). What the embedding gives is cut without asking anybody, and
    gathered for its gradient; the head has whole rows gathered, and its gradient is cut likewise.
    """
    n, model, blocks = step.topology.tensor, step.model, len(cut.blocks)
    gathered = 4 * blocks + 2 * _recomputed(step, cut) + 2 * _recomputed(step, cut, "selective")
    gathered += cut.first + cut.last
    yield Transfer("tensor", "all-gather", n, gathered * step.activation_bytes)
    scattered = 4 * blocks + _recomputed(step, cut)
    yield Transfer("tensor", "reduce-scatter", n, scattered * step.activation_bytes)
    vectors = 2 * (2 if model.norm == "layernorm" and model.bias else 1) + (2 if model.bias else 0)
    of_each_batch = vectors * model.width * _FP32 * blocks
    yield Transfer("tensor", "all-reduce", n, of_each_batch * step.split.accumulation)


def _sequence_parallel(step: Step) -> Iterator[Transfer]:
    """Queries, keys, values and what attention made of them, there and back (Jacobs et al., arXiv 2309.14509).

    A block hands over B · T/n · W · (2H + 2K) elements in forward, and their gradients in backward: H and K heads of
    queries and of keys, W their features.
    """
    n, model = step.topology.sequence, step.model
    heads = 2 * (model.heads + kv_heads(model)) // step.topology.tensor
    exchanged = step._tokens // n * heads * head_width(model) * _COMPUTE_BYTES[step.compute]
    times = 2 * model.layers + _recomputed(step, Cut(True, range(model.layers), True))
    yield Transfer("sequence", "all-to-all", n, times * exchanged)


def _recomputed(step: Step, cut: Cut, how: Checkpointing = "full") -> int:
    """Blocks of a stage whose forward runs a second time, or `selective`: the norms in it."""
    if step.parallel.activation_checkpointing != how:
        return 0
    return sum(block % step.parallel.checkpoint_interval == 0 for block in cut.blocks)


def _pipeline(step: Step, cut: Cut) -> Iterator[Transfer]:
    """Activations to the stage after and their gradients to the one before; a tied weight's between the ends."""
    if step.topology.pipeline == 1:
        return
    neighbours = (not cut.first) + (not cut.last)
    sent = step.activation_bytes // (step.topology.tensor if step.parallel.shard_norms else 1)
    yield Transfer("pipeline", "send", 2, neighbours * sent)
    if step.model.tied_embeddings and (cut.first or cut.last):
        (weight, *_), *_ = parts(step.model, step.vocab_size, step.positions)
        sliced = weight.sliced(step.topology.tensor).numel
        yield Transfer("tied embedding", "all-reduce", 2, _FP32 * sliced)
        if step.topology.data * step.topology.sequence > 2:  # so that both ends hold the same to the bit
            yield Transfer("tied embedding", "broadcast", 2, _FP32 * sliced)


def _numbers(step: Step, cut: Cut, mine: Sequence[Parameter]) -> Iterator[Transfer]:
    """A step's tokens, its loss, and the squared norm of the gradient: over those who share a part of the model out,
    and over those who hold another part."""
    topology, n = step.topology, step.replicas
    yield Transfer("numbers", "all-reduce", topology.world_size, _INT64)
    norms = len({parameter.decays for parameter in mine}) if step.parallel.zero_stage == 3 else 1
    if step.parallel.zero_stage > 0:
        yield Transfer("numbers", "all-reduce", n, norms * _FP32)
    yield Transfer("numbers", "all-reduce", topology.tensor * topology.pipeline, norms * _FP32)
    if topology.pipeline == 1 or cut.last:
        yield Transfer("numbers", "all-reduce", n, _FP32)
    yield Transfer("numbers", "broadcast", topology.pipeline, 2 * _FP32)
