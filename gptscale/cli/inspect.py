"""`gptscale inspect`: a run, two runs, a checkpoint or prepared text, in the terminal. No Hydra: it is quick."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from gptscale.config.build import build
from gptscale.config.schema import InspectRoot
from gptscale.runtime.errors import EXIT_DONE, UserError

EXAMPLE = "name a run (runs/NAME), a checkpoint in it, or a prepared folder: gptscale inspect runs/tiny"
WIDTHS = 40, 100, 160
"""Letters: at least, where nobody knows, and at most."""


def help_text() -> str:
    from gptscale.cli.help import settings_help

    return settings_help(
        "inspect",
        "a run, two runs, a checkpoint or prepared text → state, curves, differences",
        InspectRoot,
        "gptscale inspect runs/tiny\n  gptscale inspect runs/tiny runs/other\n"
        "  gptscale inspect runs/tiny/checkpoints/step-00000060 verify=true",
    )


def run(arguments: Sequence[str]) -> int:
    subjects, settings = parse(arguments)
    least, unknown, most = WIDTHS
    width = max(least, min(most, shutil.get_terminal_size((unknown, 24)).columns))
    if len(subjects) == 2:
        print(two_runs(subjects[0], subjects[1], width))
    else:
        one_subject(subjects[0], settings.verify, width)
    return EXIT_DONE


def parse(arguments: Sequence[str]) -> tuple[list[Path], InspectRoot]:
    """Subjects and settings apart. A path may hold a `=` where something is there."""
    values: dict[str, object] = {}
    subjects = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if equals and not Path(argument).exists():
            values[key] = {"true": True, "false": False}.get(value.lower(), value)
        else:
            subjects.append(Path(argument))
    settings = build(InspectRoot, values, "")
    if not subjects:
        raise UserError(f"inspect needs to know what to look at\n{EXAMPLE}")
    if len(subjects) > 2:
        raise UserError(f"inspect compares two runs, not {len(subjects)}\nname one or two")
    for subject in subjects:
        if not subject.exists():
            raise UserError(f"{subject}: there is no such folder\n{EXAMPLE}")
    return subjects, settings


def one_subject(path: Path, verify: bool, width: int) -> None:
    """Print it. Raises UserError where it is damaged, or nothing that is known here."""
    from gptscale.report.record import is_run, read_run

    if is_run(path):
        from gptscale.report.run_text import run_text

        refuse_verify(verify, "name a checkpoint of the run, runs/NAME/checkpoints/step-…")
        print(run_text(read_run(path), width))
        return
    from gptscale.report.checkpoint_text import is_checkpoint

    if is_checkpoint(path):
        one_checkpoint(path, verify)
        return
    from gptscale.report.data_text import data_text, is_prepared  # imports sentencepiece

    if not is_prepared(path):
        raise UserError(f"{path}: no run, checkpoint or prepared text\n{EXAMPLE}")
    refuse_verify(verify, "prepared text is verified by data.verify=true when a training starts")
    print(data_text(path))


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


def refuse_verify(verify: bool, fix: str) -> None:
    if verify:
        raise UserError(f"verify=true is for checkpoints\n{fix}")
