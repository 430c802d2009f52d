"""`gptscale export`: what others read, from what we wrote. No Hydra: three keys."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gptscale.config.build import build
from gptscale.config.schema import ExportRoot
from gptscale.runtime.errors import EXIT_DONE, UserError

EXAMPLE = "gptscale export source=corpora/mine target=megatron format=megatron"


def help_text() -> str:
    from gptscale.cli.help import settings_help

    return settings_help("export", "prepared text → the files of another framework", ExportRoot, EXAMPLE)


def run(arguments: Sequence[str]) -> int:
    values: dict[str, object] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            raise UserError(f"'{argument}' is not of the form key=value\n{EXAMPLE}")
        values[key] = value
    settings = build(ExportRoot, values, "")
    if settings.format != "megatron":
        raise UserError(f"there is no format={settings.format}\nthere is: megatron")
    if not settings.source or not settings.target:
        raise UserError(f"source and target have to be given\n{EXAMPLE}")
    from gptscale.data.corpus import open_split
    from gptscale.data.megatron import write_megatron
    from gptscale.data.shards import SPLITS

    target = Path(settings.target)
    corpora = [open_split(Path(settings.source), split, verify=True) for split in SPLITS]
    try:
        target.mkdir(parents=True, exist_ok=True)
        for corpus in corpora:
            prefix = target / f"{corpus.split}_text_document"
            write_megatron(corpus, prefix)
            print(prefix)
    except OSError as error:
        raise UserError(
            f"{target}: cannot be written ({error.strerror})\ngive a folder that you may write to, with space in it"
        ) from error
    return EXIT_DONE
