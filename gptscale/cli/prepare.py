"""`gptscale prepare`: text → tokenizer and shards."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from gptscale.config.compose import compose
from gptscale.config.rules import check_addresses
from gptscale.config.schema import PrepareRoot
from gptscale.runtime.errors import EXIT_DONE, UserError
from gptscale.runtime.registry import load_plugins


def help_text() -> str:
    from gptscale.cli.help import settings_help

    return settings_help(
        "prepare",
        "text → tokenizer and shards; prints the folder",
        PrepareRoot,
        "gptscale prepare target=corpora/mine \"data.sources=[{path: 'texts/*.jsonl'}]\" tokenizer.vocab_size=32000\n"
        "  gptscale prepare target=corpora/mine … prepare.tasks=16 prepare.task=3    # then, when all 16 have ended:\n"
        "  gptscale prepare target=corpora/mine … prepare.merge=true",
    )


def run(arguments: Sequence[str]) -> int:
    settings = compose("prepare", PrepareRoot, arguments).settings
    if settings.target == "":
        raise UserError("target is empty\ngive a folder that is to be made, or leave it out")
    jobs = settings.prepare
    if jobs.task is not None and (jobs.merge or not 0 <= jobs.task < jobs.tasks):
        raise UserError(
            f"prepare.task={jobs.task}, prepare.tasks={jobs.tasks}, prepare.merge={str(jobs.merge).lower()} "
            "contradict each other\nset 0 <= prepare.task < prepare.tasks, and prepare.merge=true without prepare.task"
        )
    check_addresses(settings.data)
    load_plugins(settings.plugins)
    from gptscale.cli.progress import prepare_progress
    from gptscale.data.prepare import corpus_folder, ensure_prepared, prepare, prepare_task

    data, tokenizer, show = settings.data, settings.tokenizer, prepare_progress()
    if jobs.task is not None:
        target = corpus_folder(data, tokenizer) if settings.target is None else Path(settings.target)
        parts = prepare_task(data, tokenizer, target, jobs, show)
        print(f"task {jobs.task} of {jobs.tasks}: {parts} parts are tokenised", file=sys.stderr)
        return EXIT_DONE
    if settings.target is None:
        folder = ensure_prepared(data, tokenizer, show, jobs.merge)
    else:
        folder = prepare(data, tokenizer, Path(settings.target), show, jobs.merge).folder
    if data.packing == "best_fit":
        from gptscale.data.corpus import open_split
        from gptscale.data.packing import ensure_packed

        rows = ensure_packed(open_split(folder, "train"), data.sequence_length).rows
        print(f"packed into {rows:,} rows of {data.sequence_length} tokens", file=sys.stderr)
    print(folder)
    return EXIT_DONE
