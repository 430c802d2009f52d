"""What must hold between settings, checked before anything starts and again in the workers. Pure, no torch.

Each rule refuses with one UserError that names the key and the fix.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import PurePath

from gptscale.config.schema import (
    MIN_LOSS_SCALE,
    DataConfig,
    DeepSpeedConfig,
    ModelConfig,
    ParallelConfig,
    ProfileConfig,
    SourceConfig,
    TrainRoot,
)
from gptscale.config.shape import feedforward_width, kv_heads
from gptscale.config.stages import as_corpora, check_stages, stage_folders
from gptscale.config.step_plan import step_plan
from gptscale.runtime.errors import UserError
from gptscale.topology import BatchSplit, Topology, split_batch


def check(settings: TrainRoot, world_size: int) -> BatchSplit:
    """Check every rule for a run on `world_size` ranks; returns how its global batch is cut."""
    check_model(settings.model)
    _check_ranges(settings)
    _check_heldout_sets(settings)
    _check_addresses(settings)
    _check_length(settings)
    _check_profile(settings.profile, world_size)
    _check_engine(settings, world_size)
    try:
        topology = topology_of(settings.parallel, world_size)
        split = split_batch(settings.train.global_batch, settings.train.micro_batch, topology.data)
    except ValueError as error:
        raise UserError(str(error)) from error
    _check_ramps(settings, topology.data)
    check_stages(settings, split)
    _check_noise_scale(settings, split)
    return split


def topology_of(parallel: ParallelConfig, world_size: int) -> Topology:
    """The grid of ranks. Raises ValueError where they cannot be arranged so."""
    return Topology(world_size, parallel.pipeline, parallel.sequence, parallel.tensor, parallel.expert)


def check_model(model: ModelConfig) -> None:
    _at_least("model.layers", model.layers, 1)
    _at_least("model.heads", model.heads, 1)
    _at_least("model.width", model.width, 1)
    _at_least("model.vocab_multiple", model.vocab_multiple, 1)
    _at_least("model.loss_chunk", model.loss_chunk, 1)
    if model.head_width is not None:
        _at_least("model.head_width", model.head_width, 1)
    elif model.width % model.heads:
        below, above = model.width // model.heads * model.heads, -(-model.width // model.heads) * model.heads
        raise UserError(
            f"model.heads={model.heads} does not divide model.width={model.width}\n"
            f"use model.width={below or above} or {above}, or model.heads={_nearest_divisor(model.width, model.heads)}"
        )
    width = model.width // model.heads if model.head_width is None else model.head_width
    _at_least("model.kv_heads", kv_heads(model), 1)
    if model.feedforward_width is not None:
        _at_least("model.feedforward_width", model.feedforward_width, 1)
    for name in ("rope_theta", "norm_epsilon", "init_std", "embedding_scale"):
        _above_zero(f"model.{name}", getattr(model, name), str(getattr(ModelConfig, name)))
    if model.heads % kv_heads(model):
        raise UserError(
            f"model.kv_heads={kv_heads(model)} does not divide model.heads={model.heads}\n"
            f"use model.kv_heads={_nearest_divisor(model.heads, kv_heads(model))}"
        )
    if model.positions == "rope" and width % 2:
        raise UserError(
            f"model.positions=rope rotates pairs of features, but a head has {width}\n"
            "choose model.width and model.heads, or model.head_width, so that this is even"
        )
    _check_windows(model)
    _check_rope_scaling(model)
    if model.experts:
        _check_experts(model)
    _at_least("model.logit_softcap", model.logit_softcap, 0)
    _at_least("model.z_loss", model.z_loss, 0)
    if not 0 <= model.dropout < 1:
        raise UserError(
            f"model.dropout={model.dropout} is not a probability below 1\nuse a value from 0 up to 1, e.g. 0.1"
        )


def _check_windows(model: ModelConfig) -> None:
    if not model.attention_pattern:
        raise UserError("model.attention_pattern is empty\nname at least one kind of layer, e.g. [full]")
    if model.window is not None:
        _at_least("model.window", model.window, 1)
    elif "window" in model.attention_pattern:
        raise UserError(
            "model.attention_pattern has window layers, and model.window is not set\nset it, e.g. model.window=256"
        )


def _check_experts(model: ModelConfig) -> None:
    for key, least in (("experts", 2), ("experts_per_token", 1), ("shared_experts", 0), ("expert_capacity", 0)):
        _at_least(f"model.{key}", getattr(model, key), least)
    _at_least("model.balance_loss", model.balance_loss, 0)
    _at_least("model.router_z_loss", model.router_z_loss, 0)
    if model.expert_width is not None:
        _at_least("model.expert_width", model.expert_width, 1)
    if model.experts_per_token > model.experts:
        raise UserError(
            f"model.experts_per_token={model.experts_per_token} is more than model.experts={model.experts}\n"
            f"use model.experts_per_token={model.experts} or fewer"
        )
    if "experts" not in model.expert_layers:
        raise UserError(
            f"model.experts={model.experts}, and model.expert_layers names no layer that has them\n"
            "use model.expert_layers=[experts], or [dense,experts] for every other layer"
        )
    if model.bias:
        raise UserError(
            f"model.experts={model.experts}, and experts have no biases\nset model.bias=false, or model.experts=0"
        )
    if model.block != "gpt":
        raise UserError(
            f"model.experts={model.experts} is for model.block=gpt, and model.block={model.block}\nset model.experts=0"
        )


def _check_rope_scaling(model: ModelConfig) -> None:
    if model.rope_scaling == "none":
        if model.rope_factor != 1:
            raise UserError(
                f"model.rope_factor={model.rope_factor} has no effect with model.rope_scaling=none\n"
                "choose linear, llama3 or yarn, or leave model.rope_factor=1"
            )
        return
    if model.positions != "rope":
        raise UserError(f"model.rope_scaling={model.rope_scaling} needs rotary positions\nset model.positions=rope")
    _at_least("model.rope_factor", model.rope_factor, 1)
    if model.rope_scaling != "linear" and model.rope_original_length is None:
        raise UserError(
            f"model.rope_scaling={model.rope_scaling} needs the length that the frequencies were trained with\n"
            "set model.rope_original_length, e.g. 4096"
        )


def check_local_launch(settings: TrainRoot) -> None:
    """For whoever is about to start the ranks on this host; other launchers bring their own hosts."""
    if settings.launch.nodes != 1:
        raise UserError(
            f"launch.nodes={settings.launch.nodes}, but launch=local starts ranks on this host only\n"
            "start one worker a rank with srun or torchrun (see launch/), or use launch.nodes=1"
        )


def _check_ranges(settings: TrainRoot) -> None:
    _at_least("train.global_batch", settings.train.global_batch, 1)
    _at_least("train.micro_batch", settings.train.micro_batch, 1)
    _at_least("data.sequence_length", settings.data.sequence_length, 1)
    _at_least("data.block_sequences", settings.data.block_sequences, 1)
    _at_least("data.window_blocks", settings.data.window_blocks, 1)
    _at_least("checkpoint.every_steps", settings.checkpoint.every_steps, 1)
    _at_least("checkpoint.keep", settings.checkpoint.keep, 2)
    _at_least("launch.ranks", settings.launch.ranks, 1)
    _at_least("evaluation.every_steps", settings.evaluation.every_steps, 0)
    _at_least("evaluation.sequences", settings.evaluation.sequences, 0)
    _at_least("evaluation.sample_tokens", settings.evaluation.sample_tokens, 1)
    _at_least("guard.max_skipped_steps", settings.guard.max_skipped_steps, 1)
    _at_least("logging.print_every_steps", settings.logging.print_every_steps, 1)
    _at_least("schedule.warmup_tokens", settings.schedule.warmup_tokens, 0)
    for name in ("final_ratio", "cooldown_ratio"):
        ratio = getattr(settings.schedule, name)
        if not 0 <= ratio <= 1:
            raise UserError(f"schedule.{name}={ratio} is not a share\nuse a value from 0 to 1, e.g. 0.1")
    _at_least("optimizer.clip_norm", settings.optimizer.clip_norm, 0)
    _at_least("optimizer.weight_decay", settings.optimizer.weight_decay, 0)
    _at_least("optimizer.epsilon", settings.optimizer.epsilon, 0)
    _above_zero("optimizer.learning_rate", settings.optimizer.learning_rate, "6e-4")
    if not settings.precision.loss_scale >= MIN_LOSS_SCALE:
        raise UserError(
            f"precision.loss_scale={settings.precision.loss_scale} is below {MIN_LOSS_SCALE}\n"
            "set precision.loss_scale=65536, from where it finds its value"
        )
    _at_least("precision.loss_scale_window", settings.precision.loss_scale_window, 1)
    _at_least("precision.loss_scale_hysteresis", settings.precision.loss_scale_hysteresis, 1)
    _above_zero("parallel.timeout_s", settings.parallel.timeout_s, "600")
    _above_zero("launch.stop_timeout_s", settings.launch.stop_timeout_s, "60")
    if settings.launch.threads is not None:
        _at_least("launch.threads", settings.launch.threads, 1)
    _at_least("optimizer.newton_schulz_steps", settings.optimizer.newton_schulz_steps, 1)
    _above_zero("optimizer.update_rms", settings.optimizer.update_rms, "0.2")
    for name in ("beta1", "beta2", "momentum"):
        beta = getattr(settings.optimizer, name)
        if not 0 <= beta < 1:
            raise UserError(f"optimizer.{name}={beta} is not a share below 1\nuse a value from 0 up to 1, e.g. 0.95")


def _check_heldout_sets(settings: TrainRoot) -> None:
    names = list(source_names(settings.data))
    for chosen in settings.evaluation.sets:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", chosen.name):
            raise UserError(
                f"evaluation.sets: '{chosen.name}' is not a name\nuse letters, digits, - and _, as in a file's name"
            )
        if chosen.name in names:
            raise UserError(f"evaluation.sets: two held-out sets are called {chosen.name}\nrename one of them")
        names.append(chosen.name)
        if not chosen.path:
            raise UserError(f"evaluation.sets: {chosen.name} has no path\nname a prepared folder")
        if chosen.sequences is not None:
            _at_least(f"evaluation.sets: sequences of {chosen.name}", chosen.sequences, 0)


def _check_addresses(settings: TrainRoot) -> None:
    """A run's settings are kept and shown: no place for a password."""
    data = settings.data
    addresses = [("data.path", corpus.path) for corpus in (() if data.path is None else as_corpora(data.path))]
    addresses += [("data.stages", folder) for folder in stage_folders(data)]
    addresses += [("evaluation.sets", chosen.path) for chosen in settings.evaluation.sets]
    for key, address in addresses:
        if found := re.match(r"([a-z][a-z0-9+.-]*://)[^/]*:[^/]*@", address):
            raise UserError(
                f"{key}={found[1]}… holds a password, and a run keeps its settings\n"
                "leave it out: credentials are found in the environment, or where the store's own tools keep them"
            )
    if settings.data.cache_bytes is not None:
        _at_least("data.cache_bytes", settings.data.cache_bytes, 1)


def source_names(data: DataConfig) -> tuple[str, ...]:
    """What a mixture's held-out parts are called: their folders' names, made unique. () where there is one corpus."""
    if data.path is None or isinstance(data.path, str) or len(data.path) < 2:
        return ()
    return _unique_names(os.path.basename(os.path.normpath(corpus.path)) for corpus in data.path)


def text_names(sources: Sequence[SourceConfig]) -> tuple[str, ...]:
    """What the texts of one prepared folder are called: by their own names, else their paths or formats."""
    return _unique_names(source.name or PurePath(source.path).stem or source.format for source in sources)


def _unique_names(bases: Iterable[str]) -> tuple[str, ...]:
    """Fit for a metric's key, and each another."""
    names: list[str] = []
    for base in (re.sub(r"[^A-Za-z0-9_-]+", "-", base) for base in bases):
        name, number = base, 2
        while name in names:
            name, number = f"{base}-{number}", number + 1
        names.append(name)
    return tuple(names)


def _check_length(settings: TrainRoot) -> None:
    steps, tokens = settings.train.steps, settings.train.tokens
    if (steps is None) == (tokens is None):
        state = "both set" if steps is not None else "neither set"
        raise UserError(f"the run's length is train.steps or train.tokens: {state}\nset one and leave the other null")
    _at_least("train.steps" if steps is not None else "train.tokens", steps if steps is not None else tokens or 0, 1)
    if settings.schedule.total_steps is not None:
        _at_least("schedule.total_steps", settings.schedule.total_steps, 1)
        if settings.schedule.decay_tokens is not None:
            raise UserError(
                "schedule.total_steps and schedule.decay_tokens both say where the schedule ends\n"
                "set one of them to null"
            )
    if settings.schedule.decay_tokens is not None:
        _at_least("schedule.decay_tokens", settings.schedule.decay_tokens, 1)


def _check_profile(profile: ProfileConfig, world_size: int) -> None:
    if profile.steps is not None and (len(profile.steps) != 2 or not 1 <= profile.steps[0] <= profile.steps[1]):
        raise UserError(
            f"profile.steps={list(profile.steps)} is not a first and a last step\nset it, e.g. profile.steps=[10,13]"
        )
    outside = [rank for rank in profile.ranks if not 0 <= rank < world_size]
    if outside or not profile.ranks:
        what = f"names rank {outside[0]}, but the run has {world_size}" if outside else "names no rank"
        raise UserError(
            f"profile.ranks={list(profile.ranks)} {what}\nuse ranks from 0 to {world_size - 1}, e.g. profile.ranks=[0]"
        )


def _check_ramps(settings: TrainRoot, data_ranks: int) -> None:
    train = settings.train
    for start, over, example in (("ramp_from", "ramp_tokens", "4e9"), ("length_from", "length_tokens", "1e9")):
        if getattr(train, start) is not None:
            _at_least(f"train.{start}", getattr(train, start), 1)
        if getattr(train, over) is not None:
            _at_least(f"train.{over}", getattr(train, over), 1)
        if (getattr(train, start) is None) != (getattr(train, over) is None):
            missing, there = (over, start) if getattr(train, over) is None else (start, over)
            value = example if missing == over else "16"
            raise UserError(f"train.{there} is set, train.{missing} is not\nset it too, e.g. train.{missing}={value}")
    if train.ramp_from is not None:
        if train.global_batch % train.ramp_from:
            raise UserError(
                f"train.ramp_from={train.ramp_from} does not divide train.global_batch={train.global_batch}\n"
                f"use train.ramp_from={_nearest_divisor(train.global_batch, train.ramp_from)}"
            )
        if train.ramp_from % data_ranks:
            raise UserError(
                f"train.ramp_from={train.ramp_from} sequences cannot be shared evenly by {data_ranks} data ranks\n"
                f"use a multiple of {data_ranks} that divides train.global_batch={train.global_batch}"
            )
    shortest, length = train.length_from, settings.data.sequence_length
    if shortest is not None:
        halves = [length >> n for n in range(length.bit_length()) if length % (1 << n) == 0]
        if shortest not in halves:
            raise UserError(
                f"train.length_from={shortest} does not double up to data.sequence_length={length}\n"
                f"use train.length_from={min(halves, key=lambda half: (abs(half - shortest), half))}"
            )


def _check_noise_scale(settings: TrainRoot, split: BatchSplit) -> None:
    """It compares micro-batches with the whole batch: the smallest batch has to have two."""
    train = settings.train
    _at_least("train.noise_scale_every_steps", train.noise_scale_every_steps, 0)
    if not train.noise_scale_every_steps:
        return
    plan = step_plan(settings)
    starts = {"train.ramp_from" if train.ramp_from else "train.global_batch": 0}
    starts |= {
        f"stage {stage.name}": start.samples for stage, start in zip(settings.data.stages, plan.stages, strict=True)
    }
    for what, start in starts.items():
        smallest = plan.split(start, split)
        if smallest.data * smallest.accumulation < 2:
            raise UserError(
                f"train.noise_scale_every_steps needs two micro-batches a step: {what}={smallest.global_batch} is one\n"
                "use a smaller train.micro_batch, or train.noise_scale_every_steps=0"
            )


def _check_engine(settings: TrainRoot, world_size: int) -> None:
    parallel = settings.parallel
    if parallel.zero_stage not in (0, 1, 2, 3):
        raise UserError(f"parallel.zero_stage={parallel.zero_stage} is not known\nchoose 0, 1, 2 or 3")
    for axis in ("pipeline", "tensor", "sequence", "expert"):
        _at_least(f"parallel.{axis}", getattr(parallel, axis), 1)
    if parallel.pipeline > 1 or parallel.pipeline_layers is not None:
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
    _at_least("parallel.checkpoint_interval", parallel.checkpoint_interval, 1)
    if parallel.activation_checkpointing == "selective":
        _check_selective(settings)
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
        key, from_stage = f"parallel.deepspeed.zero_optimization.{field.name}", 2 if field.name.startswith("re") else 3
        _at_least(key, value, 0 if field.name == "stage3_param_persistence_threshold" else 1)
        if parallel.zero_stage < from_stage:
            raise UserError(
                f"{key} has no effect with parallel.zero_stage={parallel.zero_stage}\n"
                f"use parallel.zero_stage={from_stage}, or leave it out"
            )
    if parallel.engine == "plain" and parallel.deepspeed != DeepSpeedConfig():
        raise UserError("parallel.deepspeed has no effect with parallel.engine=plain\nuse parallel.engine=deepspeed")


def _check_selective(settings: TrainRoot) -> None:
    """Our own block knows what to make again; a compiler decides by itself."""
    for key, value, needed in (
        ("model.block", settings.model.block, "gpt"),
        ("train.compile", settings.train.compile, "none"),
    ):
        if value != needed:
            raise UserError(
                f"parallel.activation_checkpointing=selective does not go with {key}={value}\n"
                f"use parallel.activation_checkpointing=full, or {key}={needed}"
            )


def _check_pipeline(settings: TrainRoot) -> None:
    model, parallel = settings.model, settings.parallel
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
                f"use parallel.tensor={_nearest_divisor(count, size)}, or a {key} that is a multiple of {size}"
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
            f"use parallel.expert={_nearest_divisor(model.experts, parallel.expert)}"
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
    for key, value, needed in (
        ("parallel.sequence", parallel.sequence, "1"),
        ("model.dropout", settings.model.dropout, "0"),
    ):
        if str(value) not in (needed, f"{needed}.0"):
            raise UserError(
                f"parallel.shard_norms=true does not go with {key}={value}\n"
                f"use {key}={needed}, or parallel.shard_norms=false"
            )
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
    """What cannot be taken apart along an axis, either of them."""
    for key, value, needed in (
        ("model.block", settings.model.block, "gpt"),
        ("train.compile", settings.train.compile, "none"),
    ):
        if value != needed:
            size = getattr(settings.parallel, axis)
            raise UserError(
                f"{key}={value} cannot be cut for parallel.{axis}={size}\nuse {key}={needed}, or parallel.{axis}=1"
            )


def _nearest_divisor(number: int, wanted: int) -> int:
    divisors = [divisor for divisor in range(1, number + 1) if number % divisor == 0]
    return min(divisors, key=lambda divisor: (abs(divisor - wanted), divisor))


def _above_zero(key: str, value: float, example: str) -> None:
    if not value > 0:
        raise UserError(f"{key}={value} must be above 0\nset it, e.g. {key}={example}")


def _at_least(key: str, value: float, least: int) -> None:
    if value < least:
        raise UserError(f"{key}={value} is below {least}\nset {key}={least} or more")
