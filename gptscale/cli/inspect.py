"""`gptscale inspect`: a run, two runs, a checkpoint or prepared text, in the terminal. No Hydra: it is quick."""

from __future__ import annotations

import shutil
import tempfile
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path

from gptscale.config.build import build
from gptscale.config.schema import InspectRoot
from gptscale.data.store import is_remote
from gptscale.runtime.errors import EXIT_DONE, UserError

EXAMPLE = "name a run (runs/NAME), a checkpoint in it, or a prepared folder: gptscale inspect runs/tiny"
Subject = Path | str
"""What is on this host, or an address."""
WIDTHS = 40, 100, 160
"""Letters: at least, where nobody knows, and at most."""
WITH_STEP = ("rank", "ranks", "limit", "global_batch", "sequence_length", "seed")


def help_text() -> str:
    from gptscale.cli.help import settings_help

    return settings_help(
        "inspect",
        "a run, two runs, a checkpoint or prepared text → state, curves, differences, what is in it",
        InspectRoot,
        "gptscale inspect runs/tiny\n  gptscale inspect runs/tiny runs/other\n"
        "  gptscale inspect runs/tiny step=120 rank=1\n"
        "  gptscale inspect runs/tiny/checkpoints/step-00000060 verify=true\n"
        "  gptscale inspect corpora/mine html=card.html\n"
        "  gptscale inspect s3://bucket/corpora/mine",
    )


def run(arguments: Sequence[str]) -> int:
    subjects, settings = parse(arguments)
    least, unknown, most = WIDTHS
    width = max(least, min(most, shutil.get_terminal_size((unknown, 24)).columns))
    if len(subjects) == 2:
        refuse(settings, ("verify", "html", "step"), "two runs are compared", "name one subject, or leave it out")
        for subject in subjects:
            if isinstance(subject, str):
                raise UserError(f"{subject}: an address, and the runs that are compared are on this host\n{EXAMPLE}")
        print(two_runs(Path(subjects[0]), Path(subjects[1]), width))
    else:
        one_subject(subjects[0], settings, width)
    return EXIT_DONE


def parse(arguments: Sequence[str]) -> tuple[list[Subject], InspectRoot]:
    """Subjects and settings apart. An address may hold a `=`, and a path where something is there."""
    values = {}
    subjects: list[Subject] = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if is_remote(argument):
            subjects.append(argument)
        elif equals and not Path(argument).exists():
            values[key] = value
        else:
            subjects.append(Path(argument))
    settings = settings_of(values)
    if not subjects:
        raise UserError(f"inspect needs to know what to look at\n{EXAMPLE}")
    if len(subjects) > 2:
        raise UserError(f"inspect compares two runs, not {len(subjects)}\nname one or two")
    for subject in subjects:
        if isinstance(subject, Path) and not subject.exists():
            raise UserError(f"{subject}: there is no such folder\n{EXAMPLE}")
    if settings.step is None:
        refuse(settings, WITH_STEP, "no step is named", "set step=…, or leave it out")
    if settings.limit < 0:
        raise UserError(f"limit={settings.limit} is below 0\nset limit=0 for all samples, or a number of them")
    return subjects, settings


def settings_of(typed: Mapping[str, str]) -> InspectRoot:
    """Settings as typed, by key. Raises UserError."""
    hints = typing.get_type_hints(InspectRoot)
    values = {key: value if hints.get(key) == str | None else _value(value) for key, value in typed.items()}
    return build(InspectRoot, values, "")


def _value(text: str) -> object:
    """A switch or a number where it reads as one; 1e6 is how people write a million."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def refuse(settings: InspectRoot, keys: Sequence[str], what: str, fix: str) -> None:
    """Raises UserError for the first of `keys` that is set."""
    for key in keys:
        if getattr(settings, key) != getattr(InspectRoot(), key):
            value = str(getattr(settings, key))
            shown = value.lower() if value in ("True", "False") else value
            raise UserError(f"{key}={shown} has no effect: {what}\n{fix}")


def one_subject(path: Subject, settings: InspectRoot, width: int) -> None:
    """Print it. Raises UserError where it is damaged, or nothing that is known here."""
    if isinstance(path, str):
        with tempfile.TemporaryDirectory() as folder:  # for its tokenizer
            prepared_text(path, settings, width, folder)
        return
    from gptscale.report.record import is_run

    if is_run(path):
        one_run(path, settings, width)
        return
    from gptscale.report.checkpoint_text import is_checkpoint

    if is_checkpoint(path):
        refuse(settings, ("html", "step"), f"{path} is a checkpoint", "name a run or prepared text, or leave it out")
        one_checkpoint(path, settings.verify)
        return
    from gptscale.report.data_summary import is_prepared  # imports sentencepiece

    if not is_prepared(path):
        raise UserError(f"{path}: no run, checkpoint or prepared text\n{EXAMPLE}")
    prepared_text(path, settings, width)


def one_run(path: Path, settings: InspectRoot, width: int) -> None:
    """Print how it stands, or the samples of one of its steps."""
    refuse(settings, ("html",), f"a run has a page, {path / 'report.html'}", "leave it out")
    if settings.step is not None:
        from gptscale.cli.inspect_step import step_of_run  # imports torch

        step_of_run(path, settings, width)
        return
    from gptscale.report.record import read_run
    from gptscale.report.run_text import run_text

    refuse(settings, ("verify",), f"{path} is a run", f"name a checkpoint of it, {path}/checkpoints/step-…")
    print(run_text(read_run(path), width))


def prepared_text(path: Subject, settings: InspectRoot, width: int, cache_dir: str | None = None) -> None:
    """Print what is in it, and write the page that is asked for; then raise UserError naming what is damaged."""
    if settings.step is not None:
        from gptscale.cli.inspect_step import step_of_text  # imports torch

        refuse(settings, ("html",), "the samples of a step are for the terminal", "leave html or step out")
        step_of_text(path, settings, width, cache_dir)
        return
    from gptscale.config.schema import DataConfig
    from gptscale.data.remote import cache_for
    from gptscale.report.data_summary import read_summary
    from gptscale.report.data_text import data_text

    cache = cache_for(DataConfig(cache_dir=cache_dir), [str(path)])
    data = read_summary(path, settings.verify, cache)
    print(data_text(data, width), flush=True)
    if settings.html is not None:
        from gptscale.report.card_page import write_card

        write_card(Path(settings.html), data)
        print(f"\npage: {settings.html}")
    if data.damage is not None:
        raise data.damage


def one_checkpoint(path: Path, verify: bool) -> None:
    """Print what its manifest says, then raise UserError naming the first damaged file, if one is."""
    from gptscale.checkpoint.manifest import DamagedError, read_manifest
    from gptscale.report.checkpoint_text import checkpoint_text, find_damage

    manifest = read_manifest(path)
    faults = find_damage(path, manifest)
    says = "all there, with the right sizes; verify=true reads them"
    if verify and not faults:
        from gptscale.checkpoint.read import open_checkpoint  # imports torch

        try:
            open_checkpoint(path).verify()
            says = "all there, every checksum right"
        except DamagedError as error:
            faults = [error]
    if faults:
        says = f"DAMAGED: {'; '.join(f'{fault.path.name} {fault.problem}' for fault in faults)}"
    print(checkpoint_text(path, manifest, says), flush=True)
    if faults:
        raise faults[0]


def two_runs(a: Path, b: Path, width: int) -> str:
    from gptscale.report.compare import comparison_text
    from gptscale.report.record import is_run, read_run

    for path in (a, b):
        if not is_run(path):
            raise UserError(f"{path} is no run, and only runs are compared\nname two run folders, runs/NAME")
    return comparison_text(read_run(a), read_run(b), width)
