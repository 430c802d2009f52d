"""What the contenders compute: the same weights and the same batches, each in its own way.

Shape legend: B sequences of a micro-batch, T tokens of a sequence.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gptscale.bench.contender import MATMUL_SIZE, Contender
from gptscale.bench.ours import Step, build_ours
from gptscale.bench.products import ProductRecorder, replay
from gptscale.bench.several_ranks import ddp_step, engine_step, fsdp2_step
from gptscale.bench.traffic import TrafficCounter
from gptscale.checkpoint.trained import COMPUTE_TYPES
from gptscale.config.parallel_rules import topology_of
from gptscale.config.schema import TrainRoot
from gptscale.data.rows import document_starts
from gptscale.flow import Batch
from gptscale.parallel.plain import on_device
from gptscale.plan.collectives import Payload
from gptscale.runtime.process import ProcessInfo, find_process
from gptscale.runtime.seeds import derive_seed
from gptscale.train.optimizer import build_optimizer, parameter_groups
from gptscale.train.setup import build_model

POOL = 4
"""Different global batches, which steps go round."""
DOCUMENTS = 4
"""In a row, on average, where there are document masks."""


@dataclass
class Workload:
    built: str
    device: torch.device
    step: Step
    batches: Sequence[Sequence[Batch]]
    seed: int
    flops: int = 0
    """Of a step, where it is not that of the model."""
    steps_taken: int = 0

    def timed_step(self) -> tuple[float, float, float]:
        """Loss, elapsed seconds and CPU-seconds of one step."""
        torch.manual_seed(derive_seed(self.seed, "step", self.steps_taken))  # dropout draws alike in all contenders
        microbatches = self.batches[self.steps_taken % len(self.batches)]
        self.steps_taken += 1
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        loss = self.step(microbatches)
        return loss, time.perf_counter() - wall_s, time.process_time() - cpu_s

    def counted_step(self) -> tuple[float, Payload]:
        """Loss of one step, and what it handed to other ranks."""
        with TrafficCounter() as counter:
            loss, *_ = self.timed_step()
        return loss, counter.counted()

    def watched_step(self, micro_batches: int) -> tuple[tuple[float, float], ...]:
        """When this stage of a pipeline computed in a step of the first `micro_batches` of a batch."""
        from gptscale.parallel.occupancy import watched_schedule

        with watched_schedule() as passes_s:
            self.step(self.batches[0][:micro_batches])
        return tuple(passes_s)

    def peak_bytes(self) -> int:
        """Most memory of the device; 0 on a CPU, whose allocator keeps no count."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0


def build_workload(contender: Contender) -> Workload:
    """Build what this process computes. Collective where the contender has several ranks."""
    torch.set_num_threads(contender.threads)
    settings = contender.settings
    process = find_process(os.environ)
    device = torch.device("cuda", process.local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if contender.kind == "matmul":
        return Workload("torch.mm", device, matmul_step(settings, device), [[]], settings.run.seed)
    if contender.kind == "products":
        recorded = step_products(contender, process, device)
        built = f"{len(recorded.calls):,} products of {recorded.flops / 1e9:,.1f} GFLOP, none of a fused attention's"
        return Workload(built, device, replay(recorded.calls, device), [[]], settings.run.seed, recorded.flops)
    builders = {
        "bare": bare_step,
        "ddp": ddp_step,
        "fsdp2": fsdp2_step,
        "engine": engine_step,
        "peer": peer_step,
    }
    built, step = builders[contender.kind](contender, process, device)
    # DeepSpeed changes torch for the process that imports it; what it is compared with must be torch's own.
    with_deepspeed = contender.kind == "engine" and settings.parallel.engine == "deepspeed"
    if with_deepspeed != ("deepspeed" in sys.modules):
        raise RuntimeError(f"{contender.name} must {'have' if with_deepspeed else 'not have'} imported deepspeed")
    return Workload(built, device, step, random_batches(contender, process.rank, device), settings.run.seed)


def bare_step(contender: Contender, process: ProcessInfo, device: torch.device) -> tuple[str, Step]:
    """The loop that anybody would write: what a step costs at least."""
    settings = contender.settings
    model = build_ours(contender).to(device)
    optimizer = build_optimizer(model, settings.optimizer)
    parameters = list(model.parameters())
    clip_norm = settings.optimizer.clip_norm or float("inf")

    def step(microbatches: Sequence[Batch]) -> float:
        optimizer.zero_grad()
        tokens = sum(batch.loss_tokens for batch in microbatches)
        total = torch.zeros((), device=device)
        for batch in microbatches:
            loss = model(*on_device(batch, device)) / tokens
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(parameters, clip_norm)
        optimizer.step()
        return float(total)

    return f"loop, {type(optimizer).__name__}", step


def peer_step(contender: Contender, process: ProcessInfo, device: torch.device) -> tuple[str, Step]:
    """Somebody else's model, as its own training script takes a step: autocast, mean losses, clipping, AdamW."""
    from gptscale.bench.peers import build_peer, canonical, prove_equal

    settings = contender.settings
    name, compiled = contender.name.removesuffix("-compile"), contender.name.endswith("-compile")
    name = name.removesuffix("-eager").removesuffix("-fused")
    attention = "eager" if contender.name.endswith("-eager") else "sdpa"
    prove_equal(name, settings.model, settings.tokenizer.vocab_size, attention)
    model, mean_loss = build_peer(name, build_model(settings, settings.tokenizer.vocab_size), attention)
    model.to(device).train()
    if compiled:
        model.compile()
    config = settings.optimizer
    # Hugging Face's Trainer takes the fused kernel (`adamw_torch_fused`); nanoGPT does on CUDA only.
    optimizer = torch.optim.AdamW(
        parameter_groups(((canonical(name), p) for name, p in model.named_parameters()), config.weight_decay),
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=True if contender.name != "nanogpt" or device.type == "cuda" else None,
    )
    parameters = list(model.parameters())
    clip_norm = config.clip_norm or float("inf")
    compute = COMPUTE_TYPES[settings.precision.compute]

    def step(microbatches: Sequence[Batch]) -> float:
        optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=device)
        for batch in microbatches:
            with torch.autocast(device.type, compute, enabled=compute != torch.float32):
                inputs_BT, targets_BT = (ids.contiguous() for ids in on_device(batch, device)[:2])  # some take views
                loss: torch.Tensor = mean_loss(inputs_BT, targets_BT) / len(microbatches)
            torch.autograd.backward(loss)
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(parameters, clip_norm)
        optimizer.step()
        return float(total)

    fused = "fused " if optimizer.defaults["fused"] else ""
    built = f"{type(model).__name__}{'' if name == 'nanogpt' else f', {attention}'}{', compiled' * compiled}"
    return f"{built}, {fused}AdamW", step


def step_products(contender: Contender, process: ProcessInfo, device: torch.device) -> ProductRecorder:
    """What the bare loop multiplies in a step."""
    _, step = bare_step(contender, process, device)
    recorder = ProductRecorder()
    with recorder:
        step(random_batches(contender, process.rank, device)[0])
    return recorder


def matmul_step(settings: TrainRoot, device: torch.device) -> Step:
    """One product of square matrices in the type that the model multiplies in."""
    size, compute = MATMUL_SIZE[device.type], COMPUTE_TYPES[settings.precision.compute]
    a, b = torch.randn(2, size, size, device=device).to(compute)
    out = torch.empty_like(a)

    def step(_: Sequence[Batch]) -> float:
        torch.mm(a, b, out=out)
        return float(out[0, 0])  # waits for the device

    return step


def random_batches(contender: Contender, rank: int, device: torch.device) -> list[list[Batch]]:
    """`POOL` global batches of random ids, this rank's micro-batches of each, on its device.

    With document masks a row is of some `DOCUMENTS` documents, which end at random.
    """
    settings, split = contender.settings, contender.split
    data_rank = topology_of(settings.parallel, contender.ranks).coordinates(rank).data
    length = settings.data.sequence_length
    pool = []
    for index in range(POOL):
        generator = torch.Generator().manual_seed(derive_seed(settings.run.seed, "bench", index))
        shape = (split.global_batch, length + 1)
        rows = torch.randint(0, settings.tokenizer.vocab_size, shape, generator=generator)
        starts = None
        if settings.data.document_mask:
            ends = torch.rand((split.global_batch, length), generator=generator) < DOCUMENTS / length
            starts = torch.from_numpy(document_starts(ends.numpy(), end_of_text=True))
        mine = list(split.rows(data_rank))
        microbatches = []
        for part in (mine[first : first + split.micro_batch] for first in range(0, len(mine), split.micro_batch)):
            starts_BT = None if starts is None else starts[part]
            microbatches.append(Batch(rows[part].to(device), len(part) * length, starts_BT))
        pool.append(microbatches)
    return pool
