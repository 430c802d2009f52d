"""report.html: a run in one self-contained file that needs no script and no network."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path

from gptscale import __version__
from gptscale.report import sections
from gptscale.report.record import RunRecord, read_run
from gptscale.report.style import style_sheet
from gptscale.report.units import count, short
from gptscale.runtime.files import write_bytes_atomically

REPORT = "report.html"


def write_report(folder: Path) -> None:
    """Draw the run in `folder` from what lies there. Raises OSError."""
    write_bytes_atomically(folder / REPORT, render(read_run(folder), datetime.now(UTC)).encode())


def render(run: RunRecord, now: datetime) -> str:
    """The page as text. `now` is what it says of itself; everything else comes from the run."""
    parts: list[tuple[str, str, str]] = [
        ("loss", "Loss", sections.loss(run)),
        ("heldout", "Held-out text", sections.heldout(run)),
        ("optimisation", "Optimisation", sections.optimisation(run)),
        ("speed", "Speed and memory", sections.speed(run)),
        ("samples", "Samples", sections.samples(run)),
        ("data", "Data", sections.data(run)),
        ("environment", "Environment", sections.environment(run)),
        ("settings", "Settings", sections.settings(run)),
    ]
    return page(run.name, _standing(run), sections.headline(run), parts, now)


def page(name: str, lead: str, headline: str, parts: Sequence[tuple[str, str, str]], now: datetime) -> str:
    """A whole page. `name` is text; `lead` and `headline` are HTML, and so is the body of each of `parts`, which are
    (identity, title, body). Parts without a body are left out."""
    shown = [part for part in parts if part[2]]
    name = escape(name)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # A page opened as a file asks for no icon; one that a server hands out would.
        '<link rel="icon" href="data:,">'
        f"<title>{name} · gptscale</title><style>{style_sheet()}</style></head>\n<body>"
        f"<header><h1>{name}</h1>{lead}{_navigation(shown)}{headline}</header>\n<main>"
        + "\n".join(f'<section id="{key}"><h2>{title}</h2>{body}</section>' for key, title, body in shown)
        + f"</main>\n<footer>Written {now:%Y-%m-%d %H:%M:%S} UTC by gptscale {__version__}.</footer></body></html>\n"
    )


def _standing(run: RunRecord) -> str:
    """How far the run is."""
    words = [f"step {count(run.step)}"]
    bar = ""
    if run.total_steps:
        words = [f"{'finished: ' if run.finished else ''}step {count(run.step)} of {count(run.total_steps)}"]
        if not run.finished:
            share = f"{100 * run.step / run.total_steps:.0f} %"
            words.append(share)
            bar = f'<progress max="{run.total_steps}" value="{run.step}" aria-label="progress">{share}</progress>'
    if run.facts:
        session = run.facts.sessions[-1]
        devices = session.device if session.ranks == 1 else f"{session.ranks} × {session.device}"
        words += [f"{short(run.facts.parameters)} parameters", devices, session.layout, run.facts.precision]
    return f'<p class="lead soft">{" · ".join(escape(word) for word in words)}</p>{bar}'


def _navigation(shown: Sequence[tuple[str, str, str]]) -> str:
    links = "".join(f'<a href="#{key}">{title}</a>' for key, title, _ in shown)
    return f'<nav aria-label="sections">{links}</nav>'
