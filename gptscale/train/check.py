"""All that can be refused about a run before torch is imported or a rank started."""

from __future__ import annotations

from pathlib import Path

from gptscale.checkpoint.folder import CHECKPOINTS, MANIFEST, list_checkpoints
from gptscale.config.rules import check
from gptscale.config.schema import DataConfig, TrainRoot
from gptscale.runtime.errors import UserError
from gptscale.runtime.registry import load_plugins
from gptscale.topology import BatchSplit
from gptscale.train.optimizer import check_optimizer
from gptscale.train.resume import has_gone_on
from gptscale.train.schedule import check_schedule
from gptscale.train.tracker import check_tracker


def check_run(settings: TrainRoot, world_size: int) -> BatchSplit:
    """Rules between settings, and names that code has registered; returns how the global batch is cut."""
    load_plugins(settings.plugins)
    split = check(settings, world_size)
    check_text(settings.data)
    check_optimizer(settings.optimizer)
    check_schedule(settings.schedule)
    check_tracker(settings.logging)
    assert settings.run.dir is not None
    check_resume(settings.run.resume, Path(settings.run.dir))
    return split


def check_text(data: DataConfig) -> None:
    """An experiment for text of one's own (`data=own`) names none."""
    if data.path is None and not data.sources:
        raise UserError(
            "data.path is not set, and data.sources names no text either: there is nothing to train on\n"
            "name prepared text, e.g. data.path=corpora/mine (gptscale prepare makes it), or choose data=stdlib"
        )


def check_resume(resume: str, run_dir: Path) -> None:
    """A checkpoint that is asked for has to be one; whether it is whole is seen when it is read."""
    if resume in ("auto", "never") or (Path(resume) / MANIFEST).is_file():
        return
    if has_gone_on(run_dir / CHECKPOINTS, resume):  # and may have deleted it since
        return
    found = list_checkpoints(Path(resume) / CHECKPOINTS)
    fix = f"name one of its checkpoints: run.resume={found[0]}" if found else "use auto, never or a checkpoint's folder"
    raise UserError(f"run.resume={resume} is not a checkpoint\n{fix}")
