"""What must hold between settings, checked before anything starts and again in the workers. Pure, no torch.

Each rule refuses with one UserError that names the key and the fix. Those of a model and of layouts have files of their
own beside this one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from gptscale.config.limits import above_zero, at_least, nearest_divisor
from gptscale.config.model_rules import check_model
from gptscale.config.names import corpus_names
from gptscale.config.parallel_rules import check_layout, topology_of
from gptscale.config.schema import MIN_LOSS_SCALE, DataConfig, ProfileConfig, TrainRoot
from gptscale.config.stages import as_corpora, check_mixture, check_stages, stage_folders
from gptscale.config.step_plan import step_plan
from gptscale.runtime.errors import UserError
from gptscale.topology import BatchSplit, split_batch


def check(settings: TrainRoot, world_size: int) -> BatchSplit:
    """Check every rule for a run on `world_size` ranks; returns how its global batch is cut."""
    check_model(settings.model)
    _check_ranges(settings)
    _check_heldout_sets(settings)
    check_addresses(settings.data, (chosen.path for chosen in settings.evaluation.sets))
    if settings.data.path is not None:
        check_mixture("data.path", settings.data.path)
    _check_length(settings)
    _check_profile(settings.profile, world_size)
    check_layout(settings, world_size)
    try:
        topology = topology_of(settings.parallel, world_size)
        split = split_batch(settings.train.global_batch, settings.train.micro_batch, topology.data)
    except ValueError as error:
        raise UserError(str(error)) from error
    _check_ramps(settings, topology.data)
    check_stages(settings, split)
    _check_noise_scale(settings, split)
    return split


def check_local_launch(settings: TrainRoot) -> None:
    """For whoever is about to start the ranks on this host; other launchers bring their own hosts."""
    if settings.launch.nodes != 1:
        raise UserError(
            f"launch.nodes={settings.launch.nodes}, but launch=local starts ranks on this host only\n"
            "start one worker a rank with srun or torchrun (see launch/), or use launch.nodes=1"
        )


def _check_ranges(settings: TrainRoot) -> None:
    at_least("train.global_batch", settings.train.global_batch, 1)
    at_least("train.micro_batch", settings.train.micro_batch, 1)
    at_least("data.sequence_length", settings.data.sequence_length, 1)
    at_least("data.block_sequences", settings.data.block_sequences, 1)
    at_least("data.window_blocks", settings.data.window_blocks, 1)
    if settings.data.cache_bytes is not None:
        at_least("data.cache_bytes", settings.data.cache_bytes, 1)
    at_least("checkpoint.every_steps", settings.checkpoint.every_steps, 1)
    at_least("checkpoint.keep", settings.checkpoint.keep, 2)
    at_least("launch.ranks", settings.launch.ranks, 1)
    at_least("evaluation.every_steps", settings.evaluation.every_steps, 0)
    at_least("evaluation.sequences", settings.evaluation.sequences, 0)
    at_least("evaluation.sample_tokens", settings.evaluation.sample_tokens, 1)
    at_least("guard.max_skipped_steps", settings.guard.max_skipped_steps, 1)
    at_least("logging.print_every_steps", settings.logging.print_every_steps, 1)
    at_least("schedule.warmup_tokens", settings.schedule.warmup_tokens, 0)
    decay_tokens, warmup_tokens = settings.schedule.decay_tokens, settings.schedule.warmup_tokens
    if decay_tokens is not None and decay_tokens <= warmup_tokens:
        raise UserError(
            f"schedule.decay_tokens={decay_tokens} lies within the warm-up of {warmup_tokens} tokens\n"
            "set schedule.decay_tokens above that, or a smaller schedule.warmup_tokens"
        )
    for name in ("final_ratio", "cooldown_ratio"):
        ratio = getattr(settings.schedule, name)
        if not 0 <= ratio <= 1:
            raise UserError(f"schedule.{name}={ratio} is not a share\nuse a value from 0 to 1, e.g. 0.1")
    at_least("optimizer.clip_norm", settings.optimizer.clip_norm, 0)
    at_least("optimizer.weight_decay", settings.optimizer.weight_decay, 0)
    at_least("optimizer.epsilon", settings.optimizer.epsilon, 0)
    above_zero("optimizer.learning_rate", settings.optimizer.learning_rate, "6e-4")
    if not settings.precision.loss_scale >= MIN_LOSS_SCALE:
        raise UserError(
            f"precision.loss_scale={settings.precision.loss_scale} is below {MIN_LOSS_SCALE}\n"
            "set precision.loss_scale=65536, from where it finds its value"
        )
    at_least("precision.loss_scale_window", settings.precision.loss_scale_window, 1)
    at_least("precision.loss_scale_hysteresis", settings.precision.loss_scale_hysteresis, 1)
    above_zero("parallel.timeout_s", settings.parallel.timeout_s, "600")
    above_zero("launch.stop_timeout_s", settings.launch.stop_timeout_s, "60")
    if settings.launch.threads is not None:
        at_least("launch.threads", settings.launch.threads, 1)
    at_least("optimizer.newton_schulz_steps", settings.optimizer.newton_schulz_steps, 1)
    above_zero("optimizer.update_rms", settings.optimizer.update_rms, "0.2")
    for name in ("beta1", "beta2", "momentum"):
        beta = getattr(settings.optimizer, name)
        if not 0 <= beta < 1:
            raise UserError(f"optimizer.{name}={beta} is not a share below 1\nuse a value from 0 up to 1, e.g. 0.95")


def _check_heldout_sets(settings: TrainRoot) -> None:
    names = list(corpus_names(settings.data))
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
            at_least(f"evaluation.sets: sequences of {chosen.name}", chosen.sequences, 0)


def check_addresses(data: DataConfig, sets: Iterable[str] = ()) -> None:
    """Settings are kept and shown: no place for a password. `sets` are the paths of held-out sets."""
    addresses = [("data.path", corpus.path) for corpus in (() if data.path is None else as_corpora(data.path))]
    addresses += [("data.stages", folder) for folder in stage_folders(data)]
    addresses += [("data.sources", source.path) for source in data.sources]
    addresses += [("evaluation.sets", path) for path in sets]
    for key, address in addresses:
        if found := re.match(r"([a-z][a-z0-9+.-]*://)[^/@\s]*:(?!\d+/)[^@\s]*@", address):
            raise UserError(
                f"{key}={found[1]}… holds a password, and a run keeps its settings\n"
                "leave it out: credentials are found in the environment, or where the store's own tools keep them"
            )


def _check_length(settings: TrainRoot) -> None:
    steps, tokens = settings.train.steps, settings.train.tokens
    if (steps is None) == (tokens is None):
        state = "both set" if steps is not None else "neither set"
        raise UserError(f"the run's length is train.steps or train.tokens: {state}\nset one and leave the other null")
    at_least("train.steps" if steps is not None else "train.tokens", steps if steps is not None else tokens or 0, 1)
    if settings.schedule.total_steps is not None:
        at_least("schedule.total_steps", settings.schedule.total_steps, 1)
        if settings.schedule.decay_tokens is not None:
            raise UserError(
                "schedule.total_steps and schedule.decay_tokens both say where the schedule ends\n"
                "set one of them to null"
            )
    if settings.schedule.decay_tokens is not None:
        at_least("schedule.decay_tokens", settings.schedule.decay_tokens, 1)


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
            at_least(f"train.{start}", getattr(train, start), 1)
        if getattr(train, over) is not None:
            at_least(f"train.{over}", getattr(train, over), 1)
        if (getattr(train, start) is None) != (getattr(train, over) is None):
            missing, there = (over, start) if getattr(train, over) is None else (start, over)
            value = example if missing == over else "16"
            raise UserError(f"train.{there} is set, train.{missing} is not\nset it too, e.g. train.{missing}={value}")
    if train.ramp_from is not None:
        if train.global_batch % train.ramp_from:
            raise UserError(
                f"train.ramp_from={train.ramp_from} does not divide train.global_batch={train.global_batch}\n"
                f"use train.ramp_from={nearest_divisor(train.global_batch, train.ramp_from)}"
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
    at_least("train.noise_scale_every_steps", train.noise_scale_every_steps, 0)
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
