"""How contenders of several ranks take a step: torch's DDP and FSDP2, and our engines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from gptscale.bench.contender import Contender
from gptscale.bench.ours import Step, build_ours
from gptscale.config.parallel_rules import topology_of
from gptscale.flow import Batch
from gptscale.parallel.engine import build_engine
from gptscale.parallel.plain import on_device
from gptscale.parallel.ranks import Ranks
from gptscale.parallel.spread import spread
from gptscale.runtime.process import ProcessInfo
from gptscale.train.optimizer import build_optimizer


def ddp_step(contender: Contender, process: ProcessInfo, device: torch.device) -> tuple[str, Step]:
    """The bare loop over several ranks, with what torch's guide to DDP advises: no needless reduction, no copy."""
    model = build_ours(contender).to(device)
    optimizer = build_optimizer(model, contender.settings.optimizer)
    _meet(device)
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=True)
    step = _averaging_step(parallel, optimizer, contender, process, device, parallel.no_sync)
    return f"{type(parallel).__name__}, {type(optimizer).__name__}", step


def fsdp2_step(contender: Contender, process: ProcessInfo, device: torch.device) -> tuple[str, Step]:
    """The same with weights, gradients and optimizer state in parts: `fully_shard` of each block and of the rest.

    As its defaults are: weights are gathered for forward and again for backward, gradients reduced in each micro-batch.
    """
    model = build_ours(contender).to(device)
    _meet(device)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    optimizer = build_optimizer(model, contender.settings.optimizer)
    step = _averaging_step(model, optimizer, contender, process, device, nullcontext)
    return f"fully_shard, {type(optimizer).__name__}", step


def _meet(device: torch.device) -> None:
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def _averaging_step(
    parallel: nn.Module,
    optimizer: torch.optim.Optimizer,
    contender: Contender,
    process: ProcessInfo,
    device: torch.device,
    accumulating: Callable[[], AbstractContextManager[None]],
) -> Step:
    """A loop around a module that replaces gradients by their mean over ranks; `accumulating` is for all micro-batches
    but the last."""
    parameters = list(parallel.parameters())
    clip_norm = contender.settings.optimizer.clip_norm or float("inf")

    def step(microbatches: Sequence[Batch]) -> float:
        optimizer.zero_grad()
        tokens = sum(batch.loss_tokens for batch in microbatches) * process.world_size
        total = torch.zeros((), device=device)
        for batch in microbatches:
            with nullcontext() if batch is microbatches[-1] else accumulating():
                loss = parallel(*on_device(batch, device)) / tokens
                (loss * process.world_size).backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(parameters, clip_norm)
        optimizer.step()
        dist.all_reduce(total)
        return float(total)

    return step


def engine_step(contender: Contender, process: ProcessInfo, device: torch.device) -> tuple[str, Step]:
    """An engine as training builds it."""
    settings = contender.settings
    parallel = settings.parallel
    topology = topology_of(parallel, process.world_size)
    ranks = Ranks(process, parallel.engine == "deepspeed", parallel.timeout_s, topology)
    assert ranks.device == device
    model = build_ours(contender, whole=ranks.model.size == 1)
    cut = spread(model, ranks, parallel, settings.run.seed)
    optimizer = build_optimizer(model, settings.optimizer)
    engine = build_engine(model, cut, optimizer, settings, contender.split, ranks)
    rate = settings.optimizer.learning_rate

    def step(microbatches: Sequence[Batch]) -> float:
        result = engine.train_step(microbatches, rate)
        return float(result.loss)

    stage = f", stage {parallel.zero_stage}" if parallel.engine == "deepspeed" else ""
    return type(engine).__name__ + stage, step
