"""The training loop: one for every engine, layout and source of data."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

import numpy as np
import torch

from gptscale.checkpoint.agreement import all_or_none
from gptscale.config.compose import Composed
from gptscale.config.schema import TrainRoot
from gptscale.config.step_plan import StepPlan, run_steps, schedule_tokens, step_plan
from gptscale.data.stream import StepData, StepFeed
from gptscale.data.transfer import until_stopped
from gptscale.evaluate.heldout import evaluate_sets
from gptscale.evaluate.samples import greedy_samples
from gptscale.model.compiling import check_compiler
from gptscale.model.gpt import GPT
from gptscale.parallel.clock import Clock
from gptscale.parallel.engine import Engine, build_engine, check_optimizer
from gptscale.parallel.ranks import Ranks
from gptscale.parallel.spread import by_parts, spread
from gptscale.runtime.errors import StoppedError
from gptscale.runtime.seeds import derive_seed
from gptscale.runtime.signals import StopRequest
from gptscale.topology import BatchSplit
from gptscale.train.balance import with_layers
from gptscale.train.check import check_run
from gptscale.train.guard import Guard
from gptscale.train.kernels import as_json, check_kernel, choose_kernels, described, kept
from gptscale.train.memory_help import MemoryHelp
from gptscale.train.optimizer import build_optimizer
from gptscale.train.profile_page import DATA, TRAIN
from gptscale.train.profiler import StepProfiler, span
from gptscale.train.progress import Progress
from gptscale.train.run_folder import RunFolder
from gptscale.train.saving import resume, save
from gptscale.train.schedule import learning_rate
from gptscale.train.setup import Corpora, build_model, open_corpora, prepare_torch
from gptscale.train.taken_step import TakenStep
from gptscale.train.watcher import Watcher, device_name

LOG = logging.getLogger("gptscale.train")


@dataclass
class Session:
    """What a run works with, once everything is built."""

    composed: Composed[TrainRoot]
    ranks: Ranks
    split: BatchSplit
    folder: RunFolder
    corpora: Corpora
    engine: Engine
    progress: Progress
    watcher: Watcher
    guard: Guard
    clock: Clock
    """Laps from the end of a step, evaluation or save to the end of the next step."""
    profiler: StepProfiler
    plan: StepPlan
    total_steps: int
    schedule_tokens: int
    taken: TakenStep | None = None
    """A step that the device was given, its numbers not read yet."""
    save_s: float = 0.0
    """Time spent in saves since the last step."""

    @property
    def settings(self) -> TrainRoot:
        return self.composed.settings


def train(composed: Composed[TrainRoot], ranks: Ranks, stop: StopRequest) -> None:
    """Train to the end of the run, from wherever it stands.

    Raises StoppedError after a save where somebody asked to stop, DivergedError past the guard's limits, UserError
    where settings or data are wrong.
    """
    settings = composed.settings
    split = check_run(settings, ranks.size)
    prepare_torch(settings, ranks)
    folder = RunFolder(settings.run)
    all_or_none(ranks, lambda: folder.open() if ranks.rank == 0 else None, f"opening {folder.path}")
    memory = MemoryHelp(settings, folder.path, ranks)
    try:
        with memory.explained():
            train_in(folder, composed, split, ranks, stop, memory)
    finally:
        folder.close()


def train_in(
    folder: RunFolder,
    composed: Composed[TrainRoot],
    split: BatchSplit,
    ranks: Ranks,
    stop: StopRequest,
    memory: MemoryHelp,
) -> None:
    """The run, in a folder that is ours."""
    settings = composed.settings
    check = until_stopped(lambda: stop.requested)
    corpora = all_or_none(ranks, lambda: open_corpora(settings, ranks, check), "opening the data")
    model = build_model(
        settings, corpora.vocab_size, whole=not by_parts(ranks, settings.parallel, settings.model.block)
    )
    all_or_none(ranks, lambda: check_kernel(model, settings, ranks.device), "choosing attention kernels")
    if settings.train.compile == "block":
        all_or_none(ranks, lambda: check_compiler(ranks.device), "trying the compiler")
        LOG.info("blocks are compiled in the first step, which takes longer")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    cut = spread(model, ranks, with_layers(settings, corpora.vocab_size, folder.path, ranks), settings.run.seed)
    optimizer = build_optimizer(model, settings.optimizer)
    all_or_none(ranks, lambda: check_optimizer(optimizer, settings, ranks), "making the optimizer")
    engine = all_or_none(
        ranks, lambda: build_engine(model, cut, optimizer, settings, split, ranks), "building the engine"
    )
    progress = resume(composed, engine, folder, corpora, ranks)
    memory.engine = engine
    total_steps = run_steps(settings)
    if progress.step >= total_steps:
        LOG.info("%s is done: %d of %d steps; nothing to do", folder.path, progress.step, total_steps)
        return

    def open_folder() -> None:
        folder.open_logs(ranks.rank)
        if ranks.rank == 0:
            folder.write_identity(composed.to_yaml(), corpora.stream.tokenizer_path)

    all_or_none(ranks, open_folder, f"writing {folder.path}")
    progress = choose_attention(model, settings, folder, corpora, progress, ranks)
    session = Session(
        composed=composed,
        ranks=ranks,
        split=split,
        folder=folder,
        corpora=corpora,
        engine=engine,
        progress=progress,
        watcher=Watcher(composed, folder, corpora, progress, ranks, parameters),
        guard=Guard(settings.guard, progress.skipped_in_a_row),
        clock=Clock(ranks.device),
        profiler=StepProfiler(settings.profile, folder.path, ranks.rank, ranks.size, ranks.device),
        plan=step_plan(settings),
        total_steps=total_steps,
        schedule_tokens=schedule_tokens(settings),
    )
    try:
        run_to_end(session, stop)
    finally:
        session.profiler.close()
        session.watcher.close()


def choose_attention(
    model: GPT, settings: TrainRoot, folder: RunFolder, corpora: Corpora, progress: Progress, ranks: Ranks
) -> Progress:
    """Find and record the attention kernels of the run, for its longest sequences. A collective."""
    plan = step_plan(settings)
    longest = max([0, *(stage.samples for stage in plan.stages)], key=plan.row_length)
    count = min(settings.train.micro_batch, plan.batch(longest))
    rows = corpora.stream.read(longest + np.arange(count))
    (first,) = corpora.stream.batches.make(rows, plan.row_length(longest), [count])
    choice = choose_kernels(model, settings, first.starts_BT, progress.attention_kernels, ranks)

    def write() -> None:
        if ranks.rank == 0:
            LOG.info(described(choice))
            folder.write_kernels(as_json(choice, device_name(ranks.device)))

    all_or_none(ranks, write, f"writing {folder.path}")
    return replace(progress, attention_kernels=kept(choice, progress.attention_kernels))


def run_to_end(session: Session, stop: StopRequest) -> None:
    settings, total_steps = session.settings, session.total_steps
    start = session.progress.position.samples
    session.profiler.announce(session.progress.step, total_steps)
    feed = StepFeed(session.corpora.stream, session.plan, session.split, session.ranks.at.data, start)
    with feed, settled_whatever_comes(session):
        session.clock.restart()
        while session.progress.step < total_steps:
            with session.profiler.step(session.progress.step + 1, total_steps):
                stopping = one_step(session, feed, stop)
            step = session.progress.step
            last = step == total_steps
            if last or due(step, settings.evaluation.every_steps):
                evaluate(session)
            if last:  # before the save that makes the run a finished one, which a restart leaves as it is
                session.watcher.conclude()
            if last or stopping or due(step, settings.checkpoint.every_steps):
                save_run(session)
            if stopping and not last:
                raise StoppedError(f"stopped at step {step} of {total_steps} after a save: start it again to go on")
    session.watcher.finished(session.progress)


@contextmanager
def settled_whatever_comes(session: Session) -> Iterator[None]:
    """Whatever ends the block, the line of the last step is worth having."""
    try:
        yield
    except Exception:
        with suppress(Exception):
            settle(session)
        raise


def one_step(session: Session, feed: Iterator[StepData], stop: StopRequest) -> bool:
    """One optimizer step, and the line of metrics of the step before it, which the device has passed by now.

    True where a rank was asked to stop: all ranks learn it together.
    """
    settings, progress, ranks = session.settings, session.progress, session.ranks
    with span(DATA):
        data = next(feed)
    samples = session.plan.batch(progress.position.samples)
    tokens = samples * session.plan.row_length(progress.position.samples)
    after, peak = progress.tokens + tokens, settings.optimizer.learning_rate
    rate = learning_rate(after, settings.schedule, peak, session.schedule_tokens)
    # Dropout is a function of seed, step and place, so a resumed run needs no generator's state.
    place = ranks.at.pipeline * ranks.replicas.size + ranks.replicas.rank
    torch.manual_seed(derive_seed(settings.run.seed, "step", progress.step, place))
    measure_noise = due(progress.step + 1, settings.train.noise_scale_every_steps)
    with span(TRAIN):
        result = session.engine.train_step(data.microbatches, rate, measure_noise)
    sample_hash, stopping = ranks.sum([data.sample_hash if ranks.feeds else 0, int(stop.requested)])
    session.progress = progress.advanced(samples, tokens, sample_hash)
    taken = TakenStep(result, session.progress, rate, session.clock.lap(), data.wait_s, session.save_s)
    settle(session)
    session.taken, session.save_s = taken, 0.0
    return stopping > 0


def settle(session: Session) -> None:
    """Read the numbers of the step that was taken last, if that is still to be done: write its line, guard the run."""
    taken, session.taken = session.taken, None
    if taken is not None:
        numbers = taken.read()
        session.watcher.step(numbers)
        session.guard.watch(numbers.progress.step, numbers.grad_norm, numbers.loss_scale)


def save_run(session: Session) -> None:
    """Write a checkpoint. A collective."""
    settle(session)
    started_s = time.perf_counter()
    all_or_none(session.ranks, session.watcher.saving, "writing the metrics")
    progress = replace(session.progress, skipped_in_a_row=session.guard.skipped_in_a_row)
    save(session.composed, session.engine, session.folder, progress, session.corpora, session.ranks)
    session.save_s += time.perf_counter() - started_s
    session.clock.restart()


def evaluate(session: Session) -> None:
    """Loss on held-out text, and what the model makes of the prompts. A collective."""
    settle(session)
    started_s = time.perf_counter()
    settings, corpora = session.settings.evaluation, session.corpora
    result = evaluate_sets(session.engine, corpora.heldout, session.ranks)
    samples = greedy_samples(
        session.engine, corpora.tokenizer, settings.prompts, settings.sample_tokens, session.plan.sequence_length
    )
    session.watcher.evaluated(session.progress, result, samples, time.perf_counter() - started_s)
    session.clock.restart()


def due(step: int, every_steps: int) -> bool:
    return every_steps > 0 and step % every_steps == 0
