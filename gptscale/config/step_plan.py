"""How many sequences each optimizer step takes, and how long they are: a pure function of the samples used so far.

So there is nothing to save and a resumed run, on whatever layout, takes the same steps. No torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from gptscale.config.schema import TrainRoot
from gptscale.topology import BatchSplit


@dataclass(frozen=True)
class StageStart:
    """Where a stage of the data begins, on a whole step, and how long its rows are."""

    samples: int
    """Samples used before it, over all stages."""
    sequence_length: int


class Walked(NamedTuple):
    """How far a run is: what its first `steps` steps have used."""

    steps: int
    samples: int
    tokens: int


@dataclass(frozen=True)
class StepPlan:
    """The batch ramp, the sequence-length schedule and the stages of a run; without them every step is alike."""

    global_batch: int
    sequence_length: int
    ramp_from: int = 0
    """Samples of the first steps; divides `global_batch`."""
    ramp_samples: int = 0
    """Samples over which the batch grows to `global_batch`; 0: it is that from the start."""
    length_from: int = 0
    """Length of the first sequences; `sequence_length` is this times a power of two."""
    length_samples: int = 0
    """Samples over which sequences grow to `sequence_length`; 0: they are that from the start."""
    stages: tuple[StageStart, ...] = ()
    """In order. Rows change their length only once batch and sequences have grown up."""

    def batch(self, samples: int) -> int:
        """Samples of the step that begins after `samples` samples.

        It grows linearly from `ramp_from` (GPT-3, appendix B: "linearly from a small value (32k tokens) to the full
        value over the first 4-12 billion tokens"), in multiples of `ramp_from`, which ranks can share evenly. Where
        rows change their length, a step keeps its tokens.
        """
        if samples >= self.ramp_samples:
            return self.global_batch * self.sequence_length // self.row_length(samples)
        grown = self.global_batch // self.ramp_from - 1
        return self.ramp_from * (1 + grown * samples // self.ramp_samples)

    def length(self, samples: int) -> int:
        """Tokens that attend to one another in the step that begins after `samples` samples.

        It doubles at even distances up to `sequence_length` (short sequences first: Li et al., arXiv 2108.06084; Press
        et al., arXiv 2012.15832). A sample stays the same row of tokens, cut into so many shorter sequences: neither
        the order of samples nor the tokens of a step change.
        """
        if samples >= self.length_samples:
            return self.row_length(samples)
        doublings = (self.sequence_length // self.length_from).bit_length() - 1
        return self.length_from << (doublings * samples // self.length_samples)

    def row_length(self, samples: int) -> int:
        """Tokens of each sample of the step that begins after `samples` samples."""
        begun = [stage for stage in self.stages if stage.samples <= samples]
        return begun[-1].sequence_length if begun else self.sequence_length

    def split(self, samples: int, full: BatchSplit) -> BatchSplit:
        """How that step's samples are cut, where `full` is how `global_batch` is.

        Micro-batches keep their tokens, as steps do, so that longer rows take no more memory, down to one row.
        """
        micro_batch = full.micro_batch * self.sequence_length // self.row_length(samples)
        return replace(full, micro_batch=max(1, micro_batch)).of(self.batch(samples))

    def samples_after(self, steps: int) -> int:
        """Samples that the first `steps` steps take."""
        return self._walk(steps=steps).samples

    def tokens_after(self, steps: int) -> int:
        """Tokens that the first `steps` steps take."""
        return self._walk(steps=steps).tokens

    def steps_to(self, samples: int) -> int:
        """Steps until at least `samples` samples are used."""
        return self._walk(samples=samples).steps

    def at_tokens(self, tokens: int) -> Walked:
        """Where the run is once at least `tokens` tokens are used."""
        return self._walk(tokens=tokens)

    def _walk(self, steps: int = 0, samples: int = 0, tokens: int = 0) -> Walked:
        """The first whole step by which all three are reached, by stretches of steps that are alike."""
        at = Walked(0, 0, 0)
        while True:
            batch, length = self.batch(at.samples), self.row_length(at.samples)
            end = self._next_change(at.samples)
            stretch = None if end is None else -(-(end - at.samples) // batch)
            needed = max(
                steps - at.steps,
                -(-(samples - at.samples) // batch),
                -(-(tokens - at.tokens) // (batch * length)),
                0,
            )
            taken = needed if stretch is None else min(needed, stretch)
            at = Walked(at.steps + taken, at.samples + taken * batch, at.tokens + taken * batch * length)
            if taken == needed:
                return at

    def _next_change(self, samples: int) -> int | None:
        """Samples after which steps are not what they are after `samples`; None: they stay so."""
        ends = [stage.samples for stage in self.stages if stage.samples > samples]
        if samples < self.ramp_samples and self.global_batch > self.ramp_from:
            level, grown = self.batch(samples) // self.ramp_from, self.global_batch // self.ramp_from - 1
            ends.append(-(-level * self.ramp_samples // grown))
        return min(ends, default=None)


def step_plan(settings: TrainRoot) -> StepPlan:
    """The plan that checked settings ask for."""
    train, length = settings.train, settings.data.sequence_length
    plan = StepPlan(
        global_batch=train.global_batch,
        sequence_length=length,
        ramp_from=train.ramp_from or 0,
        ramp_samples=-(-(train.ramp_tokens or 0) // length),
        length_from=train.length_from or 0,
        length_samples=-(-(train.length_tokens or 0) // length),
    )
    for stage in settings.data.stages:
        length = stage.sequence_length or length
        start = StageStart(plan.at_tokens(stage.from_tokens).samples, length)
        plan = replace(plan, stages=(*plan.stages, start))
    return plan


def run_steps(settings: TrainRoot) -> int:
    """Length of the run in optimizer steps; tokens are rounded up to whole steps."""
    if settings.train.steps is not None:
        return settings.train.steps
    assert settings.train.tokens is not None
    return step_plan(settings).at_tokens(settings.train.tokens).steps


def schedule_tokens(settings: TrainRoot) -> int:
    """Tokens at which the learning rate's schedule ends."""
    if settings.schedule.decay_tokens is not None:
        return settings.schedule.decay_tokens
    return step_plan(settings).tokens_after(settings.schedule.total_steps or run_steps(settings))


def tokens_per_step(settings: TrainRoot) -> int:
    """Tokens of a step at the full batch."""
    return settings.train.global_batch * settings.data.sequence_length
