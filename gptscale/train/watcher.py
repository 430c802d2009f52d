"""What a person sees of a run: lines of metrics, a line on the terminal, a report. Only rank 0 speaks."""

from __future__ import annotations

import logging
import resource
from collections import deque
from collections.abc import Iterable, Sequence
from functools import lru_cache, partial

import torch

from gptscale.config.compose import Composed
from gptscale.config.names import corpus_names
from gptscale.config.schema import TrainRoot
from gptscale.config.step_plan import run_steps, step_plan, tokens_per_step
from gptscale.evaluate.heldout import Evaluation, HeldoutLoss
from gptscale.evaluate.samples import Sample
from gptscale.model.count import flops_per_token
from gptscale.parallel.ranks import Ranks
from gptscale.report.facts import read_facts
from gptscale.runtime.hardware import peak_flops
from gptscale.train.facts import gather_facts, layout_name, products
from gptscale.train.metrics import MetricsFile, read_metrics
from gptscale.train.noise import SCALE, SIGNAL, TRACE, NoiseWindow
from gptscale.train.progress import Progress
from gptscale.train.reporting import Reporter
from gptscale.train.run_folder import RunFolder
from gptscale.train.setup import Corpora
from gptscale.train.taken_step import StepNumbers
from gptscale.train.tracker import Tracker, build_tracker

LOG = logging.getLogger("gptscale.train")

PACE_STEPS = 50
"""Steps by whose pace the time left is told."""


class Watcher:
    """Records and shows a run. On other ranks than 0 every method does nothing."""

    def __init__(
        self,
        composed: Composed[TrainRoot],
        folder: RunFolder,
        corpora: Corpora,
        progress: Progress,
        ranks: Ranks,
        parameters: int,
    ) -> None:
        """`parameters` is how many numbers are trained."""
        self._speaks = ranks.rank == 0
        if not self._speaks:
            return
        settings = composed.settings
        self._settings = settings
        self._folder = folder
        self._corpora = corpora
        self._total_steps = run_steps(settings)
        self._plan = step_plan(settings)
        self._tokens = progress.tokens
        self._position = progress.position.samples
        self._device = ranks.device
        self._ranks = ranks.size
        self._parameters = parameters
        own = settings.model.block == "gpt"  # of another block nobody but its author knows the operations
        self._flops_per_token = lru_cache(partial(flops_per_token, settings.model, corpora.vocab_size)) if own else None
        peak = peak_flops(device_name(ranks.device), products(settings.precision))
        self._peak_flops = None if peak is None else peak * ranks.size
        self._metrics = MetricsFile(folder.metrics, progress.step)
        self._samples = MetricsFile(folder.samples, progress.step)
        self._noise = NoiseWindow(read_metrics(folder.metrics) if settings.train.noise_scale_every_steps else ())
        self._tracker: Tracker = build_tracker(settings.logging, folder.path, composed.public, progress.step)
        self._started_step = progress.step
        self._pace: deque[tuple[int, float]] = deque(maxlen=PACE_STEPS)
        self._evaluation: Evaluation | None = None
        facts = gather_facts(
            settings,
            corpora,
            ranks,
            device_name(ranks.device),
            progress.step,
            parameters,
            None if self._flops_per_token is None else self._flops_per_token(self._plan.sequence_length),
            self._peak_flops,
        )
        self._report = Reporter(folder, facts.after(read_facts(folder.path)))
        self._announce(progress)

    def step(self, numbers: StepNumbers) -> None:
        if not self._speaks:
            return
        progress = numbers.progress
        used, tokens = self._position, progress.tokens - self._tokens
        tokens_per_sec = tokens / numbers.step_time_s
        self._tokens, self._position = progress.tokens, progress.position.samples
        self._pace.append((tokens, numbers.step_time_s + numbers.save_s))
        mfu = None
        if self._flops_per_token is not None and self._peak_flops is not None:
            mfu = tokens_per_sec * self._flops_per_token(self._plan.length(used)) / self._peak_flops
        values = {
            "step": progress.step,
            "tokens": progress.tokens,
            "train/loss": numbers.loss,
            "train/grad_norm": numbers.grad_norm,
            "train/lr": numbers.learning_rate,
            "throughput/tokens_per_sec": tokens_per_sec,
            "throughput/mfu": mfu,
            "throughput/step_time_s": numbers.step_time_s,
            "throughput/data_wait_pct": 100.0 * numbers.data_s / numbers.step_time_s,
            "time/data_s": numbers.data_s,
            "time/forward_backward_s": numbers.forward_backward_s,
            "time/update_s": numbers.update_s,
            "time/save_s": numbers.save_s,
            "data/sample_hash": f"{progress.sample_hash:016x}",
            "memory/peak_bytes": peak_bytes(self._device),
        }
        if numbers.loss_scale is not None:
            values["train/loss_scale"] = numbers.loss_scale
        if numbers.noise_signal is not None and numbers.noise_trace is not None:
            noise = {SIGNAL: numbers.noise_signal, TRACE: numbers.noise_trace}
            values |= {**noise, SCALE: self._noise.scale(noise)}
        self._metrics.write(values)
        self._tracker.log(progress.step, values)
        for stage, start in zip(self._settings.data.stages, self._plan.stages, strict=True):
            if used == start.samples:
                LOG.info(f"step {progress.step}: stage {stage.name} has begun")
        first = progress.step == self._started_step + 1
        if first or progress.step == self._total_steps or progress.step % self._settings.logging.print_every_steps == 0:
            profiled = " (profiled: not representative)" if self._settings.profile.covers(progress.step) else ""
            LOG.info(
                f"step {progress.step}/{self._total_steps}  loss {numbers.loss:.4f}  "
                f"grad norm {numbers.grad_norm:.2f}  lr {numbers.learning_rate:.2e}  "
                f"{tokens_per_sec:,.0f} tokens/s{profiled}  "
                f"mfu {'unknown' if mfu is None else f'{mfu:.1%}'}  {in_gib(peak_bytes(self._device))}  "
                f"{time_left(self._plan.tokens_after(self._total_steps) - self._tokens, self._pace)} left"
            )

    def evaluated(self, progress: Progress, result: Evaluation, samples: Sequence[Sample], elapsed_s: float) -> None:
        """An evaluation after the step that `progress` stands at, which took `elapsed_s`."""
        if not self._speaks:
            return
        self._evaluation = result
        self._pace.append((0, elapsed_s))
        values = {"step": progress.step, **_heldout_values("eval/", result.overall)}
        for name, loss in result.by_name.items():
            values |= _heldout_values(f"eval/{name}/", loss)
        values["time/evaluate_s"] = elapsed_s
        self._metrics.write(values)
        self._tracker.log(progress.step, values)
        for sample in samples:
            self._samples.write({"step": progress.step, "prompt": sample.prompt, "completion": sample.completion})
        LOG.info(
            f"step {progress.step}: held-out loss {result.overall.loss:.4f} nats a token, "
            f"{result.overall.bits_per_byte:.3f} bits a byte, over {result.overall.tokens:,} tokens"
            + "".join(f"; {name} {loss.loss:.4f}" for name, loss in result.by_name.items())
        )
        self._report.draw_if_cheap()

    def saving(self) -> None:
        """Before a checkpoint says how far the run is, its metrics up to there are on the disk."""
        if self._speaks:
            self._metrics.sync()
            self._samples.sync()
            self._tracker.flush()
            self._report.draw_if_cheap()

    def conclude(self) -> None:
        """Compare with the bigram model, where that is asked for, and write the report."""
        if not self._speaks:
            return
        baseline = None
        if self._settings.evaluation.bigram and self._evaluation is not None:
            baseline = self._bigram()
            names = corpus_names(self._settings.data)
            # In a mixture the bigram model is fitted to the first corpus.
            heldout = self._evaluation.by_name[names[0]] if names else self._evaluation.overall
            verdict = "below" if heldout.loss < baseline else "NOT below"
            LOG.info(
                f"held-out loss {heldout.loss:.4f} is {verdict} the {baseline:.4f} of an interpolated bigram "
                "model fitted to the same tokens"
            )
        self._report.conclude(baseline)

    def finished(self, progress: Progress) -> None:
        if self._speaks:
            LOG.info(f"done: {progress.step} steps, {progress.tokens:,} tokens; report: {self._folder.report}")

    def close(self) -> None:
        if self._speaks:
            self._metrics.close()
            self._samples.close()
            self._tracker.close()

    def _announce(self, progress: Progress) -> None:
        settings = self._settings
        text_tokens = self._corpora.stream.samples_per_epoch * settings.data.sequence_length
        ranks = "1 rank" if self._ranks == 1 else f"{self._ranks} ranks"
        if progress.step:
            LOG.info(f"going on with {self._folder.path} from step {progress.step}")
        if self._flops_per_token is not None:
            operations = self._flops_per_token(settings.data.sequence_length)
            peak = (
                "of a peak that is not known"
                if self._peak_flops is None
                else f"of {self._peak_flops / 1e12:,.1f} TFLOP/s"
            )
            LOG.info(f"MFU: tokens/s × {operations / 1e6:,.1f} MFLOP (forward and backward, attention causal) {peak}")
        LOG.info(
            f"{self._parameters:,} parameters, {text_tokens:,} tokens of text, {ranks} ({layout_name(settings)}), "
            f"{settings.precision.compute}, {tokens_per_step(settings):,} tokens a step"
        )
        for stage, start in zip(settings.data.stages, self._plan.stages, strict=True):
            begins = self._plan.steps_to(start.samples)
            LOG.info(
                f"stage {stage.name} {'began' if begins < progress.step else 'begins'} after step {begins:,}: "
                f"{self._plan.batch(start.samples):,} sequences of {start.sequence_length:,} tokens a step"
            )

    def _bigram(self) -> float:
        from gptscale.evaluate.bigram import bigram_loss

        return bigram_loss(
            self._corpora.folders[0].path,
            self._settings.data.sequence_length,
            self._settings.evaluation.sequences,
            self._corpora.cache,
        )


def time_left(tokens: int, pace: Iterable[tuple[int, float]]) -> str:
    """For so many tokens, at the `pace` of the last steps, tokens and seconds of each: steps grow where the batch does.

    "h:mm:ss", or "m:ss" below an hour.
    """
    done, seconds = (sum(column) for column in zip(*pace, strict=True))
    left_s = int(tokens * seconds / done)
    hours, minutes = divmod(left_s // 60, 60)
    return f"{hours}:{minutes:02d}:{left_s % 60:02d}" if hours else f"{minutes}:{left_s % 60:02d}"


def _heldout_values(prefix: str, loss: HeldoutLoss) -> dict[str, float]:
    return {
        f"{prefix}loss": loss.loss,
        f"{prefix}perplexity": loss.perplexity,
        f"{prefix}bits_per_byte": loss.bits_per_byte,
    }


def in_gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.2f} GiB"


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def peak_bytes(device: torch.device) -> int:
    """Most memory held so far: allocated on a GPU, resident of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
