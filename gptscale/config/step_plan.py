"""How many sequences each optimizer step takes, and how long they are: a pure function of the samples used so far.

So there is nothing to save and a resumed run, on whatever layout, takes the same steps. No torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from gptscale.config.schema import TrainRoot


@dataclass(frozen=True)
class StepPlan:
    """The batch ramp and the sequence-length schedule of a run; without them every step is alike."""

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

    def batch(self, samples: int) -> int:
        """Samples of the step that begins after `samples` samples.

        It grows linearly from `ramp_from` (GPT-3, appendix B: "linearly from a small value (32k tokens) to the full
        value over the first 4-12 billion tokens"), in multiples of `ramp_from`, which ranks can share evenly.
        """
        if samples >= self.ramp_samples:
            return self.global_batch
        grown = self.global_batch // self.ramp_from - 1
        return self.ramp_from * (1 + grown * samples // self.ramp_samples)

    def length(self, samples: int) -> int:
        """Tokens that attend to one another in the step that begins after `samples` samples.

        It doubles at even distances up to `sequence_length` (short sequences first: Li et al., arXiv 2108.06084; Press
        et al., arXiv 2012.15832). A sample stays the same row of tokens, cut into so many shorter sequences: neither
        the order of samples nor the tokens of a step change.
        """
        if samples >= self.length_samples:
            return self.sequence_length
        doublings = (self.sequence_length // self.length_from).bit_length() - 1
        return self.length_from << (doublings * samples // self.length_samples)

    def samples_after(self, steps: int) -> int:
        """Samples that the first `steps` steps take."""
        return self._walk(steps=steps)[1]

    def steps_to(self, samples: int) -> int:
        """Steps until at least `samples` samples are used."""
        return self._walk(samples=samples)[0]

    def _walk(self, steps: int | None = None, samples: int | None = None) -> tuple[int, int]:
        """(steps, samples) once either is reached, by stretches of steps that are alike."""
        step = used = 0
        while True:
            batch = self.batch(used)
            stretch = None if batch == self.global_batch else -(-(self._end_of(batch) - used) // batch)
            if samples is not None:
                needed = -(-max(0, samples - used) // batch)
            else:
                assert steps is not None
                needed = steps - step
            if stretch is None or needed <= stretch:
                return step + needed, used + needed * batch
            step, used = step + stretch, used + stretch * batch

    def _end_of(self, batch: int) -> int:
        """Samples after which steps are larger than `batch`."""
        level, grown = batch // self.ramp_from, self.global_batch // self.ramp_from - 1
        return -(-level * self.ramp_samples // grown)


def step_plan(settings: TrainRoot) -> StepPlan:
    """The plan that checked settings ask for."""
    train, length = settings.train, settings.data.sequence_length
    return StepPlan(
        global_batch=train.global_batch,
        sequence_length=length,
        ramp_from=train.ramp_from or 0,
        ramp_samples=-(-(train.ramp_tokens or 0) // length),
        length_from=train.length_from or 0,
        length_samples=-(-(train.length_tokens or 0) // length),
    )


def run_steps(settings: TrainRoot) -> int:
    """Length of the run in optimizer steps; tokens are rounded up to whole steps."""
    if settings.train.steps is not None:
        return settings.train.steps
    assert settings.train.tokens is not None
    return step_plan(settings).steps_to(-(-settings.train.tokens // settings.data.sequence_length))


def schedule_tokens(settings: TrainRoot) -> int:
    """Tokens at which the learning rate's schedule ends."""
    if settings.schedule.decay_tokens is not None:
        return settings.schedule.decay_tokens
    steps = settings.schedule.total_steps or run_steps(settings)
    return step_plan(settings).samples_after(steps) * settings.data.sequence_length


def tokens_per_step(settings: TrainRoot) -> int:
    """Tokens of a step at the full batch."""
    return settings.train.global_batch * settings.data.sequence_length
