"""Which settings to change when memory runs out, in the order that suits the run. Pure, no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from gptscale.config.rules import check
from gptscale.config.schema import TrainRoot
from gptscale.runtime.errors import UserError

Moment = Literal["step", "evaluation", "start", "save"]

SMALLEST_CHUNK = 128
"""Tokens of a loss chunk below which its matrix products become slow."""


@dataclass(frozen=True)
class Shortage:
    """What is known of a rank whose memory ran out."""

    moment: Moment
    ranks: int
    state_bytes: int
    """Weights, gradients and optimizer state that the rank holds."""
    rest_bytes: int
    """All else: activations, communication buffers, libraries."""
    asked_bytes: int | None = None
    """What could not be allocated, where it is known."""
    unused_bytes: int = 0
    """Reserved by the GPU's allocator, in pieces too small for what was asked."""
    on_gpu: bool = False
    """Then the host has memory of its own."""


@dataclass(frozen=True)
class Fix:
    setting: str
    """As one types it."""
    effect: str


def advice(settings: TrainRoot, shortage: Shortage) -> list[Fix]:
    """What to try, the most promising first; never empty.

    Activations shrink with the micro-batch, at no cost but speed, with recomputation and with smaller pieces of logits;
    state shrinks by being shared. Which of both comes first is decided by which is larger. An evaluation keeps nothing
    for a backward pass, and at the start there are no activations at all.
    """
    activations = [
        _micro_batch(settings, shortage),
        _checkpointing(settings, shortage),
        _loss_chunk(settings, shortage),
        _sequence(settings, shortage),
    ]
    state = [_zero_stage(settings, shortage), _ranks(settings, shortage), _offload(settings, shortage)]
    if shortage.moment in ("start", "save"):
        wanted = state
    elif shortage.rest_bytes >= shortage.state_bytes:
        wanted = activations + state
    else:
        wanted = state + activations
    found = [fix for fix in (_fragments(shortage), *wanted) if fix is not None]
    if settings.precision.compute == "fp32" and shortage.moment in ("step", "evaluation"):
        found.append(Fix("precision=bf16", "halves activations (for a new run: it changes the results)"))
    if len(found) < 2:
        found.append(Fix("a smaller model.width or model.layers", "a new run"))
    return found


def _micro_batch(settings: TrainRoot, shortage: Shortage) -> Fix | None:
    """The largest micro-batch up to half of today's that divides what a rank has of the batch."""
    now, share = settings.train.micro_batch, settings.train.global_batch // _data_ranks(settings, shortage)
    smaller = [size for size in range(1, now // 2 + 1) if share % size == 0]
    if not smaller:
        return None
    return Fix(f"train.micro_batch={smaller[-1]}", f"activations shrink to {smaller[-1] / now:.0%}; same results")


def _checkpointing(settings: TrainRoot, shortage: Shortage) -> Fix | None:
    if shortage.moment != "step" or settings.model.layers < 2:
        return None
    if settings.parallel.activation_checkpointing == "full":
        if settings.parallel.checkpoint_interval == 1:
            return None
        return Fix("parallel.checkpoint_interval=1", "computes every layer again; same results")
    return Fix(
        "parallel.activation_checkpointing=full",
        f"keeps the input of each of the {settings.model.layers} layers and computes the rest again; same results "
        "(selective keeps more and computes less again)",
    )


def _loss_chunk(settings: TrainRoot, shortage: Shortage) -> Fix | None:
    """Two pieces of logits exist at a time (`gptscale.model.loss`), in fp32. Worth it from a twentieth of the rest."""
    tokens = min(settings.model.loss_chunk, settings.train.micro_batch * settings.data.sequence_length)
    smaller = max(SMALLEST_CHUNK, tokens // 4)
    freed = 2 * (tokens - smaller) * settings.tokenizer.vocab_size * 4
    if smaller >= tokens or freed < 0.05 * shortage.rest_bytes:
        return None
    return Fix(f"model.loss_chunk={smaller}", f"frees {readable(freed)} of logits")


def _sequence(settings: TrainRoot, shortage: Shortage) -> Fix | None:
    """Twice as many ranks a row, where a micro-batch is one row and layers keep as little as they can."""
    parallel, ranks = settings.parallel, 2 * shortage.ranks
    smallest = settings.train.micro_batch == 1 and parallel.activation_checkpointing == "full"
    if shortage.moment != "step" or not smallest or parallel.checkpoint_interval > 1:
        return None
    more = replace(settings, parallel=replace(parallel, sequence=2 * parallel.sequence))
    try:
        check(more, ranks)
    except UserError:
        return None
    return Fix(f"parallel.sequence={2 * parallel.sequence} launch.ranks={ranks}", "each holds half as long rows")


def _zero_stage(settings: TrainRoot, shortage: Shortage) -> Fix | None:
    """The next stage that shares more. Bytes a parameter: 4 weight, 4 gradient, 8 optimizer (Adam's moments)."""
    stage, ranks = settings.parallel.zero_stage, _data_ranks(settings, shortage) * settings.parallel.sequence
    if settings.parallel.engine == "plain" or ranks == 1 or stage >= 3 or settings.parallel.pipeline > 1:
        return None
    if stage == 2 and settings.parallel.expert > 1:
        return None
    shared = {1: "optimizer state", 2: "gradients", 3: "weights"}[stage + 1]
    return Fix(f"parallel.zero_stage={stage + 1}", f"shares the {shared} between {ranks} ranks too")


def _ranks(settings: TrainRoot, shortage: Shortage) -> Fix | None:
    """Twice as many, where the batch can be cut so."""
    ranks = 2 * shortage.ranks
    if settings.train.global_batch % ranks:
        return None
    plain = settings.parallel.engine == "plain"
    share = settings.train.global_batch // (2 * _data_ranks(settings, shortage))
    more = "parallel=zero3 " if plain or settings.parallel.zero_stage == 0 else ""
    cut = f" train.micro_batch={share}" if settings.train.micro_batch > share else ""
    return Fix(f"{more}launch.ranks={ranks}{cut}", "each holds a smaller part of what is shared")


def _offload(settings: TrainRoot, shortage: Shortage) -> Fix | None:
    if not shortage.on_gpu or settings.parallel.offload != "none":
        return None
    there = replace(settings, parallel=replace(settings.parallel, offload="cpu"))
    try:
        check(there, shortage.ranks)
    except UserError:
        return None
    return Fix("parallel.offload=cpu", "keeps fp32 weights and optimizer state in the host's memory; slower")


def _fragments(shortage: Shortage) -> Fix | None:
    if shortage.asked_bytes is None or shortage.unused_bytes < shortage.asked_bytes:
        return None
    return Fix(
        "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True (environment)",
        f"{readable(shortage.unused_bytes)} are reserved and unused, in pieces too small",
    )


def _data_ranks(settings: TrainRoot, shortage: Shortage) -> int:
    parallel = settings.parallel
    return shortage.ranks // (parallel.pipeline * parallel.sequence * parallel.tensor)


def readable(count: float) -> str:
    """Bytes for people: 1.25 GiB."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.2f} {unit}"
        count /= 1024
    return f"{count:,.2f} TiB"
