"""What rank 0 knows of a run when a session starts, for facts.json."""

from __future__ import annotations

import platform
import shlex
import socket
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

from gptscale import __version__
from gptscale.config.schema import PrecisionConfig, TrainRoot
from gptscale.config.step_plan import run_steps, step_plan
from gptscale.parallel.ranks import Ranks
from gptscale.report.data_card import data_cards
from gptscale.report.facts import Facts, SessionFacts, StageFacts
from gptscale.runtime.hardware import describe_host
from gptscale.train.setup import Corpora

FORMULA = (
    "forward and backward: 6 · parameters of all matrix products + 12 · heads · head width · "
    "keys that a token sees on average, summed over layers; attention counted causally, nothing recomputed"
)
NO_FORMULA = "of a block of your own nobody but its author knows the operations"


def gather_facts(
    settings: TrainRoot,
    corpora: Corpora,
    ranks: Ranks,
    device: str,
    resumed_step: int,
    parameters: int,
    flops_per_token: int | None,
    peak_flops: float | None,
) -> Facts:
    """Facts of a session that goes on from `resumed_step`. `peak_flops` is that of all devices together."""
    host = describe_host()
    session = SessionFacts(
        started_utc=datetime.now(UTC).isoformat(timespec="seconds"),
        resumed_step=resumed_step,
        ranks=ranks.size,
        layout=layout_name(settings),
        micro_batch=settings.train.micro_batch,
        device=device,
        host=socket.gethostname(),
        cpu=host.cpu,
        cores=host.cores,
        memory_bytes=host.memory_bytes,
        command=shlex.join(["python", "-m", "gptscale.train", *sys.argv[1:]]),
        versions=versions(),
    )
    return Facts(
        name=str(settings.run.name),
        parameters=parameters,
        total_steps=run_steps(settings),
        precision=products(settings.precision),
        flops_per_token=flops_per_token,
        flops_formula=NO_FORMULA if flops_per_token is None else FORMULA,
        peak_flops=peak_flops,
        data=data_cards(corpora.folders, corpora.cache),
        sessions=(session,),
        stages=tuple(stage_facts(settings, corpora)),
    )


def stage_facts(settings: TrainRoot, corpora: Corpora) -> Iterator[StageFacts]:
    plan = step_plan(settings)
    for stage, text in zip(settings.data.stages, corpora.stages, strict=True):
        steps, weights = plan.steps_to(text.start), sum(corpus.weight for corpus in text.corpora)
        yield StageFacts(
            name=stage.name,
            after_step=steps,
            tokens=plan.tokens_after(steps),
            sequence_length=text.sequence_length,
            shares=tuple((corpus.path, corpus.weight / weights) for corpus in text.corpora),
        )


def layout_name(settings: TrainRoot) -> str:
    parallel = settings.parallel
    stage = "plain" if parallel.engine == "plain" else f"ZeRO-{parallel.zero_stage}"
    axes = {axis: getattr(parallel, axis) for axis in ("pipeline", "tensor", "sequence", "expert")}
    return ", ".join([stage, *(f"{axis} {size}" for axis, size in axes.items() if size > 1)])


def products(precision: PrecisionConfig) -> str:
    """By what name `hardware` knows the peak of matrix products in this precision."""
    return "tf32" if precision.tf32 and precision.compute == "fp32" else precision.compute


def versions() -> dict[str, str]:
    """Of what decides the result. `git` only in a checkout."""
    found = {
        "gptscale": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": version("deepspeed"),
    }
    if torch.version.cuda is not None:
        found["CUDA"] = torch.version.cuda
    revision = git_revision(Path(__file__).resolve().parents[2])
    return found if revision is None else {**found, "git": revision}


def git_revision(checkout: Path) -> str | None:
    """The revision that is checked out, from the files of .git: no program is started. None where there is none."""
    git = checkout / ".git"
    try:
        if git.is_file():  # a worktree: the file says where its folder is
            git = checkout / git.read_text().strip().removeprefix("gitdir: ")
        head = (git / "HEAD").read_text().strip()
        if not head.startswith("ref: "):
            return head[:12]
        common = git / "commondir"
        shared = git / common.read_text().strip() if common.is_file() else git
        reference = head.removeprefix("ref: ")
        if (shared / reference).is_file():
            return (shared / reference).read_text().strip()[:12]
        packed = (shared / "packed-refs").read_text().splitlines()
        return next((line.split()[0][:12] for line in packed if line.endswith(f" {reference}")), None)
    except OSError:
        return None
