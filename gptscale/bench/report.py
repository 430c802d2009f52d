"""A measurement as text for people and as JSON for programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gptscale.bench.contender import COMPARED_STEPS, MULTIPLY_ONLY, Contender, Section
from gptscale.bench.environment import Environment
from gptscale.bench.rounds import Samples
from gptscale.bench.summary import Peak, Row, Spread
from gptscale.bench.tables import aligned
from gptscale.config.build import plain
from gptscale.config.schema import BenchConfig, TrainRoot
from gptscale.config.step_plan import tokens_per_step
from gptscale.model.count import flops_per_token, parameter_count


@dataclass(frozen=True)
class Report:
    bench: BenchConfig
    settings: TrainRoot
    """What all contenders have in common."""
    accumulation: int
    environment: Environment
    rows: Sequence[Row]
    peak: Peak
    measured: Mapping[str, Samples]
    sections: Mapping[str, Section]
    attention: str
    """The kernels by which ours attend, and how they were found."""
    worst_loss_difference: float
    left_out: Mapping[str, str]
    """Who took no part, and why."""

    @property
    def reference(self) -> str:
        return self.rows[0].name


def step_flops(contender: Contender) -> int:
    """Useful operations of one optimizer step over all ranks (`gptscale.model.count`)."""
    settings = contender.settings
    a_token = flops_per_token(settings.model, settings.tokenizer.vocab_size, settings.data.sequence_length)
    return a_token * tokens_per_step(settings)


def to_text(report: Report) -> str:
    environment, settings, bench = report.environment, report.settings, report.bench
    model, vocabulary, length = settings.model, settings.tokenizer.vocab_size, settings.data.sequence_length
    losses = report.measured[report.reference].losses
    others = [name for name, samples in report.measured.items() if not samples.same_work]
    lines = [
        f"{'command':<9}{environment.command}",
        f"{'date':<9}{environment.date}",
        f"{'model':<9}{model.layers} layers × {model.width}, {model.heads} heads, vocabulary {vocabulary}, "
        f"{parameter_count(model, vocabulary, length) / 1e6:.1f}M parameters, {settings.precision.compute}",
        f"{'step':<9}{tokens_per_step(settings):,} tokens: {bench.ranks} rank{'s' * (bench.ranks > 1)} × accumulation "
        f"{report.accumulation} × {settings.train.micro_batch} sequences × {length} tokens",
        f"{'ours':<9}{report.attention}{', documents masked' * settings.data.document_mask}",
        f"{'machine':<9}{environment.cpu}, {environment.usable_cores} usable cores; "
        f"{environment.threads} thread{'s' * (environment.threads > 1)} a rank, on {environment.device}",
        f"{'software':<9}gptscale {environment.gptscale}, python {environment.python}, torch {environment.torch}, "
        f"deepspeed {environment.deepspeed}, transformers {environment.transformers or 'none'}; {environment.malloc}",
        f"{'load':<9}{environment.load_at_start:.2f} at the start, {environment.load_at_end:.2f} at the end, of which "
        f"this command makes up to {environment.ranks * environment.threads}",
        f"{'method':<9}{bench.rounds} rounds of {bench.steps_per_turn} steps, after {bench.warmup_steps} to warm up; "
        "one contender computes at a time",
        f"{'losses':<9}{losses[0]:.4f} at first, {losses[-1]:.4f} after {len(losses)} steps; over the first "
        f"{min(len(losses), COMPARED_STEPS)} all contenders are within {report.worst_loss_difference:.1e}",
        f"{'peak':<9}matrix products alone: {report.peak.flops_per_cpu_s / 1e9:.1f} GFLOP a CPU-second, "
        f"{report.peak.flops_per_wall_s / 1e9:.1f} a second",
        "",
        *_table(report),
        "",
        f"÷{report.reference}: median over the rounds of the ratio within a round, with quartiles. of peak: useful "
        "operations ÷ those of",
        "matrix products alone in the same time. memory: most that the process held (on a GPU, its allocator).",
        *(["* takes other steps by design: its loss is compared at the first only."] if others else []),
        *(f"{row.name}: {row.built}" for row in report.rows),
    ]
    lines += [f"not run: {name}: {why}" for name, why in report.left_out.items()]
    doubt = environment.doubt()
    if doubt is not None:
        lines += ["", f"Elapsed times are doubtful: {doubt}. Trust the ratios of CPU-seconds."]
    return "\n".join(lines)


def _table(report: Report) -> list[str]:
    reference = report.reference
    header = ["", "ms a step", f"÷{reference}", "of peak", "CPU-ms a step", f"÷{reference}", "of peak", "memory"]
    rows = [
        [
            row.name if report.measured[row.name].same_work else f"{row.name}*",
            _times(row.wall_s),
            _ratio(row.wall_ratio),
            f"{row.wall_share_of_peak:.0%}",
            _times(row.cpu_s),
            _ratio(row.cpu_ratio),
            f"{row.cpu_share_of_peak:.0%}",
            f"{row.peak_bytes / 2**20:,.0f} MiB",
        ]
        for row in report.rows
    ]
    head, *body = aligned([header, *rows])
    lines = [head]
    section = None
    for row, line in zip(report.rows, body, strict=True):
        if section != (section := report.sections[row.name]):
            lines.append(f"· {section}")
        lines.append(line)
    return lines


def _times(seconds: Spread) -> str:
    return f"{seconds.median * 1e3:,.1f} ({seconds.lower * 1e3:,.1f}–{seconds.upper * 1e3:,.1f})"


def _ratio(ratio: Spread) -> str:
    return f"{ratio.median:.3f} ({ratio.lower:.3f}–{ratio.upper:.3f})"


def to_json(report: Report) -> dict[str, Any]:
    """Plain data: settings, environment, figures, and every sample."""
    samples = {
        name: {
            "wall_s": [turn.wall_s for turn in found.rounds],
            "cpu_s": [turn.cpu_s for turn in found.rounds],
            "losses": [] if name in MULTIPLY_ONLY else found.losses,
        }
        for name, found in report.measured.items()
    }
    settings = plain(report.settings)
    shared = ("run", "model", "tokenizer", "data", "precision", "optimizer", "train")
    return {
        "bench": plain(report.bench),
        "settings": {group: settings[group] for group in shared},
        "parameters": parameter_count(
            report.settings.model, report.settings.tokenizer.vocab_size, report.settings.data.sequence_length
        ),
        "tokens_per_step": tokens_per_step(report.settings),
        "environment": dataclasses.asdict(report.environment),
        "wall_is_doubtful": report.environment.doubt(),
        "worst_loss_difference": report.worst_loss_difference,
        "left_out": dict(report.left_out),
        "peak": dataclasses.asdict(report.peak),
        "reference": report.reference,
        "attention": report.attention,
        "contenders": {
            row.name: {"section": report.sections[row.name], **dataclasses.asdict(row)} for row in report.rows
        },
        "samples": samples,
    }
