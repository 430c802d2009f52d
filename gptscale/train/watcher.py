"""What a person sees of a run: lines of metrics, a line on the terminal, a report. Only rank 0 speaks."""

from __future__ import annotations

import logging
import resource
import time
from functools import lru_cache, partial
from pathlib import Path

import torch

from gptscale.config.compose import Composed
from gptscale.config.schema import TrainRoot
from gptscale.config.step_plan import run_steps, step_plan, tokens_per_step
from gptscale.evaluate.heldout import HeldoutLoss
from gptscale.model.count import flops_per_token
from gptscale.parallel.ranks import Ranks
from gptscale.report.facts import read_facts
from gptscale.runtime.hardware import peak_flops
from gptscale.train.facts import gather_facts, layout_name
from gptscale.train.metrics import MetricsFile
from gptscale.train.progress import Progress
from gptscale.train.reporting import Reporter
from gptscale.train.run_folder import RunFolder
from gptscale.train.setup import Corpora
from gptscale.train.tracker import Tracker, build_tracker

LOG = logging.getLogger("gptscale.train")


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
        self._device = ranks.device
        self._ranks = ranks.size
        self._parameters = parameters
        own = settings.model.block == "gpt"  # of another block nobody but its author knows the operations
        self._flops_per_token = lru_cache(partial(flops_per_token, settings.model, corpora.vocab_size)) if own else None
        peak = peak_flops(device_name(ranks.device), settings.precision.compute)
        self._peak_flops = None if peak is None else peak * ranks.size
        self._metrics = MetricsFile(folder.metrics, progress.step)
        self._tracker: Tracker = build_tracker(settings.logging, folder.path, composed.public)
        self._started_s = time.monotonic()
        self._started_step = progress.step
        self._heldout: HeldoutLoss | None = None
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

    def step(
        self, progress: Progress, loss: float, grad_norm: float, rate: float, step_time_s: float, wait_s: float
    ) -> None:
        if not self._speaks:
            return
        used = self._tokens // self._plan.sequence_length
        tokens_per_sec = (progress.tokens - self._tokens) / step_time_s
        self._tokens = progress.tokens
        mfu = None
        if self._flops_per_token is not None and self._peak_flops is not None:
            mfu = tokens_per_sec * self._flops_per_token(self._plan.length(used)) / self._peak_flops
        values = {
            "step": progress.step,
            "tokens": progress.tokens,
            "train/loss": loss,
            "train/grad_norm": grad_norm,
            "train/lr": rate,
            "throughput/tokens_per_sec": tokens_per_sec,
            "throughput/mfu": mfu,
            "throughput/step_time_s": step_time_s,
            "throughput/data_wait_pct": 100.0 * wait_s / step_time_s,
            "data/sample_hash": f"{progress.sample_hash:016x}",
            "memory/peak_bytes": peak_bytes(self._device),
        }
        self._metrics.write(values)
        self._tracker.log(progress.step, values)
        first = progress.step == self._started_step + 1
        if first or progress.step == self._total_steps or progress.step % self._settings.logging.print_every_steps == 0:
            LOG.info(
                f"step {progress.step}/{self._total_steps}  loss {loss:.4f}  grad norm {grad_norm:.2f}  lr {rate:.2e}  "
                f"{tokens_per_sec:,.0f} tokens/s  {self._time_left(progress.step)}"
            )

    def evaluated(self, progress: Progress, result: HeldoutLoss) -> None:
        if not self._speaks:
            return
        self._heldout = result
        values = {
            "step": progress.step,
            "eval/loss": result.loss,
            "eval/perplexity": result.perplexity,
            "eval/bits_per_byte": result.bits_per_byte,
        }
        self._metrics.write(values)
        self._tracker.log(progress.step, values)
        LOG.info(
            f"step {progress.step}: held-out loss {result.loss:.4f} nats a token, "
            f"{result.bits_per_byte:.3f} bits a byte, over {result.tokens:,} tokens"
        )
        self._report.draw_if_cheap()

    def saving(self) -> None:
        """Before a checkpoint says how far the run is, its metrics up to there are on the disk."""
        if self._speaks:
            self._metrics.sync()
            self._report.draw_if_cheap()

    def conclude(self) -> None:
        """Compare with the bigram model, where that is asked for, and write the report."""
        if not self._speaks:
            return
        baseline = None
        if self._settings.evaluation.bigram and self._heldout is not None:
            baseline = self._bigram()
            verdict = "below" if self._heldout.loss < baseline else "NOT below"
            LOG.info(
                f"held-out loss {self._heldout.loss:.4f} is {verdict} the {baseline:.4f} of an interpolated bigram "
                "model fitted to the same tokens"
            )
        self._report.conclude(baseline)

    def finished(self, progress: Progress) -> None:
        if self._speaks:
            LOG.info(f"done: {progress.step} steps, {progress.tokens:,} tokens; report: {self._folder.report}")

    def close(self) -> None:
        if self._speaks:
            self._metrics.close()
            self._tracker.close()

    def _announce(self, progress: Progress) -> None:
        settings = self._settings
        text_tokens = self._corpora.stream.samples_per_epoch * settings.data.sequence_length
        ranks = "1 rank" if self._ranks == 1 else f"{self._ranks} ranks"
        if progress.step:
            LOG.info(f"going on with {self._folder.path} from step {progress.step}")
        LOG.info(
            f"{self._parameters:,} parameters, {text_tokens:,} tokens of text, {ranks} ({layout_name(settings)}), "
            f"{settings.precision.compute}, {tokens_per_step(settings):,} tokens a step"
        )

    def _bigram(self) -> float:
        from gptscale.evaluate.bigram import bigram_loss

        return bigram_loss(
            Path(self._corpora.folders[0].path),
            self._settings.data.sequence_length,
            self._settings.evaluation.sequences,
        )

    def _time_left(self, step: int) -> str:
        done = step - self._started_step
        left_s = (time.monotonic() - self._started_s) / done * (self._total_steps - step)
        return f"{int(left_s) // 60}:{int(left_s) % 60:02d} left"


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def peak_bytes(device: torch.device) -> int:
    """Most memory held so far: allocated on a GPU, resident of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
