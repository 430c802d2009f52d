"""`gptscale bench step|layouts|data`: what an optimizer step costs, or its data, beside other people's."""

from __future__ import annotations

import difflib
import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from gptscale.config.compose import compose
from gptscale.config.schema import BenchDataRoot, BenchLayoutsRoot, BenchRoot
from gptscale.launcher.ports import reserved_port
from gptscale.runtime.errors import EXIT_DONE, EXIT_FAILED, UserError
from gptscale.runtime.files import write_bytes_atomically

SUBJECTS = {
    "step": "one optimizer step of every engine, beside a bare loop, Hugging Face and a nanoGPT-style loop",
    "layouts": "one optimizer step of every layout of ranks, beside torch's DDP and FSDP2, and what it sends",
    "data": "reading training data and tokenising, beside other people's loaders and tokenizers",
}


def help_text() -> str:
    from gptscale.cli.help import settings_help

    return "\n\n".join(
        settings_help(f"bench {name}", SUBJECTS[name], schema, f"gptscale bench {name} bench.output={name}.json")
        for name, schema in (("step", BenchRoot), ("layouts", BenchLayoutsRoot), ("data", BenchDataRoot))
    )


def run(arguments: Sequence[str]) -> int:
    subject = _subject(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # clean up as for Ctrl-C
    measure = {"step": _step, "layouts": _layouts, "data": _data}[subject]
    return measure(arguments[1:], f"gptscale bench {shlex.join(arguments)}")


def _step(arguments: Sequence[str], command: str) -> int:
    settings = compose("bench", BenchRoot, arguments).settings
    from gptscale.bench.contender import build_contenders, left_out
    from gptscale.bench.group import BenchError
    from gptscale.bench.report import to_json, to_text
    from gptscale.bench.step import bench_step

    contenders = build_contenders(settings)
    output = _writable(settings.bench.output)
    _prepare_openmp(settings.bench.threads)
    with ExitStack() as ports:
        try:
            report = bench_step(
                settings.bench, contenders, command, _ports(ports, settings.bench.ranks), _say, left_out(settings)
            )
        except BenchError as error:
            print(error, file=sys.stderr)
            return EXIT_FAILED
    _write(output, to_json(report))
    print(to_text(report))
    return EXIT_DONE


def _layouts(arguments: Sequence[str], command: str) -> int:
    settings = compose("bench_layouts", BenchLayoutsRoot, arguments).settings
    from gptscale.bench.compare_layouts import bench_layouts
    from gptscale.bench.group import BenchError
    from gptscale.bench.layouts import build_layouts
    from gptscale.bench.layouts_report import to_json, to_text

    contenders, left_out = build_layouts(settings)
    output = _writable(settings.bench.output)
    _prepare_openmp(settings.bench.threads)
    with ExitStack() as ports:
        try:
            report = bench_layouts(
                settings.bench, contenders, command, _ports(ports, settings.bench.ranks), _say, left_out
            )
        except BenchError as error:
            print(error, file=sys.stderr)
            return EXIT_FAILED
    _write(output, to_json(report))
    print(to_text(report))
    return EXIT_DONE


def _ports(held: ExitStack, ranks: int) -> Callable[[], int]:
    """Ports where the ranks of contenders meet, kept as long as the stack is; 0 for a world of one."""
    return lambda: 0 if ranks == 1 else held.enter_context(reserved_port())


def _data(arguments: Sequence[str], command: str) -> int:
    bench = compose("bench_data", BenchDataRoot, arguments).settings.bench
    from gptscale.bench.data import bench_data
    from gptscale.bench.data_report import to_json, to_text
    from gptscale.bench.environments import NotAvailableError

    output = _writable(bench.output)
    _prepare_openmp(threads=1)
    try:
        report = bench_data(bench, command, _say)
    except NotAvailableError as error:
        print(error, file=sys.stderr)
        return EXIT_FAILED
    _write(output, to_json(report))
    print(to_text(report))
    return EXIT_DONE


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _write(output: Path | None, figures: dict[str, Any]) -> None:
    if output is not None:
        write_bytes_atomically(output, json.dumps(figures, indent=1).encode() + b"\n")


def _subject(arguments: Sequence[str]) -> str:
    subject = arguments[0] if arguments else ""
    if subject in SUBJECTS:
        return subject
    near = difflib.get_close_matches(subject, SUBJECTS, n=1)
    fix = f"did you mean 'gptscale bench {near[0]}'?" if near else f"there are: {', '.join(SUBJECTS)}"
    if not subject or "=" in subject:
        raise UserError(f"bench needs to know what to measure\n{fix}")
    raise UserError(f"there is no benchmark '{subject}'\n{fix}")


def _writable(output: str | None) -> Path | None:
    """Where the figures go: better refused now than after minutes of measuring."""
    if output is None:
        return None
    path = Path(output)
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"bench.output={output} cannot be written\nname a file in a folder that exists")
    return path


def _prepare_openmp(threads: int) -> None:
    """Read when the OpenMP library loads. Threads that spin while another process has its turn would disturb it."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
