"""`gptscale prepare`: text → tokenizer and shards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gptscale.config.compose import compose
from gptscale.config.schema import PrepareRoot
from gptscale.runtime.errors import EXIT_DONE, UserError
from gptscale.runtime.registry import load_plugins


def help_text() -> str:
    from gptscale.cli.help import settings_help

    return settings_help(
        "prepare",
        "text → tokenizer and shards; prints the folder",
        PrepareRoot,
        "gptscale prepare target=corpora/mine \"data.sources=[{path: 'texts/*.jsonl'}]\" tokenizer.vocab_size=32000",
    )


def run(arguments: Sequence[str]) -> int:
    settings = compose("prepare", PrepareRoot, arguments).settings
    if settings.target == "":
        raise UserError("target is empty\ngive a folder that is to be made, or leave it out")
    load_plugins(settings.plugins)
    from gptscale.cli.progress import prepare_progress
    from gptscale.data.prepare import ensure_prepared, prepare

    if settings.target is None:
        folder = ensure_prepared(settings.data, settings.tokenizer, prepare_progress())
    else:
        folder = prepare(settings.data, settings.tokenizer, Path(settings.target), prepare_progress()).folder
    print(folder)
    return EXIT_DONE
