"""`gptscale train`: check everything, prepare the text once, start the ranks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gptscale.config.compose import compose
from gptscale.config.rules import check_local_launch
from gptscale.config.schema import DataConfig, EvaluationConfig, LaunchConfig, TrainRoot
from gptscale.config.stages import as_corpora, stage_folders
from gptscale.launcher.local import launch_local
from gptscale.runtime.hardware import usable_cores
from gptscale.train.check import check_run


def help_text() -> str:
    from gptscale.cli.help import settings_help

    return settings_help(
        "train",
        "shards → checkpoints; starts its own ranks, resumes where it stopped",
        TrainRoot,
        "gptscale train experiment=tiny launch.ranks=2 parallel.zero_stage=2",
    )


def run(arguments: Sequence[str]) -> int:
    settings = compose("train", TrainRoot, arguments).settings
    check_run(settings, settings.launch.ranks)
    check_local_launch(settings)
    check_prepared(settings.data)
    if settings.data.path is None:
        from gptscale.cli.progress import prepare_progress
        from gptscale.data.prepare import ensure_prepared

        ensure_prepared(settings.data, settings.tokenizer, prepare_progress())
    check_heldout(settings.data, settings.evaluation)
    assert settings.run.dir is not None
    return launch_local(
        "gptscale.train",
        arguments,
        ranks=settings.launch.ranks,
        threads=threads_per_rank(settings.launch),
        logs=Path(settings.run.dir) / "logs",
        stop_timeout_s=settings.launch.stop_timeout_s,
    )


def threads_per_rank(launch: LaunchConfig) -> int:
    return launch.threads or max(1, usable_cores() // launch.ranks)


def check_prepared(data: DataConfig) -> None:
    """Refuse prepared text that ranks could not train on, before any is started or a run folder made."""
    from gptscale.data.remote import cache_for, open_corpus

    paths = [corpus.path for corpus in (() if data.path is None else as_corpora(data.path))]
    staged = stage_folders(data)
    cache = cache_for(data, [*paths, *staged])
    for path in paths:
        open_corpus(path, "train", cache=cache)
        open_corpus(path, "heldout", cache=cache)
    for path in staged:
        open_corpus(path, "train", cache=cache)


def check_heldout(data: DataConfig, evaluation: EvaluationConfig) -> None:
    """The same of `evaluation.sets`."""
    from gptscale.data.remote import cache_for, open_corpus

    cache = cache_for(data, [chosen.path for chosen in evaluation.sets])
    for chosen in evaluation.sets:
        open_corpus(chosen.path, "heldout", cache=cache)
