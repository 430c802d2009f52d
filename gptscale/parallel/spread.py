"""A whole model → this rank's part of it."""

from __future__ import annotations

from gptscale.config.schema import ParallelConfig
from gptscale.model.gpt import GPT
from gptscale.parallel.ranks import Ranks
from gptscale.parallel.sequence import split_sequences
from gptscale.parallel.slices import take_slices
from gptscale.parallel.stages import keep, parameter_weights
from gptscale.parallel.tensor import join_slices
from gptscale.plan.stages import Cut, balanced, cuts


def by_parts(ranks: Ranks, parallel: ParallelConfig, block: str) -> bool:
    """Whether a rank makes its own part of a model that comes on the meta device, and nobody the whole.

    Blocks of a user's own may hold more than parameters: they are made whole, and then cut.
    """
    return block == "gpt" and (ranks.has_parts or (partitions(parallel) and ranks.replicas.size > 1))


def partitions(parallel: ParallelConfig) -> bool:
    """Whether weights are partitioned by ZeRO, which takes them one by one."""
    return parallel.engine == "deepspeed" and parallel.zero_stage == 3


def spread(model: GPT, ranks: Ranks, parallel: ParallelConfig, seed: int) -> Cut:
    """Apply what the ranks' coordinates ask for, before an optimizer is made of what is left of the model.

    The model holds its initial weights, or is on the meta device and gets them here, of `seed`: this rank's alone.
    Returns which part of the sequence is left.
    """
    blocks = parallel.pipeline_layers or balanced(parameter_weights(model), ranks.pipeline.size)
    cut = cuts(blocks)[ranks.pipeline.rank]
    if ranks.pipeline.size > 1:
        keep(model, cut)
    later = ranks.device if by_parts(ranks, parallel, model.config.block) and partitions(parallel) else None
    take_slices(model, ranks.tensor, ranks.expert, seed, later)
    join_slices(model, ranks.tensor, parallel.shard_norms)
    split_sequences(model, ranks.sequence)
    if ranks.expert.size > 1:
        from gptscale.parallel.expert import join_experts  # imports DeepSpeed, which one process does without

        join_experts(model, ranks)
    return cut
