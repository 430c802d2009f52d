"""What can be spread over ranks, and how: which layouts suit a model, an optimizer and each other. Pure, no torch.

Each rule refuses with one UserError that names the key and the fix.
"""

from __future__ import annotations

from dataclasses import fields

from gptscale.config.limits import at_least, nearest_divisor
from gptscale.config.schema import DeepSpeedConfig, ParallelConfig, TrainRoot
from gptscale.config.shape import feedforward_width, kv_heads
from gptscale.runtime.errors import UserError
from gptscale.topology import Topology


def topology_of(parallel: ParallelConfig, world_size: int) -> Topology:
    """The grid of ranks. Raises ValueError where they cannot be arranged so."""
    return Topology(world_size, parallel.pipeline, parallel.sequence, parallel.tensor, parallel.expert)


def check_layout(settings: TrainRoot, world_size: int) -> None:
    parallel = settings.parallel
    if parallel.zero_stage not in (0, 1, 2, 3):
        raise UserError(f"parallel.zero_stage={parallel.zero_stage} is not known\nchoose 0, 1, 2 or 3")
    for axis in ("pipeline", "tensor", "sequence", "expert"):
        at_least(f"parallel.{axis}", getattr(parallel, axis), 1)
    if parallel.pipeline > 1 or parallel.pipeline_layers is not None or parallel.pipeline_balance != "parameters":
        _check_pipeline(settings)
    if parallel.tensor > 1:
        _check_tensor(settings)
    if parallel.sequence > 1:
        _check_sequence(settings)
    if parallel.shard_norms:
        _check_shard_norms(settings)
    if parallel.expert > 1:
        _check_expert(settings)
    _check_offload(settings)
    _check_raw(parallel)
    if settings.model.experts:
        _check_with_experts(settings)
    at_least("parallel.checkpoint_interval", parallel.checkpoint_interval, 1)
    if parallel.checkpoint_interval > 1 and parallel.activation_checkpointing == "none":
        raise UserError(
            f"parallel.checkpoint_interval={parallel.checkpoint_interval} has no effect with "
            "parallel.activation_checkpointing=none\nuse parallel.activation_checkpointing=full, or leave it out"
        )
    if parallel.activation_checkpointing == "selective":
        name = "parallel.activation_checkpointing"
        _needs_own_block(settings, f"{name}=selective", f"{name}=full")
    if parallel.engine == "plain" and world_size > 1:
        raise UserError(
            f"parallel.engine=plain is one process, but the run has {world_size} ranks\n"
            "use launch.ranks=1 or parallel.engine=deepspeed"
        )


def _check_offload(settings: TrainRoot) -> None:
    parallel = settings.parallel
    if (parallel.offload == "nvme") != (parallel.offload_path is not None):
        if parallel.offload_path is None:
            raise UserError(
                "parallel.offload=nvme needs a folder on a fast disk\n"
                "set parallel.offload_path, or parallel.offload=cpu"
            )
        raise UserError(
            f"parallel.offload_path={parallel.offload_path} has no effect with parallel.offload={parallel.offload}\n"
            "set parallel.offload=nvme, or leave the path out"
        )
    if parallel.offload == "none":
        return
    if parallel.engine == "plain" or parallel.zero_stage == 0:
        raise UserError(
            f"parallel.offload={parallel.offload} moves what ZeRO has shared out, from stage 1 on\n"
            "use parallel=zero1, zero2 or zero3"
        )
    if settings.optimizer.name == "muon":
        raise UserError(
            f"parallel.offload={parallel.offload} updates on the host, where optimizer.name=muon would take for ever\n"
            "use optimizer=adamw, or parallel.offload=none"
        )


def _check_raw(parallel: ParallelConfig) -> None:
    """Of DeepSpeed's own settings, those that would change nothing."""
    for field in fields(parallel.deepspeed.zero_optimization):
        value = getattr(parallel.deepspeed.zero_optimization, field.name)
        if value is None:
            continue
        key = f"parallel.deepspeed.zero_optimization.{field.name}"
        from_stage = 2 if field.name == "reduce_bucket_size" else 3
        at_least(key, value, 0 if field.name == "stage3_param_persistence_threshold" else 1)
        if parallel.zero_stage < from_stage:
            raise UserError(
                f"{key} has no effect with parallel.zero_stage={parallel.zero_stage}\n"
                f"use parallel.zero_stage={from_stage}, or leave it out"
            )
    raw = parallel.deepspeed
    if parallel.pipeline > 1 and raw.flops_profiler.enabled:
        raise UserError(
            "parallel.deepspeed.flops_profiler reports nothing of a pipeline\n"
            "leave it out, or use parallel.pipeline=1; `profile.steps` works with both"
        )
    if parallel.pipeline > 1 and raw.wall_clock_breakdown and raw.steps_per_print is None:
        raise UserError(
            "parallel.deepspeed.wall_clock_breakdown is shown as a pipeline's steps are printed\n"
            "set parallel.deepspeed.steps_per_print=10, say"
        )
    if parallel.engine == "plain" and parallel.deepspeed != DeepSpeedConfig():
        raise UserError("parallel.deepspeed has no effect with parallel.engine=plain\nuse parallel.engine=deepspeed")


def _check_pipeline(settings: TrainRoot) -> None:
    model, parallel = settings.model, settings.parallel
    if parallel.pipeline_balance == "time" and (parallel.pipeline == 1 or parallel.pipeline_layers is not None):
        why = "parallel.pipeline=1" if parallel.pipeline == 1 else "parallel.pipeline_layers"
        raise UserError(f"parallel.pipeline_balance=time has no effect with {why}\nleave one of them out")
    if parallel.pipeline_layers is not None:
        stages, layers = len(parallel.pipeline_layers), sum(parallel.pipeline_layers)
        if stages != parallel.pipeline or layers != model.layers or min(parallel.pipeline_layers, default=0) < 1:
            shown = ",".join(map(str, parallel.pipeline_layers))
            raise UserError(
                f"parallel.pipeline_layers=[{shown}] is not model.layers={model.layers} in parallel.pipeline="
                f"{parallel.pipeline} parts of one layer or more\nset it to null, and the stages are balanced"
            )
    if parallel.pipeline == 1:
        return
    if parallel.pipeline > model.layers:
        raise UserError(
            f"parallel.pipeline={parallel.pipeline} stages need a layer each, and model.layers={model.layers}\n"
            f"use parallel.pipeline={model.layers} or fewer"
        )
    if parallel.zero_stage != 1:
        raise UserError(
            f"parallel.zero_stage={parallel.zero_stage} does not go with parallel.pipeline={parallel.pipeline}: "
            "gradients stay until all micro-batches are through\nuse parallel.zero_stage=1"
        )
    if parallel.sequence > 1:
        raise UserError(
            f"parallel.sequence={parallel.sequence} does not go with parallel.pipeline={parallel.pipeline}\n"
            "use parallel.sequence=1, or parallel.pipeline=1"
        )
    _check_cut(settings, "pipeline")
    _refuse_muon(settings, "pipeline")
    _refuse_noise(settings, "pipeline")


def _check_tensor(settings: TrainRoot) -> None:
    """Every tensor rank has as many heads, features and rows of the vocabulary as the others."""
    model, size = settings.model, settings.parallel.tensor
    for key, count in (
        ("model.heads", model.heads),
        ("model.kv_heads", kv_heads(model)),
        ("model.feedforward_width", feedforward_width(model)),
        ("model.vocab_multiple", model.vocab_multiple),
    ):
        if count % size:
            raise UserError(
                f"parallel.tensor={size} does not divide {key}={count}\n"
                f"use parallel.tensor={nearest_divisor(count, size)}, or a {key} that is a multiple of {size}"
            )
    _check_cut(settings, "tensor")
    _refuse_muon(settings, "tensor")


def _check_sequence(settings: TrainRoot) -> None:
    """Every sequence rank has as many tokens of a row, and heads within attention, as the others."""
    model, parallel = settings.model, settings.parallel
    for key, count in (("model.heads", model.heads), ("model.kv_heads", kv_heads(model))):
        if count % (parallel.sequence * parallel.tensor):
            by = "parallel.sequence" if parallel.tensor == 1 else "parallel.sequence × parallel.tensor"
            raise UserError(
                f"{by}={parallel.sequence * parallel.tensor} does not divide {key}={count}\n"
                f"use a {key} that it divides, or fewer ranks a row: parallel.sequence=1"
            )
    _check_lengths(settings, "sequence")
    _check_cut(settings, "sequence")
    _refuse_noise(settings, "sequence")


def _check_lengths(settings: TrainRoot, axis: str) -> None:
    """Rows have to be cut evenly along an axis."""
    size = getattr(settings.parallel, axis)
    lengths = {"data.sequence_length": settings.data.sequence_length, "train.length_from": settings.train.length_from}
    lengths |= {f"sequence_length of stage {stage.name}": stage.sequence_length for stage in settings.data.stages}
    for key, length in lengths.items():
        if length is not None and length % size:
            raise UserError(f"parallel.{axis}={size} does not divide {key}={length}\nuse a multiple of {size} tokens")


def _check_expert(settings: TrainRoot) -> None:
    """Every expert rank has as many experts as the others."""
    model, parallel = settings.model, settings.parallel
    if not model.experts:
        raise UserError(
            f"parallel.expert={parallel.expert} shares out experts, and model.experts=0: the model has none\n"
            "set model.experts, e.g. model.experts=8, or parallel.expert=1"
        )
    if model.experts % parallel.expert:
        raise UserError(
            f"parallel.expert={parallel.expert} does not divide model.experts={model.experts}\n"
            f"use parallel.expert={nearest_divisor(model.experts, parallel.expert)}"
        )
    if parallel.zero_stage == 3:
        raise UserError(
            f"parallel.zero_stage=3 does not go with parallel.expert={parallel.expert}: experts are cut already\n"
            "use parallel.zero_stage=1 or 2"
        )
    _refuse_noise(settings, "expert")


def _check_with_experts(settings: TrainRoot) -> None:
    model, parallel = settings.model, settings.parallel
    for axis in ("pipeline", "tensor", "sequence"):
        if getattr(parallel, axis) > 1:
            raise UserError(
                f"model.experts={model.experts} does not go with parallel.{axis}={getattr(parallel, axis)}\n"
                f"use parallel.{axis}=1, and parallel.expert to share out the experts"
            )
    if settings.train.compile != "none":
        raise UserError(
            f"train.compile={settings.train.compile} does not go with model.experts={model.experts}: how many tokens "
            "an expert gets is known too late\nuse train.compile=none"
        )
    if settings.optimizer.name == "muon":
        raise UserError(
            f"optimizer.name=muon works on matrices, and model.experts={model.experts} are stacks of them\n"
            "use optimizer=adamw"
        )


def _check_shard_norms(settings: TrainRoot) -> None:
    parallel = settings.parallel
    needs = ("parallel.sequence", parallel.sequence, 1), ("model.dropout", settings.model.dropout, 0)
    _goes_with("parallel.shard_norms=true", "parallel.shard_norms=false", *needs)
    if parallel.tensor == 1:
        raise UserError(
            "parallel.shard_norms=true has no effect with parallel.tensor=1\nset parallel.tensor, or leave it out"
        )
    _check_lengths(settings, "tensor")


def _refuse_muon(settings: TrainRoot, axis: str) -> None:
    if settings.optimizer.name == "muon":
        raise UserError(
            "optimizer.name=muon works on whole matrices, and all of them: "
            f"parallel.{axis}={getattr(settings.parallel, axis)} leaves a rank parts\n"
            f"use parallel.{axis}=1, or optimizer=adamw"
        )


def _refuse_noise(settings: TrainRoot, axis: str) -> None:
    if settings.train.noise_scale_every_steps:
        raise UserError(
            "train.noise_scale_every_steps compares gradients of whole micro-batches, of which "
            f"parallel.{axis}={getattr(settings.parallel, axis)} leaves a rank parts\n"
            f"set it to 0, or parallel.{axis}=1"
        )


def _check_cut(settings: TrainRoot, axis: str) -> None:
    _needs_own_block(settings, f"parallel.{axis}={getattr(settings.parallel, axis)}", f"parallel.{axis}=1")


def _needs_own_block(settings: TrainRoot, setting: str, otherwise: str) -> None:
    """For what takes a block apart: our own, not fused by a compiler."""
    needs = ("model.block", settings.model.block, "gpt"), ("train.compile", settings.train.compile, "none")
    _goes_with(setting, otherwise, *needs)


def _goes_with(setting: str, otherwise: str, *needs: tuple[str, object, object]) -> None:
    """Each of `needs` is a key, its value, and the only one that `setting` goes with."""
    for key, value, needed in needs:
        if value != needed:
            raise UserError(f"{setting} does not go with {key}={value}\nuse {key}={needed}, or {otherwise}")
