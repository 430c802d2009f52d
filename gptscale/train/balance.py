"""How many layers each stage of a pipeline has, where measured time is to decide: embedding and head count as well.

Measured once: the run's folder keeps it, since a run that is cut elsewhere sums gradients in another order.
"""

from __future__ import annotations

import json
import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gptscale.checkpoint.agreement import all_or_none, tell_number
from gptscale.checkpoint.trained import COMPUTE_TYPES
from gptscale.config.schema import ParallelConfig, TrainRoot
from gptscale.config.stages import longest_sequence
from gptscale.model.gpt import GPT
from gptscale.model.kernel_timing import wait_for
from gptscale.parallel.ranks import Ranks
from gptscale.parallel.slices import take_slices
from gptscale.parallel.tensor import join_slices
from gptscale.plan.stages import balanced
from gptscale.runtime.files import write_bytes_atomically

LOG = logging.getLogger("gptscale.train")

ROUNDS = 5
RECORD = "pipeline.json"


def with_layers(settings: TrainRoot, vocab_size: int, folder: Path, ranks: Ranks) -> ParallelConfig:
    """The settings' parallelism, with `pipeline_layers` measured where they ask for it. A collective."""
    parallel = settings.parallel
    if parallel.pipeline == 1 or parallel.pipeline_balance != "time" or parallel.pipeline_layers is not None:
        return parallel
    kept = all_or_none(ranks, lambda: _kept(folder, settings) if ranks.rank == 0 else (), "reading the stages")
    if not ranks.agree(ranks.rank != 0 or bool(kept)):
        seconds = all_or_none(ranks, lambda: seconds_of_parts(settings, vocab_size, ranks), "timing the layers")
        kept = tuple(balanced(seconds, parallel.pipeline))
        if ranks.rank == 0:
            _write(folder, kept, seconds)
    layers = tuple(tell_number(ranks, kept[stage] if ranks.rank == 0 else 0) for stage in range(parallel.pipeline))
    if ranks.rank == 0:
        LOG.info("stages of %s layers by measured time", ", ".join(map(str, layers)))
    return replace(parallel, pipeline_layers=layers)


def seconds_of_parts(settings: TrainRoot, vocab_size: int, ranks: Ranks) -> list[float]:
    """What forward and backward of a micro-batch take in each part of `GPT.sequence()` on this rank, in seconds.

    One layer of each kind is made and measured, and forgotten again. Tensor peers have to measure together.
    """
    config, tokens = settings.model, longest_sequence(settings.data)
    pattern = len(config.attention_pattern)
    kinds = replace(config, layers=min(config.layers, pattern), dropout=0.0)
    with torch.device("meta"):
        probe = GPT(kinds, vocab_size, tokens, COMPUTE_TYPES[settings.precision.compute])
    take_slices(probe, ranks.tensor, ranks.expert, settings.run.seed)
    join_slices(probe, ranks.tensor)  # without `shard_norms`, whose parts do not stand alone
    probe.to(ranks.device)
    probe.activation_checkpointing = settings.parallel.activation_checkpointing
    sequences = max(1, settings.train.micro_batch * settings.data.sequence_length // tokens)
    ids_BT = torch.randint(0, vocab_size, (sequences, tokens), device=ranks.device)
    x_BTD = torch.zeros(sequences, tokens, config.width, dtype=probe.compute_dtype, device=ranks.device)
    x_BTD.normal_().requires_grad_()

    def embed() -> None:
        torch.autograd.backward(probe.embedding(ids_BT), x_BTD.detach())

    def layer(number: int) -> None:
        torch.autograd.backward(probe.through(range(number, number + 1), x_BTD), x_BTD.detach())

    def head() -> None:
        torch.autograd.backward(probe.head(x_BTD, ids_BT))

    embedding_s, head_s = (_median(work, ranks.device) for work in (embed, head))
    layers_s = [_median(lambda number=number: layer(number), ranks.device) for number in range(kinds.layers)]  # type: ignore[misc]
    return [embedding_s, *(layers_s[number % pattern] for number in range(config.layers)), head_s]


def _median(work: Callable[[], None], device: torch.device) -> float:
    seconds = []
    for _ in range(ROUNDS + 1):
        wait_for(device)
        began_s = time.perf_counter()
        work()
        wait_for(device)
        seconds.append(time.perf_counter() - began_s)
    return statistics.median(seconds[1:])


def _kept(folder: Path, settings: TrainRoot) -> tuple[int, ...]:
    """What the run was cut into before, () where it was not, or into other stages."""
    path = folder / RECORD
    recorded: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    layers = tuple(recorded.get("layers", ()))
    return layers if len(layers) == settings.parallel.pipeline else ()


def _write(folder: Path, layers: tuple[int, ...], seconds: list[float]) -> None:
    embedding, *blocks, head = seconds
    content = {"layers": layers, "seconds": {"embedding": embedding, "layers": blocks, "head": head}}
    write_bytes_atomically(folder / RECORD, json.dumps(content, indent=1).encode() + b"\n")
