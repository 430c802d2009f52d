"""Pipeline parallelism by DeepSpeed's engine, over stages that are cut from `GPT.sequence()`.

A stage is a GPT of which all but some consecutive parts are taken away: names, initial weights and code stay. To
DeepSpeed it is one layer. DeepSpeed sends activations and gradients between stages and runs its schedule, one forward
and one backward in turn (Narayanan et al., arXiv 2104.04473, section 2.2), over the micro-batches of a step.

Every stage reads the rows of its data coordinate: the first needs ids, the last targets, and all of them where
documents begin. Tied weights lie on the first and on the last stage, which sum their gradients.

Shape legend: B sequences of a micro-batch, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.pipe.engine import TRAIN_BATCH_TIMER
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn

from gptscale.config.schema import TrainRoot
from gptscale.flow import Batch, Duration, StepResult
from gptscale.model.documents import Documents
from gptscale.model.gpt import GPT
from gptscale.parallel.clock import Clock
from gptscale.parallel.deepspeed_config import pipeline_config
from gptscale.parallel.flat_optimizers import flat_optimizers
from gptscale.parallel.held import holdings
from gptscale.parallel.on_deepspeed import OnDeepSpeed, let_speak
from gptscale.parallel.plain import on_device
from gptscale.parallel.ranks import Ranks
from gptscale.plan.stages import Cut
from gptscale.topology import BatchSplit


@dataclass(frozen=True)
class Job:
    """What a stage has to know of a micro-batch, beside what the stage before sends it."""

    documents: Documents | None
    weight: float = 1.0
    """What its loss is multiplied by."""
    gain: float | None = None
    """See `chunked_cross_entropy`."""
    last_B: Tensor | None = None
    """Where logits are wanted, in place of a loss: of which token of each row."""


class Stage(nn.Module):
    """A rank's part of the model, called with each micro-batch in turn."""

    def __init__(self, model: GPT, cut: Cut) -> None:
        super().__init__()
        self.model = model
        self._cut = cut
        self._jobs: Iterator[Job] = iter(())
        self._job = Job(None)

    def begin(self, jobs: Sequence[Job]) -> None:
        """Set out what the next calls of `forward` are for."""
        self._jobs = iter(jobs)

    def forward(self, x: Tensor) -> Tensor:
        """Ids [B, T] on the first stage, activations [B, T, D] on others → activations, or logits [B, V]."""
        self._job = job = next(self._jobs)
        if self._cut.first:
            x = self.model.embedding(x, None if job.documents is None else job.documents.positions)
        x_BTD = self.model.through(self._cut.blocks, x, job.documents)
        if not self._cut.last or job.last_B is None:
            return x_BTD
        last_BD = x_BTD[torch.arange(len(x_BTD), device=x_BTD.device), job.last_B]
        logits_BV: Tensor = self.model.head(last_BD)
        return logits_BV

    def loss(self, x_BTD: Tensor, targets_BT: Tensor) -> Tensor:
        """Of the micro-batch that the last stage was called with."""
        loss: Tensor = self.model.head(x_BTD, targets_BT, self._job.gain)
        return loss * self._job.weight


class Pipeline(PipelineModule):  # type: ignore[misc]  # DeepSpeed has no types
    """The stages as DeepSpeed sees them: its own, and placeholders for the others'."""

    def __init__(self, stage: Stage, ranks: Ranks) -> None:
        topology = ranks.topology
        grid = PipeModelDataParallelTopology(topology.pipeline, topology.tensor, topology.data)
        here = ranks.at.pipeline
        layers = [stage if number == here else nn.Identity() for number in range(topology.pipeline)]
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its layers
            super().__init__(layers, topology=grid, loss_fn=stage.loss, partition_method="uniform")
        self._tied: Tensor | None = stage.model.head.weight if stage.model.config.tied_embeddings else None
        self._ends = ranks.ends
        self._first = topology.rank(replace(ranks.at, pipeline=0))
        self._copies_drift = ranks.replicas.size > 2
        self.clock = Clock(ranks.device)
        self.forward_backward: Duration | None = None

    def get_tied_weights_and_groups(self) -> list[tuple[Tensor, Any]]:
        """Asked by DeepSpeed when all of a step's backward passes are done: whose gradients are to be summed."""
        self.forward_backward = self.clock.lap()
        if self._tied is None or self._ends.size == 1:
            return []
        return [(self._tied, self._ends.process_group)]

    @torch.no_grad()
    def align_copies(self) -> None:
        """Give the last stage the first one's copy of a tied weight, after a step.

        Both sum the same gradients over their replicas, but each in the order of its own partitions: of three numbers
        and more, another order may be another sum. Checkpoints hold one copy, so that a run that drifted would not be
        the one that is resumed.
        """
        if self._tied is not None and self._ends.size > 1 and self._copies_drift:
            dist.broadcast(self._tied, self._first, group=self._ends.handle)


class PipelineEngine(OnDeepSpeed):
    """`gptscale.parallel.engine.Engine` over the stages of a pipeline, with ZeRO-1 within each of them."""

    def __init__(
        self,
        model: GPT,
        cut: Cut,
        optimizer: torch.optim.Optimizer,
        settings: TrainRoot,
        split: BatchSplit,
        ranks: Ranks,
    ) -> None:
        held = holdings(model, ranks)
        self._part = Stage(model, cut)
        self._pipeline = Pipeline(self._part, ranks)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        let_speak(settings.parallel.deepspeed)
        with flat_optimizers():
            engine, *_ = deepspeed.initialize(
                model=self._pipeline,
                optimizer=optimizer,
                config=pipeline_config(
                    split, ranks.replicas.size, settings.optimizer.clip_norm, parameters, settings.parallel.deepspeed
                ),
                dist_init_required=False,
            )
        super().__init__(engine, model, 1, settings, ranks, held)
        self._shapes: list[torch.Size] = []
        self._prints = settings.parallel.deepspeed.steps_per_print is not None

    def train_step(
        self, microbatches: Sequence[Batch], learning_rate: float, measure_noise: bool = False
    ) -> StepResult:
        assert not measure_noise, "a stage sees a part of a micro-batch's gradient"
        ranks, engine = self._ranks, self._engine
        (loss_tokens,) = ranks.sum_fed([sum(batch.loss_tokens for batch in microbatches)])
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        loss_scale = 1.0 if self._scaler is None else self._scaler.scale()
        # DeepSpeed averages over replicas and micro-batches; shares of a global mean have to be summed. As to fp16, see
        # `gptscale.parallel.zero`.
        replicas = ranks.replicas.size if self._scaler is None else 1
        weight = replicas * len(microbatches) / loss_tokens
        gain = None if self._scaler is None else loss_scale / loss_tokens
        engine.micro_batches = len(microbatches)  # which a ramp of the batch changes
        engine._config.gradient_accumulation_steps = len(microbatches)
        self._pipeline.clock.restart()
        loss = engine.train_batch(self._feed(microbatches, weight, gain))
        self._pipeline.align_copies()
        if not self._prints:
            engine.timers(TRAIN_BATCH_TIMER).reset()  # which DeepSpeed does as it prints, and until then keeps all
        norm = torch.as_tensor(engine.get_global_grad_norm(), dtype=torch.float32, device=ranks.device)
        if self._scaler is not None:
            self._scaler.stepped(norm)
        return StepResult(
            loss=loss * (ranks.replicas.size / replicas),
            grad_norm=norm,
            loss_tokens=loss_tokens,
            forward_backward=self._pipeline.forward_backward,
            update=self._pipeline.clock.lap(),
            loss_scale=None if self._scaler is None else loss_scale,
        )

    @torch.no_grad()
    def eval_step(self, batch: Batch) -> Tensor:
        """The mean over replicas, of which each gives its own: summed over them, it is what they have together."""
        loss: Tensor = self._engine.eval_batch(self._feed([batch]), num_micro_batches=1)
        return loss.view(())  # one number, of which DeepSpeed makes a vector on some stages

    @torch.no_grad()
    def next_logits(self, inputs_BT: Tensor, last_B: Tensor) -> Tensor:
        ranks, model = self._ranks, self._part.model
        self._part.begin([Job(None, last_B=last_B.to(ranks.device))])
        self._expect([inputs_BT])
        inputs_BT = inputs_BT.to(ranks.device)
        logits_BV: Tensor | None = self._engine.eval_batch(
            iter([(inputs_BT, inputs_BT)]), compute_loss=False, num_micro_batches=1
        )
        if logits_BV is None:
            logits_BV = torch.empty(len(inputs_BT), model.vocab_size, device=ranks.device)
        last = ranks.topology.rank(replace(ranks.at, pipeline=ranks.topology.pipeline - 1))
        dist.broadcast(logits_BV, last, group=ranks.pipeline.handle)
        return logits_BV

    def _feed(
        self, microbatches: Sequence[Batch], weight: float = 1.0, gain: float | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Tell the stage of these micro-batches, and DeepSpeed their ids and targets."""
        given = [on_device(batch, self._ranks.device) for batch in microbatches]
        self._expect([inputs_BT for inputs_BT, _, _ in given])
        self._part.begin([Job(documents, weight, gain) for _, _, documents in given])
        return iter([(inputs_BT, targets_BT) for inputs_BT, targets_BT, _ in given])

    def _expect(self, inputs: Sequence[Tensor]) -> None:
        """Stages tell each other the shape of what they send where it is not the one before, and then only."""
        self._engine.total_loss = None  # to which DeepSpeed adds what evaluations return, and logits are no loss
        shapes = [x.shape for x in inputs]
        self._engine.dynamic_shape = len(set(shapes)) > 1
        if self._engine.dynamic_shape or shapes[:1] != self._shapes[:1]:
            self._engine.reset_activation_shape()
        self._shapes = [] if self._engine.dynamic_shape else shapes
